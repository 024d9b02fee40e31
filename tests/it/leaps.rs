//! A server's clock that leaps ahead and comes back: nothing is dropped that can't be brought back, and no
//! lease of the time of the leap lasts until then.

use std::time::Duration;

use shardmq::{Message, Retention, TopicOptions};
use tokio_postgres::Client;
use tracing::Level;

use crate::support::clocks::{Clocks, look_after};
use crate::support::reading::{append_texts, texts_until};
use crate::support::said::said;
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);

/// A topic of one partition whose days are kept for a day.
async fn ready() -> (TestCluster, Client, Clocks) {
    let test = TestCluster::new(1).await;
    let retention = Retention { days: 1, dead_letter_days: 1, ..Retention::default() };
    let options = TopicOptions::partitions(1).retention(retention);
    test.cluster.create_topic("orders", options).await.unwrap();
    let (sql, clocks) = (test.sql(0).await, Clocks::of(&test).await);
    (test, sql, clocks)
}

fn partition() -> shardmq::PartitionId {
    shardmq::PartitionId::new(1, 1).unwrap()
}

async fn count(sql: &Client, text: &str) -> i64 {
    sql.query_one(&format!("select count(*) from {text}"), &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_day_is_dropped_before_its_time_is_over_by_two_clocks() {
    let (test, sql, clocks) = ready().await;
    append_texts(&sql, partition(), ["a", "b"]).await;
    let day = clocks.day(0).await;
    clocks.move_server("2 days").await;
    append_texts(&sql, partition(), ["c"]).await;
    clocks.move_server("3 days").await;
    // The machine's own clock has not moved.
    test.cluster.look_after_nodes().await.unwrap();
    assert_eq!(count(&sql, "shardmq.messages(10101)").await, 3);
    let told = said(Level::ERROR, "alert", "clock");
    assert!(told.iter().any(|said| said.has("day", &format!("{day:06}"))), "{told:?}");
    // It had been right: the machine says so too.
    look_after(&test).await;
    assert_eq!(count(&sql, "shardmq.messages(10101)").await, 1);
    let none = sql.batch_execute("select shardmq.expire_day(10101, null)").await.unwrap_err();
    assert!(none.to_string().contains("caller's own clock") || none.as_db_error().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_dedup_key_dead_letter_or_group_goes_before_its_time_is_over_by_two_clocks() {
    let (test, sql, clocks) = ready().await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let once = || Message::new("x").dedup_key("once");
    producer.send(once()).await.unwrap();
    let mut dying = test.cluster.consumer("orders", "g").stream().await.unwrap();
    crate::support::reading::next(&mut dying).await.reject("no");
    let dead = "shardmq.dead_letter";
    eventually("it is dead", SOON, async || count(&sql, dead).await == 1).await;
    dying.shutdown(SECOND).await.unwrap();
    sql.batch_execute(
        "insert into shardmq.group_start (topic, group_name, start_at, broadcast, seen_at)
         values ('orders', 'broadcast-gone', now(), true, shardmq.clock())",
    )
    .await
    .unwrap();
    let left = async || {
        let group = "shardmq.group_start where group_name = 'broadcast-gone'";
        (count(&sql, "shardmq.sent_key").await, count(&sql, dead).await, count(&sql, group).await)
    };
    clocks.move_server("5 days").await;
    test.cluster.look_after_nodes().await.unwrap();
    assert_eq!(left().await, (1, 1, 1));
    look_after(&test).await;
    assert_eq!(left().await, (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_of_the_time_of_a_leap_is_over_after_it() {
    let (test, sql, clocks) = ready().await;
    let keep = async |holder: u32| -> bool {
        let text =
            format!("select shardmq.keep_up('00000000-0000-0000-0000-{holder:012}'::uuid, 20)");
        sql.query_one(&text, &[]).await.unwrap().get(0)
    };
    append_texts(&sql, partition(), ["a"]).await;
    clocks.move_server("30 days").await;
    assert!(keep(1).await);
    // Consumers of all kinds that die in the leap.
    sql.batch_execute(
        "select shardmq.take('orders', 'g', '00000000-0000-4000-8000-000000000001');
         select shardmq.take('orders', 'h', '00000000-0000-4000-8000-000000000001')",
    )
    .await
    .unwrap_err();
    sql.batch_execute("select shardmq.take('orders', 'g', '00000000-0000-4000-8000-000000000001')")
        .await
        .unwrap();
    assert!(!keep(2).await, "it is held");
    clocks.move_server("-30 days").await;
    assert!(keep(2).await, "the holder is of another time");
    let mut messages = test.cluster.consumer("orders", "g").lease(SECOND).stream().await.unwrap();
    assert_eq!(texts_until(&mut messages, "a").await, Vec::<String>::new());
    messages.shutdown(SECOND).await.unwrap();
}
