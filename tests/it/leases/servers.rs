//! Servers that restart or are away: members that are well keep what they have, and the rest goes on.

use std::collections::HashMap;
use std::time::Duration;

use shardmq::{Balancer, Cluster, Message, Messages, Outgoing, PartitionId, Producer};
use tokio::time::Instant;
use tracing::Level;

use super::{LEASE, Log, SECOND, SOON, Worker, consumer, owned, shares};
use crate::support::reading::{append_texts, cursors, next, take, text};
use crate::support::said::said;
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, own_server, shared_server};

/// Longer away than a lease and the grace together: all leases are over when the server is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_the_server_healthy_members_keep_what_they_have() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 6).await;
    let log = Log::default();
    let mut workers = Vec::new();
    for _ in 0..3 {
        // Each in a process of its own, as it were.
        let cluster = Cluster::connect(&test.control_url).await.unwrap();
        workers.push(Worker::start(consumer(&cluster), &log).await);
    }
    shares(&workers, &[2, 2, 2]).await;
    let sql = test.sql(0).await;
    let owners = |cursors: Vec<(i32, _)>| -> HashMap<i32, (Option<_>, i64)> {
        let owner = |cursor: &crate::support::reading::Cursor| (cursor.owner, cursor.epoch);
        cursors.iter().map(|(id, cursor)| (*id, owner(cursor))).collect()
    };
    eventually("the node has it so", SOON, async || owned(&sql).await == [2, 2, 2]).await;
    let before = owners(cursors(&sql, "g").await);

    server.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    let down = Instant::now();
    // So long that everybody takes what is free, whoever's it should be.
    let long = 2 * LEASE + 2 * SECOND;
    eventually("all leases are long over", 2 * SOON, async || down.elapsed() > long).await;
    server.start_server().await.unwrap();
    let back = Instant::now();
    let sql = test.sql(0).await;
    for partition in &partitions {
        append_texts(&sql, *partition, [partition]).await;
    }
    eventually("all streams go on", SOON, async || log.lock().unwrap().len() >= 6).await;
    let would_have = async || back.elapsed() > LEASE + 4 * SECOND;
    eventually("whoever wanted to take over would have", SOON, would_have).await;
    assert_eq!(owners(cursors(&sql, "g").await), before);
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_control_database_gone_everybody_keeps_what_they_have() {
    let control = own_server().await;
    let control_url = database(&control).await;
    let node_url = database(shared_server().await).await;
    let cluster = Cluster::connect(&control_url).await.unwrap();
    cluster.add_node(shardmq::NodeId::new(1).unwrap(), &node_url).await.unwrap();
    let test = TestCluster { cluster, control_url, node_urls: vec![node_url] };
    let partitions = topic(&test, "orders", 4).await;
    let log = Log::default();
    let mut workers = Vec::new();
    for _ in 0..2 {
        workers.push(Worker::start(consumer(&test.cluster), &log).await);
    }
    shares(&workers, &[2, 2]).await;
    control.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    let down = Instant::now();
    let sql = test.sql(0).await;
    eventually("heartbeats are long over", 2 * SOON, async || down.elapsed() > 3 * LEASE).await;
    for partition in &partitions {
        append_texts(&sql, *partition, [partition]).await;
    }
    eventually("all is consumed", SOON, async || log.lock().unwrap().len() == 4).await;
    assert_eq!(owned(&sql).await, [2, 2]);
    for worker in workers {
        worker.stop().await;
    }
    assert!(owned(&sql).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_stops_nobody_else_and_its_messages_come_when_it_is_back() {
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 8).await;
    let on = |node: u8| partitions.iter().copied().filter(move |p| p.node().number() == node);
    let sql = [test.sql(0).await, test.sql(1).await];
    for partition in on(2) {
        append_texts(&sql[1], partition, ["late"]).await;
    }
    dying.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    // A budget that the readers of one node alone could fill.
    let builder = consumer(&test.cluster).prefetch_bytes(64 << 10);
    let mut messages = builder.stream().await.unwrap();
    for round in 0..20 {
        for partition in on(1) {
            append_texts(&sql[0], partition, [round]).await;
        }
        for delivery in take(&mut messages, 4).await {
            assert_eq!(text(&delivery), round.to_string());
            delivery.ack().unwrap();
        }
    }
    // What is acknowledged on the living node is committed, though the other does not answer.
    assert!(messages.flush().await.is_ok());
    dying.start_server().await.unwrap();
    for delivery in take(&mut messages, 4).await {
        assert_eq!(text(&delivery), "late");
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let rows = client(&test.node_urls[1]).await;
    assert!(cursors(&rows, "g").await.iter().all(|(_, cursor)| cursor.acked_id > 0));
}

/// Sends to the first node.
struct ToFirst;

impl Balancer for ToFirst {
    fn choose(&self, _: &Outgoing<'_>, open: &[PartitionId]) -> Option<PartitionId> {
        open.iter().copied().find(|partition| partition.node().number() == 1)
    }
}

/// How long messages take, the quickest first, when one after the other is sent for a while.
async fn pace(producer: &Producer, messages: &mut Messages, lasts: Duration) -> Vec<Duration> {
    let (began, mut took) = (Instant::now(), Vec::new());
    while began.elapsed() < lasts {
        let sent = Instant::now();
        producer.send(Message::new("alive")).await.unwrap();
        let delivery = next(messages).await;
        assert_eq!(text(&delivery), "alive");
        delivery.ack().unwrap();
        took.push(sent.elapsed());
    }
    took.sort_unstable();
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_is_told_of_once_slows_nobody_down_and_is_back_by_itself() {
    const GROUP: &str = "node_that_dies";
    let told = |level, message| {
        let of_group = said(level, "group", GROUP);
        of_group.iter().filter(|s| s.has("node", "02") && s.has("message", message)).count()
    };
    let deaths = || told(Level::ERROR, "node in trouble: its partitions pause");
    let returns = || told(Level::INFO, "node is back");
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 4).await;
    let others = partitions.iter().filter(|partition| partition.node().number() == 2);
    let producer = test.cluster.producer("orders").balancer(ToFirst).build().await.unwrap();
    let builder = test.cluster.consumer("orders", GROUP).lease(SECOND);
    let mut messages = builder.poll_interval(SECOND / 5).stream().await.unwrap();
    eventually("it has all", SOON, async || messages.handle().held_partitions() == 4).await;
    let healthy = pace(&producer, &mut messages, SECOND).await;
    let healthy = healthy[healthy.len() / 2];

    for death in 1..=2 {
        dying.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
        // Many looks and renewals; the others' hints are heard, and nothing waits for the next look.
        let took = pace(&producer, &mut messages, 4 * SECOND).await;
        let median = took[took.len() / 2];
        assert!(median < (5 * healthy).max(SECOND / 20), "{healthy:?}, then {median:?}");
        // But for one, in which the machine may have stalled.
        let slow = took.iter().rev().nth(1).is_some_and(|slow| *slow >= 2 * SECOND);
        assert!(!slow, "nobody waits for a node: {took:?}");
        eventually("its death is told", SOON, async || deaths() == death).await;
        assert_eq!(returns(), death - 1);
        dying.start_server().await.unwrap();
        let back = test.sql(1).await;
        for partition in others.clone() {
            append_texts(&back, *partition, ["back"]).await;
        }
        for delivery in take(&mut messages, 2).await {
            assert_eq!(text(&delivery), "back");
            delivery.ack().unwrap();
        }
        eventually("its return is told", SOON, async || returns() == death).await;
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!((deaths(), returns()), (2, 2));
}
