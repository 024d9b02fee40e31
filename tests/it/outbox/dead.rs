//! What no partition takes is set aside, and harms no neighbour.

use std::time::Duration;

use tokio_postgres::Client;
use tracing::Level;

use crate::support::relays::{Relay, arrive, publish, texts, through};
use crate::support::said::said;
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

const SOON: Duration = Duration::from_secs(15);

async fn dead(sql: &Client) -> Vec<(String, String)> {
    let rows = sql
        .query("select coalesce(topic, ''), error from shardmq.outbox_dead order by id", &[])
        .await
        .unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn are_dead(sql: &Client, count: usize) -> Vec<(String, String)> {
    let are = async || dead(sql).await.len() == count;
    eventually("they are set aside", SOON, are).await;
    dead(sql).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_topic_is_set_aside_and_put_back_once_it_is_there() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let _relay = Relay::start(&test, "orders").await;
    let sql = test.sql(0).await;
    for n in 0..6 {
        let topic = if n % 2 == 0 { "orders" } else { "laterorders" };
        publish(&sql, topic, &n.to_string(), Some("k")).await;
    }
    let all = arrive(&sql, &partitions, 3).await;
    assert_eq!(texts(&all), ["0", "2", "4"]);
    let dead = are_dead(&sql, 3).await;
    assert!(
        dead.iter().all(|(topic, why)| topic == "laterorders" && why.contains("does not exist"))
    );
    let told = || said(Level::WARN, "topic", "laterorders");
    let are_told = async || told().len() == 3;
    eventually("it is told of each", SOON, are_told).await;
    assert!(told().iter().all(|said| said.has("alert", "outbox")));
    let made = topic(&test, "laterorders", 1).await;
    let revive = "select shardmq.outbox_revive('laterorders')";
    assert_eq!(sql.query_one(revive, &[]).await.unwrap().get::<_, i64>(0), 3);
    assert_eq!(texts(&arrive(&sql, &made, 3).await), ["1", "3", "5"]);
    assert_eq!(sql.query_one(revive, &[]).await.unwrap().get::<_, i64>(0), 0);
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_rows_of_a_table_without_checks_are_set_aside_and_their_neighbours_come() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    sql.batch_execute(
        "alter table shardmq.outbox
            drop constraint topic_name, drop constraint key_of_1024_bytes,
            drop constraint headers_of_65536_bytes, alter column topic drop not null,
            alter column payload drop not null",
    )
    .await
    .unwrap();
    sql.batch_execute(
        "insert into shardmq.outbox (topic, key, headers, payload)
         select case n when 10 then 'No topic' when 20 then null else 'orders' end,
                case n when 30 then repeat('k', 2000) else 'k' end,
                case n when 40 then '[1]'::jsonb when 41 then '{}' end,
                case n when 50 then null else convert_to(n::text, 'UTF8') end
           from generate_series(1, 60) n",
    )
    .await
    .unwrap();
    let _relay = Relay::start(&test, "orders").await;
    let all = arrive(&sql, &partitions, 55).await;
    let expected: Vec<String> =
        (1..=60).filter(|n| n % 10 != 0 || *n == 60).map(|n| n.to_string()).collect();
    assert_eq!(texts(&all), expected);
    let dead = are_dead(&sql, 5).await;
    assert!(dead.iter().all(|(_, why)| !why.is_empty()), "{dead:?}");
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_partition_sends_its_messages_back_to_be_routed_anew() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let sql = test.sql(0).await;
    let state = |state: &str| {
        format!(
            "update shardmq.partition set state = '{state}' where partition = {}",
            partitions[0]
        )
    };
    sql.batch_execute(&state("sealed")).await.unwrap();
    for n in 0..40 {
        publish(&sql, "orders", &n.to_string(), None).await;
    }
    // Those whose key belongs to the sealed partition wait.
    for n in 0..8 {
        publish(&sql, "orders", &format!("k{n}"), Some(&n.to_string())).await;
    }
    let of_sealed: Vec<String> = (0..8)
        .filter(|n: &u16| shardmq::key_slot(&n.to_string()) < shardmq::SLOTS / 2)
        .map(|n| format!("k{n}"))
        .collect();
    assert!(!of_sealed.is_empty() && of_sealed.len() < 8);
    let _relay = Relay::start(&test, "orders").await;
    arrive(&sql, &partitions[1..], 48 - of_sealed.len()).await;
    assert_eq!(dead(&sql).await, []);
    sql.batch_execute(&state("open")).await.unwrap();
    // Seldom in one batch, since they are tried again and again.
    let all = arrive(&sql, &partitions[..1], of_sealed.len()).await;
    assert_eq!(texts(&all), of_sealed);
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fits_no_more_stays_aside_and_the_rest_is_put_back() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    sql.batch_execute(
        "insert into shardmq.outbox_dead (id, topic, key, headers, payload, error, died_at) values
             (1, 'orders', 'k', '{\"h\": \"v\"}', 'good', '', now()), (2, null, null, null, 'x', '', now()),
             (3, 'orders', null, null, null, '', now()), (4, 'orders', null, '[]', 'x', '', now()),
             (5, 'orders', repeat('k', 1025), null, 'x', '', now()), (6, 'O!', null, null, 'x', '', now()),
             (7, 'orders', null, null, 'good too', '', now())",
    )
    .await
    .unwrap();
    let revive = "select shardmq.outbox_revive()";
    assert_eq!(sql.query_one(revive, &[]).await.unwrap().get::<_, i64>(0), 2);
    assert_eq!(dead(&sql).await.len(), 5);
}
