//! A key is known for two days, whatever day they are in, and goes with what was stored under it.

use shardmq::MessageId;
use tokio_postgres::Client;

use super::{SECOND, good, once, send_together, texts};
use crate::support::TestCluster;
use crate::support::clocks::{Clocks, look_after};
use crate::support::stored::{assert_dense, stored, topic};

/// The dedup keys that are kept, in order.
async fn kept(sql: &Client) -> Vec<String> {
    let keys = "select dedup_key from shardmq.sent_key order by 1";
    sql.query(keys, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_known_for_two_days_and_then_forgotten() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set("12:00").await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let producer = clocks.on(test.cluster.producer("orders")).build().await.unwrap();
    let send = async |key: &str| producer.send(once(key)).await.unwrap();
    let first = send("a").await;
    send("b").await;
    clocks.set("1 day 12:00").await;
    let later = send("c").await;
    clocks.set("2 days 11:59").await;
    look_after(&test).await;
    assert_eq!(
        (send("a").await, kept(&sql).await),
        (first, ["a", "b", "c"].map(Into::into).into())
    );
    clocks.set("2 days 12:01").await;
    // A send that found it did not make it younger.
    let anew = send("a").await;
    assert_eq!(anew.day().yymmdd(), clocks.day(2).await.unsigned_abs());
    assert_eq!((send("a").await, send("c").await), (anew, later));
    look_after(&test).await;
    assert_eq!(kept(&sql).await, ["a", "c"]);
    assert_eq!((send("a").await, send("c").await), (anew, later));
    assert_eq!(texts(&stored(&sql, partition).await), ["a", "b", "c", "a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upkeep_forgets_as_many_as_there_are() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let fill = "insert into shardmq.sent_key
        select 10101, n::text, 1010126112200000001 + n, shardmq.clock() - interval '2 days 1 second'
          from generate_series(1, 25000) n
        union all
        select 10101, 'young', 1010126112200000000, shardmq.clock() - interval '47 hours'";
    sql.batch_execute(fill).await.unwrap();
    look_after(&test).await;
    assert_eq!(kept(&sql).await, ["young"]);
}

/// Whoever is about to store a key anew is passed over, and what is new stays.
#[tokio::test]
async fn upkeep_does_not_take_a_key_that_is_being_stored_anew() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set("12:00").await;
    let partition = topic(&test, "orders", 1).await[0];
    let (sql, other) = (test.sql(0).await, test.sql(0).await);
    let append = format!("select shardmq.append_once({partition}, 'x', 'a')");
    sql.batch_execute(&append).await.unwrap();
    clocks.set("3 days 12:00").await;
    sql.batch_execute(&format!("begin; {append}")).await.unwrap();
    let prune = "set statement_timeout = '5s'; select shardmq.prune_sent_keys(10, shardmq.clock())";
    other.batch_execute(prune).await.unwrap();
    sql.batch_execute("commit").await.unwrap();
    other.batch_execute(prune).await.unwrap();
    assert_eq!(kept(&sql).await, ["a"]);
    sql.batch_execute(&append).await.unwrap();
    assert_eq!(stored(&sql, partition).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_midnight_the_id_of_yesterday_is_returned_and_new_keys_are_todays() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set("23:59:30").await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let builder = || clocks.on(test.cluster.producer("orders")).send_timeout(10 * SECOND);
    let producer = builder().build().await.unwrap();
    let first = producer.send(once("a")).await.unwrap();
    clocks.set("1 day 00:00:30").await;
    // Before the partition is rolled, by one that knows yesterday's table and by one that does not.
    assert_eq!(producer.send(once("a")).await.unwrap(), first);
    let fresh = builder().build().await.unwrap();
    assert_eq!(fresh.send(once("a")).await.unwrap(), first);
    let messages = ["b", "a", "c"].map(once);
    let ids = good(send_together(&test, partition, &producer, messages.into()).await);
    let tomorrow = clocks.day(1).await.unsigned_abs();
    let is_new = |id: &MessageId| id.day().yymmdd() == tomorrow;
    assert!(is_new(&ids[0]) && ids[1] == first && is_new(&ids[2]), "{ids:?}");
    assert_eq!(fresh.send(once("a")).await.unwrap(), first);
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!(texts(&all), ["a", "first", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_for_the_lock_over_midnight_are_stored_in_the_new_day() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set("23:59:50").await;
    let partition = topic(&test, "orders", 1).await[0];
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    let producer = clocks.on(test.cluster.producer("orders")).build().await.unwrap();
    producer.send(once("a")).await.unwrap();
    let lock = format!("begin; select shardmq.lock_partition({partition})");
    holder.batch_execute(&lock).await.unwrap();
    let sends = tokio::spawn({
        let producer = producer.clone();
        async move { producer.send_all(["b", "a", "c"].map(once)).await }
    });
    let waits = || async { crate::support::stored::waiting(&sql, partition).await > 0 };
    crate::support::eventually("an append waits", 20 * SECOND, waits).await;
    clocks.set("1 day 00:00:05").await;
    holder.batch_execute("commit").await.unwrap();
    let ids = good(sends.await.unwrap());
    let days: Vec<u32> = ids.iter().map(|id| id.day().yymmdd()).collect();
    let [today, tomorrow] = [clocks.day(0).await, clocks.day(1).await].map(i32::unsigned_abs);
    assert_eq!(days, [tomorrow, today, tomorrow]);
    assert_dense(&stored(&sql, partition).await);
}
