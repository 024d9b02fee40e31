//! Effects in another database than the message: applied once, however often it is delivered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use shardmq::{Delivery, ErrorKind, Order, dedup};
use tokio_postgres::Client;

use crate::support::reading::{append_texts, next, take, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// A cluster of one node and a topic of one partition, and the address of a database for effects.
async fn ready(texts: std::ops::Range<usize>) -> (TestCluster, String) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, texts).await;
    let elsewhere = database(shared_server().await).await;
    let sql = client(&elsewhere).await;
    sql.batch_execute("create table effect (message text)").await.unwrap();
    (test, elsewhere)
}

async fn counts(sql: &Client) -> BTreeMap<String, i64> {
    let rows = sql.query("select message, count(*) from effect group by 1", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn apply(delivery: &Delivery, url: &str) -> shardmq::Result<bool> {
    let mut sql = client(url).await;
    let transaction = sql.transaction().await.unwrap();
    let is_new = dedup::record(delivery, &transaction).await?;
    if is_new {
        let effect = "insert into effect values ($1)";
        transaction.execute(effect, &[&text(delivery)]).await.unwrap();
        transaction.commit().await.unwrap();
    }
    Ok(is_new)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_delivered_again_is_applied_once() {
    let (test, elsewhere) = ready(0..20).await;
    let builder = test.cluster.consumer("orders", "g").order(Order::Unordered);
    let messages = builder.flush_interval(SECOND / 10).stream().await.unwrap();
    let (handle, again) = (messages.handle(), Arc::new(AtomicUsize::new(0)));
    let (url, counted) = (elsewhere.clone(), Arc::clone(&again));
    let running = tokio::spawn(messages.run(4, move |delivery: Delivery| {
        let (url, counted) = (url.clone(), Arc::clone(&counted));
        async move {
            if apply(&delivery, &url).await.map_err(|error| error.chain())? {
                // It is committed, and nobody knows.
                return Err("the answer was lost".to_owned());
            }
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }));
    let twice = async || again.load(Ordering::SeqCst) >= 20;
    eventually("each has come twice", SOON, twice).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    let sql = client(&elsewhere).await;
    assert_eq!(counts(&sql).await, (0..20).map(|n| (n.to_string(), 1)).collect());
    assert_eq!(again.load(Ordering::SeqCst), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rolled_back_is_not_recorded_and_each_group_counts_for_itself() {
    let (test, elsewhere) = ready(0..1).await;
    let mut sql = client(&elsewhere).await;
    let mut one = test.cluster.consumer("orders", "one").stream().await.unwrap();
    let mut other = test.cluster.consumer("orders", "other").stream().await.unwrap();
    let (of_one, of_other) = (next(&mut one).await, next(&mut other).await);
    assert_eq!(of_one.uid(), of_other.uid());
    assert_eq!((of_one.group().as_str(), of_other.group().as_str()), ("one", "other"));
    for _ in 0..2 {
        let transaction = sql.transaction().await.unwrap();
        assert!(dedup::record(&of_one, &transaction).await.unwrap());
        transaction.rollback().await.unwrap();
    }
    assert!(apply(&of_one, &elsewhere).await.unwrap());
    assert!(!apply(&of_one, &elsewhere).await.unwrap());
    assert!(apply(&of_other, &elsewhere).await.unwrap());
    // Who comes while another is about to commit the same waits for it.
    let third = test.cluster.consumer("orders", "third");
    let mut third = third.stream().await.unwrap();
    let delivery = next(&mut third).await;
    let transaction = sql.transaction().await.unwrap();
    assert!(dedup::record(&delivery, &transaction).await.unwrap());
    let waiting = tokio::spawn(async move { apply(&delivery, &elsewhere).await.unwrap() });
    let watch = test.sql(0).await;
    let waits = "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
                                   and query like '%shardmq_dedup.applied%')";
    let blocked = async || watch.query_one(waits, &[]).await.unwrap().get::<_, bool>(0);
    eventually("the second waits", SOON, blocked).await;
    transaction.commit().await.unwrap();
    assert!(!within(SOON, "the second", waiting).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_old_is_forgotten_and_a_database_without_the_table_says_so() {
    let (test, elsewhere) = ready(0..3).await;
    let mut sql = client(&elsewhere).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let deliveries = take(&mut messages, 3).await;
    for delivery in &deliveries {
        assert!(apply(delivery, &elsewhere).await.unwrap());
    }
    let age = "update shardmq_dedup.applied set applied_at = applied_at - interval '8 days'
                where index < 2";
    assert_eq!(sql.execute(age, &[]).await.unwrap(), 2);
    let more = "insert into shardmq_dedup.applied
                select 'g', gen_random_uuid(), 1, 0, now() - interval '9 days'
                  from generate_series(1, 10000)";
    sql.batch_execute(more).await.unwrap();
    let week = Duration::from_hours(24 * 7);
    assert_eq!(dedup::prune(&sql, week).await.unwrap(), 10_002);
    assert_eq!(dedup::prune(&sql, week).await.unwrap(), 0);
    let transaction = sql.transaction().await.unwrap();
    let mut is_new = Vec::new();
    for delivery in &deliveries {
        is_new.push(dedup::record(delivery, &transaction).await.unwrap());
    }
    assert_eq!(is_new, [true, true, false]);
    transaction.rollback().await.unwrap();
    sql.batch_execute("drop schema shardmq_dedup cascade").await.unwrap();
    let error = dedup::record(&deliveries[0], &sql).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("shardmq migrate --dedup"), "{error}");
}
