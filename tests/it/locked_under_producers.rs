//! A day table that somebody has locked under a producer: its partition waits, no other is delayed,
//! and no connections gather. `SHARDMQ_LOCK_SECONDS=20` locks it for longer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use shardmq::{Cluster, Message, MessageId, PartitionId, Producer};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::Client;

use crate::convoy::keys;
use crate::support::pgbouncer::{PgBouncer, Unknown, cluster_through};
use crate::support::stored::{all_stored, assert_acknowledged, table, topic};
use crate::support::{TestCluster, client, database, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);
const PARTITIONS: usize = 6;

/// How long the table is locked.
fn locked_for() -> Duration {
    let seconds = std::env::var("SHARDMQ_LOCK_SECONDS").ok();
    seconds.and_then(|seconds| seconds.parse().ok()).map_or(4 * SECOND, Duration::from_secs)
}

/// What is sent, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    dedup: bool,
    pooled: bool,
    /// Whether the locked partition was written to before.
    warm: bool,
}

/// The producer's sessions on the node, and how many of them wait for a lock: the most that were
/// seen.
#[derive(Debug, Default)]
struct Most {
    sessions: AtomicI64,
    waiting: AtomicI64,
    over: AtomicBool,
}

impl Most {
    async fn watch(self: Arc<Self>, sql: Client) {
        let count = "select count(*) filter (where state <> 'idle'),
                            count(*) filter (where wait_event_type = 'Lock')
                       from pg_stat_activity
                      where datname = current_database() and pid <> pg_backend_pid()
                        and backend_type = 'client backend' and application_name <> 'test'";
        let mut ticks = interval(SECOND / 20);
        while !self.over.load(Ordering::SeqCst) {
            ticks.tick().await;
            let row = sql.query_one(count, &[]).await.unwrap();
            self.sessions.fetch_max(row.get(0), Ordering::SeqCst);
            self.waiting.fetch_max(row.get(1), Ordering::SeqCst);
        }
    }
}

type Sent = (Duration, String, MessageId);

/// Sends that go on, each in a task of its own: what one waits for delays no other.
struct Load {
    way: Way,
    producer: Producer,
    keys: Vec<String>,
    count: usize,
}

impl Load {
    fn send(&mut self, partition: usize) -> impl Future<Output = Sent> + use<> {
        self.count += 1;
        let (text, producer) = (format!("m{}", self.count), self.producer.clone());
        let message = Message::new(text.clone()).key(&self.keys[partition]);
        let message = if self.way.dedup { message.dedup_key(&text) } else { message };
        let sent = Instant::now();
        async move {
            let id = producer.send(message).await.unwrap();
            (sent.elapsed(), text, id)
        }
    }

    /// Fifty messages a second to all partitions but the first, for so long, and some to that one
    /// where it is asked for: its sends are returned under way. Twenty with dedup keys, which take
    /// a commit each.
    async fn run(&mut self, time: Duration, first_too: bool) -> (Vec<Sent>, Vec<JoinHandle<Sent>>) {
        let (begun, mut others, mut first) = (Instant::now(), JoinSet::new(), Vec::new());
        let mut ticks = interval(SECOND / if self.way.dedup { 20 } else { 50 });
        // A machine that was busy makes no burst of what it has missed.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for nth in 0.. {
            ticks.tick().await;
            if begun.elapsed() > time {
                break;
            }
            others.spawn(self.send(1 + nth % (PARTITIONS - 1)));
            if first_too && nth % 5 == 0 {
                first.push(tokio::spawn(self.send(0)));
            }
        }
        let mut sent = within(20 * SECOND, "the other partitions'", others.join_all()).await;
        // In the order in which they were sent.
        sent.sort_by_key(|(_, text, _)| text[1..].parse::<usize>().unwrap());
        (sent, first)
    }
}

fn p99(sent: &[Sent]) -> Duration {
    let mut all: Vec<_> = sent.iter().map(|(latency, ..)| *latency).collect();
    all.sort_unstable();
    all[all.len() * 99 / 100]
}

/// The p99 of the middle one of three parts of the time: a machine that halts once delays one of
/// them, and a lock that others wait for all.
fn p99_of_parts(sent: &[Sent]) -> Duration {
    let mut parts: Vec<_> = sent.chunks(sent.len().div_ceil(3)).map(p99).collect();
    parts.sort_unstable();
    parts[parts.len() / 2]
}

/// A plain connection that does not count.
async fn sql(url: &str) -> Client {
    client(&format!("{url}?application_name=test")).await
}

/// A cluster whose node is apart from the control database, and the node's address past any pooler.
async fn cluster(way: Way) -> (TestCluster, Option<PgBouncer>) {
    let server = shared_server().await;
    if way.pooled {
        // As many server connections as there are of the client's.
        let pooler = PgBouncer::start(server, 4, Unknown::Refused).await;
        let test = cluster_through(server, pooler.port()).await;
        return (test, Some(pooler));
    }
    let (control_url, node_url) = (database(server).await, database(server).await);
    let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
    cluster.add_node(shardmq::NodeId::new(1).unwrap(), &node_url).await.unwrap();
    (TestCluster { cluster, control_url, node_urls: vec![node_url] }, None)
}

async fn lock_today(holder: &Client, partition: PartitionId) {
    let day = holder.query_one("select shardmq.day_of(shardmq.clock())", &[]).await.unwrap();
    let name = table(partition, day.get(0));
    holder
        .batch_execute(&format!("begin; lock table {name} in access exclusive mode"))
        .await
        .unwrap();
}

/// A cluster of its own, with a producer.
struct Side {
    test: TestCluster,
    _pooler: Option<PgBouncer>,
    partitions: Vec<PartitionId>,
    load: Load,
}

impl Side {
    async fn new(way: Way) -> Self {
        let (test, pooler) = cluster(way).await;
        let partitions = topic(&test, "orders", PARTITIONS).await;
        let builder = test.cluster.producer("orders").send_timeout(60 * SECOND);
        let producer = builder.build().await.unwrap();
        let load = Load { way, producer, keys: keys(PARTITIONS), count: 0 };
        Self { test, _pooler: pooler, partitions, load }
    }
}

async fn a_locked_table_delays_its_own_partition_alone(way: Way) {
    let mut side = Side::new(way).await;
    // What else the machine does delays this one as much, and it has no lock.
    let mut twin = Side::new(way).await;
    let url = side.test.node_urls[0].clone();
    let (holder, reader) = (sql(&url).await, sql(&url).await);
    let mut acknowledged = Vec::new();
    let (before, first) = side.load.run(2 * SECOND, way.warm).await;
    for sent in first {
        acknowledged.push(sent.await.unwrap());
    }

    lock_today(&holder, side.partitions[0]).await;
    let most = Arc::new(Most::default());
    let watching = tokio::spawn(Arc::clone(&most).watch(sql(&url).await));
    let time = locked_for();
    let ((during, stuck), (beside, _)) =
        tokio::join!(side.load.run(time, true), twin.load.run(time, true));
    assert!(stuck.iter().all(|sent| !sent.is_finished()), "the table is locked");
    most.over.store(true, Ordering::SeqCst);
    watching.await.unwrap();
    holder.batch_execute("rollback").await.unwrap();
    let released = Instant::now();
    for sent in stuck {
        acknowledged.push(within(5 * SECOND, "what was locked", sent).await.unwrap());
    }
    let (quiet, beside, noisy) = (p99(&before), p99(&beside), p99_of_parts(&during));
    let whole = p99(&during);
    let worst = during.iter().map(|(latency, ..)| *latency).max().unwrap();
    println!(
        "{way:?}: p99 before {quiet:?}, beside {beside:?}, during {noisy:?} ({whole:?} of all), \
         worst {worst:?}, released {:?}, {most:?}",
        released.elapsed()
    );
    assert!(noisy <= quiet.max(beside) + SECOND / 10, "{way:?}: {quiet:?} {beside:?} {noisy:?}");
    assert!(worst <= SECOND + quiet.max(beside), "{way:?}: {worst:?}");
    assert!(most.sessions.load(Ordering::SeqCst) <= 3, "{most:?}");
    assert!(most.waiting.load(Ordering::SeqCst) <= 1, "{most:?}");
    acknowledged.extend(before.into_iter().chain(during));
    let acknowledged: Vec<_> = acknowledged.into_iter().map(|(_, text, id)| (text, id)).collect();
    let all = all_stored(&reader, &side.partitions).await;
    assert_eq!(all.len(), acknowledged.len());
    assert_acknowledged(&all, &acknowledged);
}

const PLAIN: Way = Way { dedup: false, pooled: false, warm: true };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_delays_no_other_partition_of_a_producer() {
    a_locked_table_delays_its_own_partition_alone(PLAIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_that_nothing_was_written_to_delays_no_other_partition() {
    a_locked_table_delays_its_own_partition_alone(Way { warm: false, ..PLAIN }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_delays_no_message_with_a_dedup_key_of_another_partition() {
    a_locked_table_delays_its_own_partition_alone(Way { dedup: true, ..PLAIN }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_delays_no_other_partition_through_a_pooler() {
    a_locked_table_delays_its_own_partition_alone(Way { pooled: true, ..PLAIN }).await;
    let way = Way { dedup: true, pooled: true, warm: false };
    a_locked_table_delays_its_own_partition_alone(way).await;
}
