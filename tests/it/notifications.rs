//! Hints are only hints: with them a message comes at once, without them within the poll interval.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use shardmq::embedded::Server;
use shardmq::notifier::{Health, HealthCell, Hint, Hints, LocalNotifier, Notifier};
use shardmq::testing::NotifierSuite;
use shardmq::{Cluster, Message, Messages, NodeId, PartitionId};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::hints::{arrive, hears, interrupted};
use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::reading::{append_texts, next_text, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, prepared, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(10);
/// Long, where what is tested must not come from a look.
const NEVER: Duration = Duration::from_mins(10);

async fn consume(cluster: &Cluster, poll: Duration) -> Messages {
    let builder = cluster.consumer("orders", "g").poll_interval(poll);
    builder.stream().await.unwrap()
}

async fn listeners(sql: &Client) -> Vec<i32> {
    let rows = sql
        .query(
            "select pid from pg_stat_activity
              where datname = current_database() and application_name like 'shardmq listen %'",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until somebody listens, and all partitions are read to their end.
async fn ready(sql: &Client, messages: &mut Messages, producer: &shardmq::Producer) {
    eventually("somebody listens", SOON, async || listeners(sql).await.len() == 1).await;
    producer.send(Message::new("first")).await.unwrap();
    assert_eq!(next_text(messages).await, "first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_message_comes_at_once_and_not_with_the_next_look() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(&test.cluster, NEVER).await;
    ready(&sql, &mut messages, &producer).await;
    let mut latencies = Vec::new();
    for n in 0..40 {
        let began = Instant::now();
        producer.send(Message::new(n.to_string())).await.unwrap();
        assert_eq!(next_text(&mut messages).await, n.to_string());
        latencies.push(began.elapsed());
    }
    latencies.sort();
    assert!(latencies[20] < SECOND, "{latencies:?}");
    messages.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_listener_comes_back_by_itself_and_misses_nothing() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(&test.cluster, NEVER).await;
    ready(&sql, &mut messages, &producer).await;
    for round in 0..4 {
        let before = listeners(&sql).await;
        sql.query("select pg_terminate_backend($1)", &[&before[0]]).await.unwrap();
        // Nobody sends a hint for this one, and nobody may hear the next one's.
        append_texts(&sql, partition, [format!("silent {round}")]).await;
        producer.send(Message::new(format!("sent {round}"))).await.unwrap();
        assert_eq!(next_text(&mut messages).await, format!("silent {round}"));
        assert_eq!(next_text(&mut messages).await, format!("sent {round}"));
        eventually("it listens again", SOON, async || {
            let now = listeners(&sql).await;
            now.len() == 1 && now != before
        })
        .await;
    }
    producer.send(Message::new("at once")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "at once");
    messages.shutdown(Duration::ZERO).await.unwrap();
}

/// As a process does that sends something and ends. Its hint is still to be sent then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_message_before_a_shutdown_comes_at_once_too() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(&test.cluster, NEVER).await;
    ready(&sql, &mut messages, &producer).await;
    let notifier = test.cluster.notifier();
    let mut hinted = 0;
    for n in 0..20 {
        let other = Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap();
        let producer = other.producer("orders").build().await.unwrap();
        let id = producer.send(Message::new(n.to_string())).await.unwrap();
        producer.shutdown(SOON).await.unwrap();
        let began = Instant::now();
        other.shutdown().await;
        // A hint that takes a second is not waited for.
        if began.elapsed() < SECOND {
            hinted += 1;
        } else {
            notifier.publish(&[id.partition()]);
        }
        assert_eq!(next_text(&mut messages).await, n.to_string());
    }
    assert!(hinted > 10, "{hinted}");
    messages.shutdown(Duration::ZERO).await.unwrap();
}

/// Carries nothing, after the first look.
#[derive(Debug, Clone, Default)]
struct Deaf(Arc<AtomicBool>);

impl Notifier for Deaf {
    fn publish(&self, _: &[PartitionId]) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn subscribe(&self, _: &[PartitionId]) -> Hints {
        Box::pin(futures_util::stream::iter([Hint::Look]).chain(futures_util::stream::pending()))
    }

    /// It does not know better.
    fn health(&self, _: NodeId) -> Health {
        let health = HealthCell::new();
        health.arrive();
        health.get()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_all_hints_lost_messages_come_within_the_poll_interval() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 40).await;
    let deaf = Deaf::default();
    let builder = Cluster::builder(&test.control_url).notifier(deaf.clone());
    let cluster = builder.connect().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(&cluster, SECOND / 2).await;
    eventually("it has all", SOON, async || messages.handle().held_partitions() == 40).await;
    for n in 0..5 {
        let began = Instant::now();
        let sent = (0..40).map(|m| Message::new(n.to_string()).key(format!("{m}")));
        for result in producer.send_all(sent).await {
            result.unwrap();
        }
        for _ in 0..40 {
            assert_eq!(next_text(&mut messages).await, n.to_string());
        }
        // The interval, a fifth more, and what the machine takes.
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
    assert!(deaf.0.load(Ordering::SeqCst), "hints were given");
    messages.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_sql_users_append_without_a_hint_comes_with_the_next_look() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 40).await;
    let mut messages = consume(&test.cluster, SECOND / 2).await;
    eventually("it has all", SOON, async || messages.handle().held_partitions() == 40).await;
    for partition in partitions {
        append_texts(&sql, partition, [partition]).await;
        let delivery = within(SOON, "the next look", messages.next()).await;
        let delivery = delivery.unwrap().unwrap();
        assert_eq!(text(&delivery), partition.to_string());
        delivery.ack().unwrap();
        if partition.table() > 4 {
            break;
        }
    }
    messages.shutdown(Duration::ZERO).await.unwrap();
}

/// A commit that notifies takes one lock for the whole server, so that what appends must not. The
/// server's log tells which transaction did what.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_have_transactions_of_their_own() {
    let builder = Server::builder().durable(false);
    let builder = builder.setting("log_statement", "all");
    let server = prepared(builder.setting("log_line_prefix", "=%v= ")).await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let notifier = test.cluster.notifier();
    let mut hints = notifier.subscribe(&[partition]);
    arrive(&mut hints).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for n in 0..10 {
        producer.send(Message::new(n.to_string())).await.unwrap();
        hears(&mut hints, partition).await;
    }
    let log = server.log();
    // An entry begins with its transaction; a statement may go on over lines.
    let transactions = |statement: &str| -> BTreeSet<String> {
        let entries = log.split("\n=").filter(|entry| entry.contains(statement));
        let id = |entry: &str| entry.split('=').next().map(str::to_owned);
        entries.filter_map(id).collect()
    };
    let appends = transactions("insert into shardmq.batch_");
    let notifies = transactions("pg_notify");
    assert!(appends.len() >= 10 && !notifies.is_empty(), "{appends:?} {notifies:?}");
    assert!(appends.is_disjoint(&notifies));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_local_notifier_conforms() {
    let notifier = LocalNotifier::new();
    let suite = NotifierSuite::new(notifier.clone(), notifier, partition_of(1));
    suite.check().await.unwrap();
}

fn partition_of(node: u8) -> PartitionId {
    PartitionId::new(node, 1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_postgres_notifier_conforms_within_and_between_processes() {
    let test = TestCluster::new(2).await;
    let other = Cluster::connect(&test.control_url).await.unwrap();
    let (one, two) = (test.cluster.notifier(), other.notifier());
    NotifierSuite::new(Arc::clone(&one), two, partition_of(1)).check().await.unwrap();
    NotifierSuite::new(Arc::clone(&one), one, partition_of(2)).check().await.unwrap();
}

/// What a network does that forgets a connection: both ends think that it is open, and nothing passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_fell_silent_is_found_and_made_anew_and_looks_go_on_meanwhile() {
    let (test, proxy) = cluster_behind_proxy().await;
    let partition = topic(&test, "orders", 1).await[0];
    let before = proxy.links().len();
    let mut hints = test.cluster.notifier().subscribe(&[partition]);
    arrive(&mut hints).await;
    let listening = proxy.links().split_off(before);
    let [link] = listening.as_slice() else { panic!("{} connections", listening.len()) };
    let mut messages = consume(&test.cluster, SECOND / 2).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("heard")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "heard");
    hears(&mut hints, partition).await;

    link.to_client.set(Rule::Swallow);
    link.to_server.set(Rule::Swallow);
    let silent = Instant::now();
    producer.send(Message::new("polled")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "polled");
    interrupted(&mut hints).await;
    arrive(&mut hints).await;
    assert!(silent.elapsed() > SECOND, "it was not silent");
    messages.shutdown(Duration::ZERO).await.unwrap();
}
