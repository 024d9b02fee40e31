//! An old primary that wakes up after its standby was promoted, or is started again, takes writes.
//! It is noticed, left, and told.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, ErrorKind, Message, Messages, NodeId, PartitionId};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tracing::Level;

use crate::support::reading::next;
use crate::support::said::{Said, said};
use crate::support::senders::Senders;
use crate::support::signals::signal_all;
use crate::support::standbys::Replicated;
use crate::support::stored::{all_stored, topic};
use crate::support::{
    TestCluster, client, database, eventually, own_server, shared_server, within,
};

const SOON: Duration = Duration::from_secs(20);

/// A node on a primary with two standbys.
struct Split {
    servers: Replicated,
    test: TestCluster,
    partitions: Vec<PartitionId>,
}

impl Split {
    /// The control database is elsewhere.
    async fn start(synchronous: &str) -> Self {
        let control = database(shared_server().await).await;
        Self::of(Replicated::start(synchronous).await, control).await
    }

    async fn of(servers: Replicated, control_url: String) -> Self {
        let cluster = Cluster::connect(&control_url).await.unwrap();
        cluster.add_node(NodeId::new(1).unwrap(), &servers.url).await.unwrap();
        let node_urls = vec![servers.url.clone()];
        let test = TestCluster { cluster, control_url, node_urls };
        let partitions = topic(&test, "orders", 4).await;
        Self { servers, test, partitions }
    }

    /// The primary is suspended, its first standby promoted, and the primary woken.
    async fn split(&self) {
        signal_all(&self.servers.primary, "STOP").await;
        self.servers.promote().await;
        signal_all(&self.servers.primary, "CONT").await;
    }

    /// Another process, which looks after nothing.
    async fn another(&self) -> Cluster {
        Cluster::builder(&self.test.control_url).upkeep(false).connect().await.unwrap()
    }

    async fn new_primary(&self) -> Client {
        self.servers.sql(&self.servers.standbys[0]).await
    }

    /// The texts on a server.
    async fn texts(&self, sql: &Client) -> HashSet<String> {
        let stored = all_stored(sql, &self.partitions).await;
        stored.iter().map(|stored| stored.text().to_owned()).collect()
    }

    /// Waits until something of this name and phase is on the new primary.
    async fn arrives(&self, sql: &Client, beginning: &str) {
        let there = async || self.texts(sql).await.iter().any(|text| text.starts_with(beginning));
        eventually(&format!("the new primary has {beginning}"), SOON, there).await;
    }

    /// What was told of the old primary.
    fn told(&self) -> Vec<Said> {
        let old = format!("127.0.0.1:{}", self.servers.primary.port());
        let told = said(Level::ERROR, "alert", "split_brain");
        told.into_iter().filter(|said| said.has("older", &old)).collect()
    }
}

/// Reads and acknowledges all that comes. What is lost with an old primary is news, and not the
/// end.
fn read_on(mut messages: Messages) -> (Arc<Mutex<HashSet<String>>>, JoinHandle<()>) {
    let read: Arc<Mutex<HashSet<String>>> = Arc::default();
    let seen = Arc::clone(&read);
    let task = tokio::spawn(async move {
        while let Some(came) = messages.next().await {
            if let Ok(delivery) = came {
                let text = String::from_utf8(delivery.payload().to_vec()).unwrap();
                seen.lock().unwrap().insert(text);
                let _ = delivery.ack();
            }
        }
    });
    (read, task)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_processes_leave_an_old_primary_that_wakes_up() {
    all_leave(Split::start("").await).await;
}

/// Each process follows the control database, which has two primaries too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_processes_leave_an_old_primary_that_has_the_control_database_too() {
    let servers = Replicated::start("").await;
    let control = servers.url.clone();
    all_leave(Split::of(servers, control).await).await;
}

async fn all_leave(split: Split) {
    let another = split.another().await;
    let producer = split.test.cluster.producer("orders").build().await.unwrap();
    let anothers = another.producer("orders").build().await.unwrap();
    let (senders, others) = (Senders::start(&producer, "a"), Senders::start(&anothers, "b"));
    let messages = split.test.cluster.consumer("orders", "g").stream().await.unwrap();
    let (read, reading) = read_on(messages);
    senders.go_on(200).await;
    others.go_on(200).await;
    split.split().await;
    let sql = split.new_primary().await;
    senders.enter(1);
    others.enter(1);
    split.arrives(&sql, "a 1").await;
    eventually("the old primary is told", SOON, async || !split.told().is_empty()).await;
    // Of the process that told it from now on, of another one once that has heard.
    senders.enter(2);
    split.arrives(&sql, "b 1").await;
    others.enter(2);
    senders.go_on(200).await;
    others.go_on(200).await;
    let fresh = split.another().await;
    let fresh = fresh.producer("orders").build().await.unwrap();
    within(SOON, "the id", fresh.send(Message::new("fresh"))).await.unwrap();
    let acknowledged: Vec<_> = [senders.end().await, others.end().await].concat();
    let stored = split.texts(&sql).await;
    assert!(stored.contains("fresh"));
    let late = |text: &str| text.starts_with("a 2") || text.starts_with("b 2");
    let lost: Vec<_> =
        acknowledged.iter().filter(|sent| late(&sent.1) && !stored.contains(&sent.1)).collect();
    assert!(lost.is_empty(), "{} are lost: {lost:?}", lost.len());
    let arrived = async || {
        let read = read.lock().unwrap().clone();
        stored.iter().filter(|text| late(text)).all(|text| read.contains(text))
    };
    eventually("all is delivered", 2 * SOON, arrived).await;
    let old = split.servers.sql(&split.servers.primary).await;
    let listen = "select count(*) from pg_stat_activity
                   where application_name like any (array['shardmq topology %', 'shardmq listen %', 'shardmq relay'])";
    let none = async || old.query_one(listen, &[]).await.unwrap().get::<_, i64>(0) == 0;
    eventually("nobody listens to the old primary", SOON, none).await;
    assert_eq!(split.told().len(), 1, "{:?}", split.told());
    reading.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_leave_an_old_primary_whose_commits_hang() {
    let split = Split::start("ANY 1 (s1, s2)").await;
    let producer = split.test.cluster.producer("orders").build().await.unwrap();
    let mut messages = split.test.cluster.consumer("orders", "g").stream().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.flush().await.unwrap();
    split.servers.standbys[1].stop_server(StopMode::Fast).await.unwrap();
    split.split().await;
    let (read, reading) = read_on(messages);
    let fresh = split.another().await.producer("orders").build().await.unwrap();
    within(2 * SOON, "the id", fresh.send(Message::new("fresh"))).await.unwrap();
    let arrived = async || read.lock().unwrap().contains("fresh");
    eventually("it is delivered", SOON, arrived).await;
    within(SOON, "the id", producer.send(Message::new("after"))).await.unwrap();
    let stored = split.texts(&split.new_primary().await).await;
    assert!(stored.contains("fresh") && stored.contains("after"), "{stored:?}");
    eventually("the old primary is told", SOON, async || !split.told().is_empty()).await;
    reading.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_primary_that_is_started_again_is_refused_until_it_is_registered_anew() {
    let split = Split::start("").await;
    let producer = split.test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    split.servers.primary.stop_server(StopMode::Immediate).await.unwrap();
    split.servers.promote().await;
    within(2 * SOON, "the id", producer.send(Message::new("after"))).await.unwrap();
    let control = client(&split.test.control_url).await;
    let timeline = "select timeline from shardmq_control.node";
    let noted = async || control.query_one(timeline, &[]).await.unwrap().get::<_, i64>(0) == 2;
    eventually("the timeline is noted", SOON, noted).await;
    // It is the first of the address.
    split.servers.primary.start_server().await.unwrap();
    let fresh = split.another().await;
    let fresh_producer = fresh.producer("orders").build().await.unwrap();
    within(SOON, "the id", fresh_producer.send(Message::new("fresh"))).await.unwrap();
    assert!(split.texts(&split.new_primary().await).await.contains("fresh"));
    eventually("the old primary is told", SOON, async || !split.told().is_empty()).await;

    split.servers.standbys[0].stop_server(StopMode::Immediate).await.unwrap();
    let late = split.another().await;
    let error = within(SOON, "an error", late.lag("orders")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
    assert!(error.chain().contains("timeline 1 where 2 is known"), "{}", error.chain());
    late.add_node(NodeId::new(1).unwrap(), &split.servers.url).await.unwrap();
    let late_producer = late.producer("orders").build().await.unwrap();
    for (producer, text) in [(&late_producer, "restored"), (&producer, "running")] {
        within(2 * SOON, "the id", producer.send(Message::new(text))).await.unwrap();
    }
    let stored = split.texts(&split.servers.sql(&split.servers.primary).await).await;
    assert!(stored.contains("restored") && stored.contains("running"), "{stored:?}");
}

/// Where the functions that tell it may not be called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_timeline_all_goes_on_and_nothing_is_compared() {
    let server: Server = own_server().await;
    let admin = client(&server.url("postgres")).await;
    for statement in ["create role app login", "create database shop owner app"] {
        admin.batch_execute(statement).await.unwrap();
    }
    client(&server.url("shop"))
        .await
        .batch_execute("revoke execute on function pg_walfile_name(pg_lsn) from public")
        .await
        .unwrap();
    let url = server.url("shop").replace("://shardmq", "://app");
    for schema in [Schema::Control, Schema::Node] {
        migrate(&url, schema).await.unwrap();
    }
    let test = TestCluster::of(vec![url]).await;
    let noted = "select timeline from shardmq_control.node";
    let noted: Option<i64> = test.sql(0).await.query_one(noted, &[]).await.unwrap().get(0);
    assert_eq!(noted, None);
    topic(&test, "orders", 1).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("one")).await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.flush().await.unwrap();
}
