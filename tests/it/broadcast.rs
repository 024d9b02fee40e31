//! Consumers that get everything, each in a group of its own.

use std::time::Duration;

use shardmq::{Cluster, ErrorKind, GroupSummary, Start};
use tokio_postgres::Client;

use crate::support::clocks::{Clocks, look_after};
use crate::support::reading::{append_texts, next, text, texts_until};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// The rows of broadcast groups: starts and cursors.
async fn left(sql: &Client) -> (i64, i64) {
    rows(sql, "broadcast-%").await
}

/// The rows of groups with such names: starts and cursors.
async fn rows(sql: &Client, groups: &str) -> (i64, i64) {
    let starts = "select count(*) from shardmq.group_start where group_name like $1";
    let cursors = "select count(*) from shardmq.cursor where group_name like $1";
    let count = async |query| sql.query_one(query, &[&groups]).await.unwrap().get::<_, i64>(0);
    (count(starts).await, count(cursors).await)
}

async fn groups(test: &TestCluster) -> Vec<GroupSummary> {
    test.cluster.groups(Some("orders")).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_instance_gets_everything_from_its_beginning_on_and_leaves_nothing_behind() {
    let test = TestCluster::new(2).await;
    let sql = [test.sql(0).await, test.sql(1).await];
    let partitions = topic(&test, "orders", 2).await;
    append_texts(&sql[0], partitions[0], ["before"]).await;
    let broadcast = || test.cluster.broadcast("orders").poll_interval(SECOND / 5).stream();
    let (mut one, mut two) = (broadcast().await.unwrap(), broadcast().await.unwrap());
    let all = test.cluster.broadcast("orders").start(Start::Earliest).stream().await;
    let mut all = all.unwrap();
    let before = next(&mut all).await;
    assert_eq!(text(&before), "before");
    before.ack().unwrap();
    for (sql, partition) in sql.iter().zip(&partitions) {
        append_texts(sql, *partition, ["x"]).await;
    }
    for messages in [&mut one, &mut two, &mut all] {
        for _ in 0..2 {
            let delivery = next(messages).await;
            assert_eq!(text(&delivery), "x");
            delivery.ack().unwrap();
        }
    }
    let summaries = groups(&test).await;
    assert!(summaries.len() == 3 && summaries.iter().all(|group| group.broadcast));
    for messages in [one, two, all] {
        messages.shutdown(SECOND).await.unwrap();
    }
    assert_eq!((left(&sql[0]).await, left(&sql[1]).await), ((0, 0), (0, 0)));
    assert!(groups(&test).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_instance_that_crashed_everything_goes_after_a_while() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let clocks = Clocks::of(&test).await;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let url = test.control_url.clone();
    let crashed = runtime.spawn(async move {
        let cluster = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
        cluster.broadcast("orders").lease(SECOND).stream().await.unwrap()
    });
    let crashed = crashed.await.unwrap();
    eventually("it consumes", SOON, async || left(&sql).await == (1, 1)).await;
    runtime.shutdown_background();
    drop(crashed);
    let mut living = test.cluster.broadcast("orders").lease(600 * SECOND).stream().await.unwrap();
    let other = test.cluster.consumer("orders", "g").stream().await.unwrap();
    eventually("they consume", SOON, async || left(&sql).await == (2, 2)).await;
    eventually("the group is known", SOON, async || rows(&sql, "g").await == (1, 1)).await;
    other.shutdown(SECOND).await.unwrap();
    // To control its last sign of life is as long ago.
    sql.batch_execute(
        "update shardmq_control.member set heartbeat_at = heartbeat_at - interval '11 min'
          where lease_secs = 1",
    )
    .await
    .unwrap();
    clocks.move_server("5 min").await;
    look_after(&test).await;
    assert_eq!(left(&sql).await, (2, 2), "it may still come back");
    clocks.move_server("6 min").await;
    look_after(&test).await;
    assert_eq!(left(&sql).await, (1, 1), "the living one stays");
    assert_eq!(
        rows(&sql, "g").await,
        (1, 1),
        "a group that is no broadcast stays without consumers"
    );
    append_texts(&sql, partition, ["still", "here"]).await;
    assert_eq!(texts_until(&mut living, "here").await, ["still"]);
    living.shutdown(SECOND).await.unwrap();
    let none = test.cluster.group("orders", "broadcast-x").await.unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound);
}
