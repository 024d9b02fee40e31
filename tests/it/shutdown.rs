//! The end of a consumer: nothing new, what is in hand may be answered, all that is answered is
//! committed, and nothing hangs.

use std::time::Duration;

use futures_util::FutureExt;
use shardmq::embedded::StopMode;
use shardmq::{Cluster, ConsumerBuilder, ErrorKind, PartitionId};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::proxy::{Proxy, Rule, cluster_behind_proxy};
use crate::support::reading::{append_texts, cursor, cursors, next, next_text, take, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, database, eventually, own_server, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(10);

async fn filled(messages: usize) -> (TestCluster, Client, PartitionId, i64) {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let first = append_texts(&sql, partition, 0..messages).await;
    (test, sql, partition, first)
}

fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    let builder = cluster.consumer("orders", "g");
    // Only the end commits.
    builder.flush_interval(60 * SECOND)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_deadline_is_too_long_and_no_bound_too_large() {
    let (test, _sql, _, _) = filled(3).await;
    let mut former = consumer(&test.cluster).stream().await.unwrap();
    let mut hand = take(&mut former, 3).await;
    hand.remove(1).ack().unwrap();
    former.shutdown(Duration::ZERO).await.unwrap();
    drop(hand);
    let builder = consumer(&test.cluster).max_acked_runs(usize::MAX).max_unacked(usize::MAX);
    let mut messages = builder.stream().await.unwrap();
    for expected in ["0", "2"] {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected);
        delivery.ack().unwrap();
    }
    within(SOON, "the shutdown", messages.shutdown(Duration::MAX)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_hand_may_be_answered_until_the_deadline_and_nothing_new_comes() {
    let (test, sql, partition, first) = filled(10).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let mut in_hand = take(&mut messages, 4).await;
    let handle = messages.handle();
    let mut ending = Box::pin({
        let handle = handle.clone();
        async move { handle.shutdown(30 * SECOND).await }
    });
    // It has begun, here and now.
    assert!(ending.as_mut().now_or_never().is_none());
    let ending = tokio::spawn(ending);
    // From the moment on at which it begins nothing comes, though six are fetched already.
    let reading = tokio::spawn(async move {
        let mut after = 0;
        while let Some(delivery) = messages.next().await {
            after += usize::from(delivery.is_ok());
        }
        after
    });
    // It waits for what is in hand; from other tasks, and in any order.
    let last = in_hand.pop().unwrap();
    let mut answers = Vec::new();
    for delivery in in_hand.into_iter().rev() {
        answers.push(tokio::spawn(async move { delivery.ack() }));
    }
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
    assert!(!ending.is_finished());
    assert!(cursor(&sql, "g", partition).await.owner.is_some());
    last.ack().unwrap();
    // Long before the deadline, since all is answered.
    let ended = within(SOON, "the shutdown", ending).await.unwrap();
    ended.unwrap();
    let after = within(10 * SECOND, "the end of the stream", reading).await.unwrap();
    assert_eq!(after, 0);
    let left = cursor(&sql, "g", partition).await;
    assert_eq!((left.acked_id, left.owner, left.member), (first + 3, None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_deadline_it_ends_and_what_comes_later_is_refused() {
    let (test, sql, partition, first) = filled(5).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let mut in_hand = take(&mut messages, 3).await;
    in_hand.remove(0).ack().unwrap();
    let began = Instant::now();
    messages.shutdown(SECOND / 2).await.unwrap();
    assert!(began.elapsed() >= SECOND / 2 && began.elapsed() < 10 * SECOND);
    assert!(within(10 * SECOND, "the end", messages.next()).await.is_none());
    for delivery in in_hand {
        assert_eq!(delivery.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::Closed);
    // Idempotent, also by other handles, and at once.
    let again = async {
        messages.shutdown(60 * SECOND).await.unwrap();
        messages.handle().shutdown(60 * SECOND).await.unwrap();
    };
    within(10 * SECOND, "the second shutdown", again).await;
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, first);
    assert!(within(10 * SECOND, "still the end", messages.next()).await.is_none());
}

/// The node's task hangs in a statement and hears of the shutdown late: the stream knows at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_new_comes_though_a_node_is_busy() {
    let (test, proxy) = cluster_behind_proxy().await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let builder = consumer(&test.cluster).flush_interval(SECOND / 100);
    let mut messages = builder.stream().await.unwrap();
    let mut taken = take(&mut messages, 2).await;
    messages.flush().await.unwrap();
    proxy.to_server(Rule::Hold);
    taken.remove(0).ack().unwrap();
    let kept = || proxy.links().iter().any(|link| link.to_server.kept() > 0);
    eventually("a flush is on its way", SOON, async || kept()).await;
    let handle = messages.handle();
    let ending = tokio::spawn(async move { handle.shutdown(SECOND).await });
    eventually("it began", SOON, async || messages.handle().is_shutting_down()).await;
    assert!(messages.next().now_or_never().is_none(), "eight are fetched");
    proxy.to_server(Rule::Pass);
    within(20 * SECOND, "the shutdown", ending).await.unwrap().unwrap();
    assert!(within(10 * SECOND, "the end", messages.next()).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_shutdown_waits_for_the_first() {
    let (test, sql, partition, first) = filled(2).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let delivery = next(&mut messages).await;
    let handle = messages.handle();
    let (one, two) = (handle.clone(), handle);
    let both = tokio::spawn(async move {
        tokio::join!(one.shutdown(30 * SECOND), two.shutdown(Duration::ZERO))
    });
    tokio::task::yield_now().await;
    assert!(cursor(&sql, "g", partition).await.owner.is_some());
    delivery.ack().unwrap();
    let (one, two) = within(SOON, "both", both).await.unwrap();
    one.and(two).unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_without_anything_ends_at_once() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 2).await;
    let one = consumer(&test.cluster).stream().await.unwrap();
    let began = Instant::now();
    one.shutdown(60 * SECOND).await.unwrap();
    // Before it has taken anything, and after it has taken what is empty.
    let two = consumer(&test.cluster).stream().await.unwrap();
    eventually("it has both", SOON, async || two.handle().held_partitions() == 2).await;
    two.shutdown(60 * SECOND).await.unwrap();
    assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_stream_gives_its_partitions_back_though_a_handle_is_kept() {
    let (test, sql, partition, first) = filled(4).await;
    for round in 0..4 {
        let mut messages = consumer(&test.cluster).stream().await.unwrap();
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), round.to_string());
        delivery.ack().unwrap();
        let handle = messages.handle();
        let began = Instant::now();
        drop(messages);
        assert!(began.elapsed() < 10 * SECOND, "the drop waits for nothing");
        eventually("it is free, and committed", SOON, async || {
            let now = cursor(&sql, "g", partition).await;
            now.owner.is_none() && now.acked_id == first + round
        })
        .await;
        within(SOON, "a shutdown", handle.shutdown(SECOND)).await.unwrap();
        assert_eq!(handle.flush().await.unwrap_err().kind(), ErrorKind::Closed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_may_be_dropped_outside_of_any_runtime() {
    let (test, sql, partition, _) = filled(1).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let delivery = next(&mut messages).await;
    std::thread::spawn(move || drop((messages, delivery))).join().unwrap();
    eventually("it is free", SOON, async || cursor(&sql, "g", partition).await.owner.is_none())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_of_the_cluster_ends_its_streams_and_commits() {
    let (test, sql, partition, first) = filled(3).await;
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let mut messages = consumer(&cluster).stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    within(SOON, "the cluster's end", cluster.shutdown()).await;
    let end = async { while messages.next().await.is_some() {} };
    within(SOON, "the stream's end", end).await;
    let late = within(SOON, "a shutdown after it", messages.shutdown(SECOND)).await;
    assert!(late.is_ok());
    let left = cursor(&sql, "g", partition).await;
    assert_eq!((left.acked_id, left.owner), (first, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_dead_server_it_ends_with_an_error_and_does_not_hang() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, 0..3).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let mut taken = take(&mut messages, 2).await;
    taken.remove(0).ack().unwrap();
    server.stop_server(StopMode::Immediate).await.unwrap();
    let outcome = within(20 * SECOND, "the shutdown", messages.shutdown(SECOND / 10)).await;
    assert!(outcome.is_err(), "an acknowledgement is not committed");
    let end = async { while messages.next().await.is_some() {} };
    within(10 * SECOND, "the end", end).await;
    assert_eq!(taken.remove(0).ack().unwrap_err().kind(), ErrorKind::LeaseLost);
}

/// A node that takes connections and says nothing, while another one is well: the one that is well goes
/// on, and in the end neither flush nor shutdown hang.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_falls_silent_holds_nobody_up() {
    let server = shared_server().await;
    let proxy = Proxy::start(server.port()).await;
    let urls = [database(server).await, database(server).await];
    let test = TestCluster::of(vec![urls[0].clone(), proxy.url(&urls[1])]).await;
    let partitions = topic(&test, "orders", 40).await;
    let sql = test.sql(0).await;
    let mut messages = consumer(&test.cluster)
        .prefetch_bytes(64 << 10)
        .poll_interval(SECOND / 10)
        .stream()
        .await
        .unwrap();
    eventually("it has all", SOON, async || messages.handle().held_partitions() == 40).await;
    let quiet = crate::support::client(&urls[1]).await;
    for partition in partitions.iter().filter(|p| p.node().number() == 2) {
        append_texts(&quiet, *partition, ["quiet"]).await;
    }
    take(&mut messages, 20).await.into_iter().for_each(|d| d.ack().unwrap());
    proxy.to_client(Rule::Hold);
    for partition in partitions.iter().filter(|p| p.node().number() == 2) {
        append_texts(&quiet, *partition, ["held"]).await;
    }
    let well: Vec<_> = partitions.iter().filter(|p| p.node().number() == 1).collect();
    let began = Instant::now();
    for round in 0..40 {
        append_texts(&sql, *well[round % 20], ["well"]).await;
        assert_eq!(next_text(&mut messages).await, "well");
    }
    assert!(began.elapsed() < 30 * SECOND, "{:?}", began.elapsed());
    let outcome = within(20 * SECOND, "the shutdown", messages.shutdown(Duration::ZERO)).await;
    assert!(outcome.is_err(), "one node's cursors are not committed");
    assert!(cursors(&sql, "g").await.iter().all(|(_, c)| c.owner.is_none()));
}
