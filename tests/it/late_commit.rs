//! A transaction that appends and commits late: nobody sees a gap, and nothing is skipped.

use std::time::Duration;

use futures_util::future::join_all;
use shardmq::{Cluster, Message, PartitionId};
use tokio_postgres::Client;

use crate::support::stored::{assert_dense, number, stored, topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

async fn append(sql: &Client, partition: PartitionId, text: &str) -> i64 {
    let payloads = vec![text.as_bytes()];
    sql.query_one("select shardmq.append($1, $2)", &[&number(partition), &payloads])
        .await
        .unwrap()
        .get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producers_wait_for_an_open_transaction_and_readers_see_no_gap() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (open, look) = (test.sql(0).await, test.sql(0).await);
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    open.batch_execute("begin").await.unwrap();
    append(&open, partition, "late").await;

    let other = Cluster::connect(&test.control_url).await.unwrap();
    let mut sends = Vec::new();
    for cluster in [&test.cluster, &other] {
        let producer = cluster.producer("orders").build().await.unwrap();
        sends.push(tokio::spawn(async move {
            let sent = producer.send_all((0..20).map(|n| Message::new(n.to_string())));
            sent.await.into_iter().collect::<Result<Vec<_>, _>>()
        }));
    }
    let both_wait = || async { waiting(&look, partition).await >= 2 };
    eventually("both producers wait", 15 * SECOND, both_wait).await;
    assert!(stored(&look, partition).await.is_empty());
    open.batch_execute("commit").await.unwrap();

    for ids in join_all(sends).await {
        assert_eq!(ids.unwrap().unwrap().len(), 20);
    }
    let all = stored(&look, partition).await;
    assert_dense(&all);
    assert_eq!((all.len(), all[0].text()), (41, "late"));
    for expected in all {
        let next = within(15 * SECOND, "a delivery", messages.next()).await;
        let delivery = next.unwrap().unwrap();
        assert_eq!(delivery.id(), expected.id);
        delivery.ack().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_rolled_back_transaction_appended_leaves_no_gap() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let open = test.sql(0).await;
    open.batch_execute("begin").await.unwrap();
    append(&open, partition, "never").await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let send = tokio::spawn(async move { producer.send(Message::new("first")).await });
    let look = test.sql(0).await;
    let waits = || async { waiting(&look, partition).await == 1 };
    eventually("the producer waits", 20 * SECOND, waits).await;
    open.batch_execute("rollback").await.unwrap();
    assert_eq!(send.await.unwrap().unwrap().sequence(), 1);
    assert_eq!(stored(&look, partition).await.len(), 1);
}

/// Whoever sees message n sees all before it, at any time, while many append by every way there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_any_time_what_is_visible_is_dense_and_never_changes() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut writers = Vec::new();
    for writer in 0..3 {
        let cluster = Cluster::connect(&test.control_url).await.unwrap();
        let sql = test.sql(0).await;
        writers.push(tokio::spawn(async move {
            let producer = cluster.producer("orders").build().await.unwrap();
            for n in 0..60 {
                let text = format!("{writer}-{n}");
                if n % 3 == 0 {
                    sql.batch_execute("begin").await.unwrap();
                    append(&sql, partition, &text).await;
                    let end = if n % 2 == 0 { "commit" } else { "rollback" };
                    sql.batch_execute(end).await.unwrap();
                } else {
                    producer.send(Message::new(text)).await.unwrap();
                }
            }
        }));
    }
    let look = test.sql(0).await;
    let mut seen = Vec::new();
    while writers.iter().any(|writer| !writer.is_finished()) {
        let now = stored(&look, partition).await;
        assert_dense(&now);
        assert!(now.starts_with(&seen), "what was visible has changed");
        seen = now;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(stored(&look, partition).await.len(), 3 * (40 + 10));
}
