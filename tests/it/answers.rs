//! Every send has its answer in time, whatever ends or is in use around it.

use std::time::Duration;

use futures_util::future::join_all;
use shardmq::{
    Cluster, ErrorKind, KeyFailover, Message, MessageId, Messages, Producer, ProducerEvent,
    ProducerEvents, RetryPolicy, TopicOptions,
};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::convoy::{keys, lock};
use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::stored::{topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// The first two go together, and wait for a lock. Their writer has a connection left, and waits
/// for work: it ends with the cluster. Then the two have not got the lock, and the second is put
/// back: nobody looks there any more.
#[tokio::test]
async fn a_batch_that_is_put_back_while_its_cluster_ends_has_an_answer() {
    for _ in 0..5 {
        if put_back_while_its_cluster_ends().await {
            return;
        }
    }
    panic!("the machine is too busy");
}

/// Whether it was so. One thread, so that all four are ready at once.
async fn put_back_while_its_cluster_ends() -> bool {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 4).await;
    let (keys, sql) = (keys(4), test.sql(0).await);
    let builder = Cluster::builder(&test.control_url).upkeep(false).connections_per_node(2);
    let cluster = builder.connect().await.unwrap();
    let producer = cluster.producer("orders").send_timeout(3 * SECOND).build().await.unwrap();
    for key in &keys {
        producer.send(Message::new("warm").key(key)).await.unwrap();
    }
    let holder = lock(&test, &partitions[..1]).await;
    let mut receipts = Vec::new();
    for key in &keys {
        receipts.push(producer.enqueue(Message::new("x").key(key)).await.unwrap());
    }
    let waits = || async { waiting(&sql, partitions[0]).await == 1 };
    eventually("the transaction waits for its first lock", 20 * SECOND, waits).await;
    for receipt in receipts.drain(2..) {
        within(20 * SECOND, "one of the other transaction", receipt).await.unwrap();
    }
    let ending = tokio::spawn(async move { cluster.shutdown().await });
    let mut ends = Vec::new();
    for receipt in receipts {
        ends.push(within(20 * SECOND, "an answer", receipt).await);
    }
    holder.batch_execute("rollback").await.unwrap();
    within(20 * SECOND, "the end", ending).await.unwrap();
    let _ = within(20 * SECOND, "the flush", producer.flush()).await;
    assert_eq!(producer.status().buffered_bytes, 0);
    // Stored, it went before the cluster began to end.
    ends[1].as_ref().is_err_and(|error| error.kind() == ErrorKind::Closed)
}

/// As with a producer in a static, across tests that have a runtime each.
#[test]
fn a_producer_whose_runtime_has_ended_says_so_at_once() {
    let first = Runtime::new().unwrap();
    let (cluster, producer, receipts, holder) = first.block_on(async {
        let test = TestCluster::new(1).await;
        let partitions = topic(&test, "orders", 1).await;
        let producer = test.cluster.producer("orders").build().await.unwrap();
        producer.send(Message::new("before")).await.unwrap();
        let holder = lock(&test, &partitions).await;
        let under_way = producer.enqueue(Message::new("under way")).await.unwrap();
        let sql = test.sql(0).await;
        let waits = || async { waiting(&sql, partitions[0]).await == 1 };
        eventually("it waits for the lock", 20 * SECOND, waits).await;
        let waiting = producer.enqueue(Message::new("waiting")).await.unwrap();
        (test.cluster, producer, [under_way, waiting], holder)
    });
    // The lock is held until then: what waits is not sent before.
    drop(first);
    drop(holder);
    Runtime::new().unwrap().block_on(async {
        let [under_way, waiting] = receipts;
        let under_way = within(20 * SECOND, "the one under way", under_way).await;
        if let Err(error) = under_way {
            assert_eq!(error.kind(), ErrorKind::Unknown);
            assert!(error.chain().contains("runtime"), "{}", error.chain());
        }
        let waiting = within(20 * SECOND, "the one that waits", waiting).await.unwrap_err();
        let sent = within(20 * SECOND, "a send", producer.send(Message::new("x"))).await;
        let enqueued = producer.enqueue(Message::new("x")).await.map(drop);
        let flushed = within(20 * SECOND, "a flush", producer.flush()).await;
        let later = producer.deliver_after(SECOND, Message::new("x")).await.map(drop);
        for error in [waiting, sent.unwrap_err(), enqueued.unwrap_err(), flushed.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Closed);
            assert!(error.chain().contains("runtime"), "{}", error.chain());
        }
        assert_eq!(later.unwrap_err().kind(), ErrorKind::Closed);
        let _ = within(20 * SECOND, "the end", producer.shutdown(20 * SECOND)).await;
        within(20 * SECOND, "the cluster's end", cluster.shutdown()).await;
    });
}

/// Each waits for room for as long as a message is tried, and not for all that were before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_longer_for_room_than_a_message_is_tried() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let builder = test.cluster.producer("orders").send_timeout(SECOND).buffer_bytes(0);
    let producer = builder.build().await.unwrap();
    producer.send(Message::new("warm")).await.unwrap();
    let _holder = lock(&test, &partitions).await;
    // One at a time fits.
    let sends = (0..30).map(|_| producer.send(Message::new(vec![b'x'; 60_000])));
    for sent in within(15 * SECOND, "all answers", join_all(sends)).await {
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::Timeout);
    }
}

/// All that was told so far.
async fn told(events: &mut ProducerEvents) -> Vec<ProducerEvent> {
    let mut all = Vec::new();
    while let Ok(Some(event)) = timeout(SECOND / 10, events.next()).await {
        all.push(event);
    }
    all
}

/// What is large takes its time, and says nothing of its node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_message_on_a_slow_line_is_sent_once_and_its_node_stays_up() {
    let (test, proxy) = cluster_behind_proxy().await;
    topic(&test, "orders", 1).await;
    let builder = test.cluster.producer("orders").append_timeout(SECOND / 2);
    let builder = builder.max_payload(usize::MAX).key_failover(KeyFailover::Fail);
    let producer = builder.build().await.unwrap();
    producer.send(Message::new("warm").key("k")).await.unwrap();
    let mut events = producer.events();
    proxy.to_server(Rule::Slow(2 << 20));
    // The last takes longer than a server waits for the rest of a transaction.
    for kib in [1_500, 3_000, 12_000] {
        let message = Message::new(vec![b'x'; kib << 10]).key("k");
        within(20 * SECOND, "a large message", producer.send(message)).await.unwrap();
    }
    let message = Message::new(vec![b'x'; 3_000 << 10]).dedup_key("d");
    within(20 * SECOND, "one with a dedup key", producer.send(message)).await.unwrap();
    let told = told(&mut events).await;
    assert!(!told.iter().any(|it| matches!(it, ProducerEvent::NodeDown { .. })), "{told:?}");
}

/// All connections to a node are busy with other work of this process, which says nothing of the
/// node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_whose_own_connections_are_in_use_waits_and_calls_no_node_dead() {
    let (test, proxy) = cluster_behind_proxy().await;
    topic(&test, "orders", 2).await;
    let keys = keys(2);
    let builder = test.cluster.producer("orders").append_timeout(SECOND / 10);
    let producer = builder.key_failover(KeyFailover::Fail).build().await.unwrap();
    let mut last = None;
    for key in &keys {
        last = Some(producer.send(Message::new("x").key(key)).await.unwrap());
    }
    let read = |id: MessageId| {
        let cluster = test.cluster.clone();
        tokio::spawn(async move { cluster.message(id).await })
    };
    let id = last.unwrap();
    let open = || {
        let mut links = proxy.links();
        links.retain(|link| !link.to_server.ended());
        links
    };
    let both = || async {
        join_all((0..8).map(|_| test.cluster.message(id))).await;
        open().len() == 2
    };
    eventually("both connections are open", 20 * SECOND, both).await;
    let mut events = producer.events();
    proxy.to_client(Rule::Hold);
    let reads = [read(id), read(id)];
    let are_held = || async { open().iter().all(|link| link.to_client.kept() > 0) };
    eventually("both are in use", 20 * SECOND, are_held).await;
    let (one, two) = (Message::new("y").key(&keys[0]), Message::new("y").dedup_key(&keys[1]));
    let mut sends = Box::pin(async { tokio::join!(producer.send(one), producer.send(two)) });
    // For as long as many attempts may take.
    assert!(timeout(SECOND, &mut sends).await.is_err(), "it has no connection");
    proxy.to_client(Rule::Pass);
    let (one, two) = within(20 * SECOND, "the answers", sends).await;
    one.unwrap();
    two.unwrap();
    for read in reads {
        read.await.unwrap().unwrap();
    }
    let told = told(&mut events).await;
    assert!(!told.iter().any(|it| matches!(it, ProducerEvent::NodeDown { .. })), "{told:?}");
}

/// A producer and a consumer with every setting that is a time or a number: each of these.
async fn with_all_settings(
    cluster: &Cluster,
    (time, count, attempts): (Duration, usize, u32),
) -> (Producer, Messages) {
    let producer = cluster
        .producer("orders")
        .max_payload(count.max(100))
        .buffer_bytes(count)
        .send_timeout(time)
        .append_timeout(time)
        .probe_interval(time, time);
    let consumer = cluster
        .consumer("orders", &format!("g{attempts}"))
        .prefetch_messages(count)
        .prefetch_bytes(count)
        .lease(time)
        .poll_interval(time)
        .flush_interval(time)
        .drain_timeout(time)
        .max_unacked(count)
        .max_acked_runs(count)
        .retry_policy(RetryPolicy::exponential(time, time).attempts(attempts));
    (producer.build().await.unwrap(), consumer.stream().await.unwrap())
}

/// Sends of each kind. The shortest send timeout is 10 ms: what is sent may fail then, in time.
async fn send_each_kind(producer: &Producer, time: Duration) {
    let (plain, keyed) = (Message::new("a"), Message::new("b").key("k"));
    for message in [plain, keyed, Message::new("c").dedup_key("d")] {
        let sent = within(20 * SECOND, "a send", producer.send(message)).await;
        if let Err(error) = sent {
            let is_late = matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unknown);
            assert!(time.is_zero() && is_late, "{}", error.chain());
        }
    }
    let later = producer.deliver_after(time, Message::new("later"));
    let later = within(20 * SECOND, "an answer", later).await;
    if !time.is_zero() {
        assert_eq!(later.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

/// Every setting that is a time or a number, at both of its ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_setting_has_a_meaning_at_both_ends() {
    let test = TestCluster::new(1).await;
    for partitions in [0, usize::MAX] {
        let made = test.cluster.create_topic("none", TopicOptions::partitions(partitions)).await;
        assert_eq!(made.unwrap_err().kind(), ErrorKind::Invalid, "{partitions}");
    }
    topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    for (time, count, attempts) in [(Duration::ZERO, 0, 0), (Duration::MAX, usize::MAX, u32::MAX)] {
        let cluster = Cluster::builder(&test.control_url)
            .connections_per_node(count)
            .idle_timeout(time)
            .hint_interval(time)
            .look_interval(time)
            .upkeep(false);
        let cluster = cluster.connect().await.unwrap();
        let (producer, mut messages) = with_all_settings(&cluster, (time, count, attempts)).await;
        send_each_kind(&producer, time).await;
        let by_sql = "select shardmq.append(10101, array['by sql'::bytea])";
        sql.query_one(by_sql, &[]).await.unwrap();
        let delivery = within(20 * SECOND, "a message", messages.next()).await;
        delivery.unwrap().unwrap().retry_after(time, "in due time");
        within(20 * SECOND, "its end", messages.shutdown(time)).await.ok();
        within(20 * SECOND, "the producer's end", producer.shutdown(time)).await.ok();
        within(20 * SECOND, "the cluster's end", cluster.shutdown()).await;
    }
}
