//! Messages that are published in a transaction: stored once, in order, if and only if it commits.

mod dead;
mod elsewhere;
mod interrupted;
mod large;
mod late;
mod promoted;
mod rights;
mod sequence;
mod unknown;
mod waking;

use std::time::Duration;

use shardmq::{ErrorKind, Message};
use tokio::time::Instant;

use crate::support::relays::{Relay, arrive, publish, texts, through};
use crate::support::stored::{stored, topic};
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_is_sent_and_what_is_rolled_back_is_not() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    let transaction = sql.transaction().await.unwrap();
    let message = Message::new("never").key("k");
    producer.send_in(&transaction, message).await.unwrap();
    transaction.rollback().await.unwrap();
    let transaction = sql.transaction().await.unwrap();
    let message = Message::new("kept").key("k").header("h", "v");
    let first = producer.send_in(&transaction, message).await.unwrap();
    let second = producer.send_in(&transaction, Message::new("also")).await.unwrap();
    assert!(first < second);
    assert_eq!(
        stored(&watch, partitions[0]).await.len() + stored(&watch, partitions[1]).await.len(),
        0
    );
    transaction.commit().await.unwrap();
    let all = arrive(&watch, &partitions, 2).await;
    let kept = all.iter().find(|message| message.text() == "kept").unwrap();
    assert_eq!(kept.key.as_deref(), Some("k"));
    let header = "select headers ->> 'h' from shardmq.message($1)";
    let header: String = watch.query_one(header, &[&kept.id.number()]).await.unwrap().get(0);
    assert_eq!(header, "v");
    through(&watch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_comes_within_milliseconds() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let _relay = Relay::start(&test, "orders").await;
    let sql = test.sql(0).await;
    publish(&sql, "orders", "0", Some("k")).await;
    arrive(&sql, &partitions, 1).await;
    let mut took = Vec::new();
    for n in 1..20 {
        through(&sql).await;
        let began = Instant::now();
        publish(&sql, "orders", &n.to_string(), Some("k")).await;
        let there = async || stored(&sql, partitions[0]).await.len() == n + 1;
        eventually("it is there", SOON, there).await;
        took.push(began.elapsed());
    }
    took.sort();
    assert!(took[10] < SECOND, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_stays_open_delays_nobody_else_and_comes_when_it_commits() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let _relay = Relay::start(&test, "orders").await;
    let (mut older, sql) = (test.sql(0).await, test.sql(0).await);
    let open = older.transaction().await.unwrap();
    publish(&open, "orders", "open", Some("k")).await;
    let mut expected = Vec::new();
    for n in 0..50 {
        publish(&sql, "orders", &n.to_string(), Some("k")).await;
        expected.push(n.to_string());
        if n % 10 == 0 {
            arrive(&sql, &partitions, expected.len()).await;
        }
    }
    arrive(&sql, &partitions, 50).await;
    open.commit().await.unwrap();
    expected.push("open".to_owned());
    let all = arrive(&sql, &partitions, 51).await;
    assert_eq!(texts(&all), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_refused_before_anything_is_sent_and_by_the_tables_too() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut sql = test.sql(0).await;
    let transaction = sql.transaction().await.unwrap();
    let cases = [
        (Message::new(vec![0; (4 << 20) + 1]), "4194304"),
        (Message::new("").key("k".repeat(1_025)), "1024"),
        (Message::new("").header("h", "v".repeat(65_536)), "65536"),
        (Message::new("").header("shardmq.uid", "x"), "reserved"),
    ];
    for (message, limit) in cases {
        let error = producer.send_in(&transaction, message).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(limit), "{error}");
    }
    // Nothing was sent: the transaction goes on.
    producer.send_in(&transaction, Message::new("fits")).await.unwrap();
    transaction.commit().await.unwrap();
    let refused = [
        ("select shardmq.publish('Orders', '')", "topic_name"),
        ("select shardmq.publish('orders', '', repeat('k', 1025))", "key_of_1024_bytes"),
        ("select shardmq.publish('orders', '', null, '[]')", "headers_of_65536_bytes"),
        ("select shardmq.publish('orders', '', null, '{\"shardmq.uid\": \"x\"}')", "headers"),
        ("select shardmq.publish('orders', '', null, null, '2101-01-01')", "due_before_2100"),
        ("select shardmq.publish('orders', null)", "payload"),
    ];
    for (publish, constraint) in refused {
        let error = sql.batch_execute(publish).await.unwrap_err();
        let error = error.as_db_error().unwrap().to_string();
        assert!(error.contains(constraint), "{publish}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_publishes_with_the_row() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let _relay = Relay::start(&test, "orders").await;
    let mut sql = test.sql(0).await;
    sql.batch_execute(
        "create table invoice (id int primary key, customer text, cents int);
         create function invoice_published() returns trigger language plpgsql as $$
         begin
             perform shardmq.publish('orders', convert_to(row_to_json(new)::text, 'UTF8'), new.customer,
                                     jsonb_build_object('by', 'trigger'));
             return null;
         end $$;
         create trigger published after insert on invoice for each row execute function invoice_published()",
    )
    .await
    .unwrap();
    let transaction = sql.transaction().await.unwrap();
    transaction.batch_execute("insert into invoice values (1, 'c', 5)").await.unwrap();
    transaction.rollback().await.unwrap();
    sql.batch_execute("insert into invoice values (2, 'c', 7), (3, 'd', 9)").await.unwrap();
    let all = arrive(&sql, &partitions, 2).await;
    assert_eq!(texts(&all)[0], "{\"id\":2,\"customer\":\"c\",\"cents\":7}");
    assert_eq!(all[1].key.as_deref(), Some("d"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_back_does_not_come_and_whoever_takes_it_back_delays_nobody() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(publish(&watch, "orders", &n.to_string(), Some("k")).await);
    }
    let cancel = "select shardmq.cancel($1)";
    let done: bool = watch.query_one(cancel, &[&ids[3]]).await.unwrap().get(0);
    assert!(done);
    let transaction = sql.transaction().await.unwrap();
    transaction.query_one(cancel, &[&ids[5]]).await.unwrap();
    let _relay = Relay::start(&test, "orders").await;
    let all = arrive(&watch, &partitions, 8).await;
    assert_eq!(texts(&all), ["0", "1", "2", "4", "6", "7", "8", "9"]);
    // It stays after all.
    transaction.rollback().await.unwrap();
    assert_eq!(texts(&arrive(&watch, &partitions, 9).await)[8], "5");
    let again: bool = watch.query_one(cancel, &[&ids[5]]).await.unwrap().get(0);
    assert!(!again);
    through(&watch).await;
}

/// Of a table that was empty when its plans were made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction_comes_quickly_and_in_order() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let _relay = Relay::start(&test, "orders").await;
    let mut sql = test.sql(0).await;
    let watch = test.sql(0).await;
    let transaction = sql.transaction().await.unwrap();
    let many = "select count(shardmq.publish('orders', convert_to(n::text, 'UTF8'), 'k' || n % 10))
                     from generate_series(1, 20000) n";
    transaction.batch_execute(many).await.unwrap();
    // Another, published later and committed before.
    publish(&watch, "orders", "0", Some("alone")).await;
    arrive(&watch, &partitions, 1).await;
    transaction.commit().await.unwrap();
    let all = arrive(&watch, &partitions, 20_001).await;
    for key in 0..10 {
        let key = format!("k{key}");
        let of_key = all.iter().filter(|message| message.key.as_deref() == Some(&key));
        let numbers: Vec<u32> = of_key.map(|message| message.text().parse().unwrap()).collect();
        assert!(numbers.len() == 2_000 && numbers.is_sorted(), "{key}");
    }
    through(&watch).await;
}
