//! The network of one consumer is gone: nothing arrives that it sends or should hear, no connection
//! ends, and nobody tells it.
//!
//! ```text
//! cut ── its lease lasts, it works on what it has ── its lease is over here ─ on the node: taken over
//!                                                    it hands nothing out
//! ```

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use shardmq::{Cluster, Delivery, ErrorKind, Messages, PartitionId, RetryPolicy};
use tokio::time::Instant;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{SECOND, SOON, consumer};
use crate::support::proxy::{Proxy, Rule};
use crate::support::reading::{append_texts, cursors, next, take, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, shared_server, within};

/// The default.
const LEASE: Duration = Duration::from_secs(10);
/// Of scheduling, on top of that.
const MARGIN: Duration = Duration::from_secs(8);

/// A cluster, and a process that has a way of its own to all of it.
struct Setting {
    test: TestCluster,
    sql: Client,
    partitions: Vec<PartitionId>,
    way: Proxy,
    far: Cluster,
}

impl Setting {
    async fn new(partitions: usize) -> Self {
        let way = Proxy::start(shared_server().await.port()).await;
        let test = TestCluster::new(1).await;
        let partitions = topic(&test, "orders", partitions).await;
        let sql = test.sql(0).await;
        let role = format!("far_{}", Uuid::new_v4().simple());
        let far_url = way.url(&test.control_url).replace("//shardmq@", &format!("//{role}@"));
        address_for(&sql, &role, &far_url).await;
        let far = Cluster::builder(&far_url).upkeep(false).connect().await.unwrap();
        Self { test, sql, partitions, way, far }
    }

    /// For what passes on its way from now on, both ways, on new connections too.
    fn network(&self, rule: Rule) {
        self.way.to_server(rule);
        self.way.to_client(rule);
    }

    /// Appends so many rows of four to each partition; returns the texts.
    async fn append(&self, name: &str, rows: usize) -> Vec<String> {
        let mut all = Vec::new();
        for partition in &self.partitions {
            for row in 0..rows {
                let texts = (0..4).map(|n| format!("{name} {partition} {row} {n}"));
                let texts: Vec<_> = texts.collect();
                append_texts(&self.sql, *partition, &texts).await;
                all.extend(texts);
            }
        }
        all
    }

    /// Where the group is, by partition: whoever has them.
    async fn positions(&self) -> Vec<(i64, String)> {
        let all = cursors(&self.sql, "g").await;
        all.into_iter().map(|(_, cursor)| (cursor.acked_id, cursor.acked_ahead)).collect()
    }

    /// Waits until one member has all, on the node.
    async fn taken_over(&self, by: Uuid, deadline: Duration) {
        let all = async || {
            let all = cursors(&self.sql, "g").await;
            all.iter().all(|(_, cursor)| cursor.member == Some(by))
        };
        eventually("the other has all", deadline, all).await;
    }

    /// Waits until nothing is on its way to the server any more, and the server has ended all
    /// sessions of connections that were given up: it has come to the end of what they sent. What
    /// it answers is to be held: a link ends where nobody is there to take it.
    async fn all_arrived(&self) {
        let links = self.way.links();
        let done = async || {
            links.iter().all(|link| {
                let given_up = link.to_server.ended();
                link.to_server.kept() == 0 && (!given_up || link.to_client.ended())
            })
        };
        eventually("all that was held arrives", SOON, done).await;
    }
}

/// One address is recorded for all. A process with this role reads another one.
async fn address_for(sql: &Client, role: &str, url: &str) {
    let view = format!(
        "create role {role} superuser login;
         alter table shardmq_control.node rename to node_of_all;
         create view shardmq_control.node as
             select node, case when session_user = '{role}' then '{url}' else dsn end as dsn,
                    registration, system_identifier, timeline
               from shardmq_control.node_of_all"
    );
    sql.batch_execute(&view).await.unwrap();
}

async fn even_shares(one: &Messages, two: &Messages) {
    let (one, two) = (one.handle(), two.handle());
    let even = async || one.held_partitions() == 2 && two.held_partitions() == 2;
    eventually("each has its share", 2 * SOON, even).await;
}

fn ack_all(deliveries: Vec<Delivery>, done: &mut Vec<String>) {
    for delivery in deliveries {
        done.push(text(&delivery));
        delivery.ack().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_partitions_are_taken_over_its_late_commits_refused_and_it_comes_back() {
    let setting = Setting::new(4).await;
    let far = setting.far.consumer("orders", "g").flush_interval(60 * SECOND);
    let mut far = far.stream().await.unwrap();
    let mut near = setting.test.cluster.consumer("orders", "g").stream().await.unwrap();
    even_shares(&far, &near).await;
    let mut sent = setting.append("before", 5).await;
    let mut done = Vec::new();
    ack_all(take(&mut near, 40).await, &mut done);
    near.flush().await.unwrap();
    ack_all(take(&mut far, 8).await, &mut done);
    far.flush().await.unwrap();
    take(&mut far, 8).await.into_iter().for_each(|uncommitted| uncommitted.ack().unwrap());
    // One of the last row: the rest of it is fetched for certain.
    let mut in_hand = take(&mut far, 21).await;

    setting.network(Rule::Hold);
    let cut = Instant::now();
    let handle = far.handle();
    let late_commit = tokio::spawn(async move { handle.flush().await });
    in_hand.push(next(&mut far).await);
    setting.taken_over(near.handle().member(), LEASE + MARGIN).await;
    assert!(far.next().now_or_never().is_none(), "handed out after {:?}", cut.elapsed());
    let told = within(SOON, "the flush", late_commit).await.unwrap();
    assert_eq!(told.unwrap_err().kind(), ErrorKind::Timeout);
    let again = take(&mut near, 32).await;
    assert!(far.next().now_or_never().is_none(), "handed out after {:?}", cut.elapsed());
    let before = setting.positions().await;

    setting.way.to_server(Rule::Pass);
    setting.all_arrived().await;
    assert_eq!(setting.positions().await, before, "what came late moves nothing");
    assert!(far.next().now_or_never().is_none(), "it hears nothing yet");
    setting.network(Rule::Pass);
    let news = within(SOON, "news", far.next()).await.unwrap();
    assert_eq!(news.unwrap_err().kind(), ErrorKind::LeaseLost);
    for lost in in_hand {
        within(SOON, "it is told", lost.revoked().cancelled()).await;
        assert_eq!(lost.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    assert_eq!(far.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(setting.positions().await, before, "nothing of it was moved");

    ack_all(again, &mut done);
    near.flush().await.unwrap();
    let news = within(SOON, "news of the other partition", far.next()).await.unwrap();
    assert_eq!(news.unwrap_err().kind(), ErrorKind::LeaseLost);
    even_shares(&far, &near).await;
    sent.extend(setting.append("after", 1).await);
    ack_all(take(&mut far, 8).await, &mut done);
    ack_all(take(&mut near, 8).await, &mut done);
    far.shutdown(SECOND).await.unwrap();
    near.shutdown(SECOND).await.unwrap();
    sent.sort_unstable();
    done.sort_unstable();
    assert_eq!(done, sent, "each was committed once");
}

/// Nobody takes its partition: it goes on with what it had in hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_handler_failed_at_is_not_tried_again_until_the_lease_is_renewed() {
    let setting = Setting::new(1).await;
    setting.append("fails", 1).await;
    let policy = RetryPolicy::fixed(SECOND / 10).for_ever();
    let builder = consumer(&setting.far).lease(SECOND).retry_policy(policy);
    let messages = builder.stream().await.unwrap();
    let handle = messages.handle();
    let calls: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let called = Arc::clone(&calls);
    let running = tokio::spawn(messages.run(1, move |_| {
        called.lock().unwrap().push(Instant::now());
        std::future::ready(Err::<(), _>("as always"))
    }));
    eventually("it is tried", SOON, async || !calls.lock().unwrap().is_empty()).await;

    setting.network(Rule::Hold);
    let cut = Instant::now();
    eventually("it would be tried again", SOON, async || cut.elapsed() > 10 * SECOND).await;
    let back = Instant::now();
    setting.network(Rule::Pass);
    let again = async || calls.lock().unwrap().iter().any(|call| *call > back);
    eventually("it is tried again", SOON, again).await;
    // The lease of a second, and some for a busy machine to notice.
    let over = cut + 4 * SECOND;
    let calls = calls.lock().unwrap().clone();
    let late = calls.iter().find(|call| (over..back).contains(call));
    assert!(late.is_none(), "cut {cut:?}, back {back:?}: {calls:?}");
    handle.shutdown(Duration::ZERO).await.ok();
    running.await.unwrap();
}
