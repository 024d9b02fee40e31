//! Who owns a partition, and what its former owner can still do: nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use shardmq::{Cluster, ConsumerBuilder, ConsumerHandle, ErrorKind, Messages};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::reading::{
    append_texts, cursor, cursors, next, next_error, take, text, texts_until,
};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

/// A partition that is lost, and taken again.
mod losses;
/// A consumer whose network is gone.
mod network_gone;
/// Servers that restart, or are away.
mod servers;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);
/// Who is silent for two thirds of it is left out, so that a machine that stalls for less does no harm.
const LEASE: Duration = Duration::from_secs(4);

fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    let builder = cluster.consumer("orders", "g").lease(LEASE);
    builder.poll_interval(SECOND / 5).flush_interval(SECOND / 5)
}

/// A member that acknowledges all it gets, and what it got.
struct Worker {
    handle: ConsumerHandle,
    task: JoinHandle<()>,
}

type Log = Arc<Mutex<Vec<String>>>;

impl Worker {
    async fn start(builder: ConsumerBuilder, log: &Log) -> Self {
        let mut messages = builder.stream().await.unwrap();
        let (handle, log) = (messages.handle(), Arc::clone(log));
        let task = tokio::spawn(async move {
            while let Some(delivery) = messages.next().await {
                let delivery = delivery.expect("nobody loses a partition here");
                log.lock().unwrap().push(text(&delivery));
                delivery.ack().unwrap();
            }
        });
        Self { handle, task }
    }

    async fn stop(self) {
        self.handle.shutdown(5 * SECOND).await.unwrap();
        self.task.await.unwrap();
    }
}

async fn shares(workers: &[Worker], expected: &[usize]) {
    let held = || -> Vec<usize> {
        let mut held: Vec<_> = workers.iter().map(|w| w.handle.held_partitions()).collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held
    };
    eventually(&format!("shares of {expected:?}"), SOON, async || held() == expected).await;
}

/// How many partitions each member owns, as the node has it.
async fn owned(sql: &Client) -> Vec<usize> {
    let mut by_member: BTreeMap<_, usize> = BTreeMap::new();
    for (_, cursor) in cursors(sql, "g").await {
        if let Some(member) = cursor.member {
            *by_member.entry(member).or_default() += 1;
        }
    }
    let mut counts: Vec<usize> = by_member.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_come_and_go_share_evenly_and_nothing_comes_twice() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 8).await;
    let nodes = [test.sql(0).await, test.sql(1).await];
    let feeding = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let feeder = tokio::spawn({
        let feeding = Arc::clone(&feeding);
        async move {
            let mut sent = 0;
            while feeding.load(std::sync::atomic::Ordering::Relaxed) {
                let partition = partitions[sent % 8];
                let sql = &nodes[usize::from(partition.node().number()) - 1];
                append_texts(sql, partition, sent..sent + 3).await;
                sent += 3;
            }
            sent
        }
    });
    let log = Log::default();
    let mut workers = vec![Worker::start(consumer(&test.cluster), &log).await];
    shares(&workers, &[8]).await;
    workers.push(Worker::start(consumer(&test.cluster), &log).await);
    shares(&workers, &[4, 4]).await;
    workers.push(Worker::start(consumer(&test.cluster), &log).await);
    shares(&workers, &[3, 3, 2]).await;
    workers.remove(0).stop().await;
    shares(&workers, &[4, 4]).await;
    let (first, second) = (test.sql(0).await, test.sql(1).await);
    eventually("the nodes have it so", SOON, async || {
        let both = [owned(&first).await, owned(&second).await].concat();
        both.iter().sum::<usize>() == 8
    })
    .await;

    feeding.store(false, std::sync::atomic::Ordering::Relaxed);
    let sent = feeder.await.unwrap();
    eventually("all is consumed", SOON, async || log.lock().unwrap().len() >= sent).await;
    for worker in workers {
        worker.stop().await;
    }
    let mut seen: Vec<usize> = log.lock().unwrap().iter().map(|t| t.parse().unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..sent).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_member_is_followed_after_its_lease_from_what_it_committed() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let crashing = tokio::runtime::Runtime::new().unwrap();
    let url = test.control_url.clone();
    let handle = crashing.spawn(async move {
        let cluster = Cluster::connect(&url).await.unwrap();
        let builder = consumer(&cluster).flush_interval(60 * SECOND);
        let mut messages = builder.stream().await.unwrap();
        let mut taken = take(&mut messages, 8).await;
        taken.drain(..4).for_each(|delivery| delivery.ack().unwrap());
        messages.flush().await.unwrap();
        // Acknowledged, and not committed: these come again.
        taken.drain(..2).for_each(|delivery| delivery.ack().unwrap());
        (messages, taken)
    });
    let crashed = handle.await.unwrap();
    let before = cursor(&sql, "g", partition).await;
    crashing.shutdown_background();

    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    append_texts(&sql, partition, ["end"]).await;
    let rest = texts_until(&mut messages, "end").await;
    assert_eq!(rest, ["4", "5", "6", "7", "8", "9"]);
    let after = cursor(&sql, "g", partition).await;
    assert_eq!(after.epoch, before.epoch + 1);
    assert_ne!(after.owner, before.owner);
    messages.shutdown(SECOND).await.unwrap();
    drop(crashed);
}

/// A consumer on a runtime that stands still between two steps, as a process that was suspended.
struct Paused {
    steps: mpsc::Sender<Step>,
    thread: std::thread::JoinHandle<()>,
}

type Step = Box<dyn FnOnce(&tokio::runtime::Runtime, &mut Messages) + Send>;

impl Paused {
    fn start(control_url: &str, build: fn(&Cluster) -> ConsumerBuilder) -> Self {
        let (steps, receiver) = mpsc::channel::<Step>();
        let url = control_url.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut messages = runtime.block_on(async {
                let cluster = Cluster::connect(&url).await.unwrap();
                build(&cluster).stream().await.unwrap()
            });
            // Between the steps nothing of this runtime moves.
            while let Ok(step) = receiver.recv() {
                step(&runtime, &mut messages);
            }
            runtime.block_on(messages.shutdown(SECOND)).ok();
        });
        Self { steps, thread }
    }

    /// Lets it run for one step.
    async fn run<T: Send + 'static>(
        &self,
        step: impl FnOnce(&tokio::runtime::Runtime, &mut Messages) -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = tokio::sync::oneshot::channel();
        let step = move |runtime: &_, messages: &mut _| {
            sender.send(step(runtime, messages)).ok().unwrap();
        };
        self.steps.send(Box::new(step)).unwrap();
        answer.await.unwrap()
    }

    async fn end(self) {
        drop(self.steps);
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_owner_wakes_up_to_refusals_and_can_move_nothing() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let paused =
        Paused::start(&test.control_url, |cluster| consumer(cluster).flush_interval(60 * SECOND));
    let (mut taken, acked) = paused
        .run(|runtime, messages| {
            let mut taken = runtime.block_on(take(messages, 9));
            let kept = taken.split_off(7);
            taken.into_iter().for_each(|d| d.ack().unwrap());
            (kept, 7)
        })
        .await;
    assert_eq!(acked, 7);
    let before = cursor(&sql, "g", partition).await;

    // It stands still; another takes over, and is slower.
    let mut successor = consumer(&test.cluster).stream().await.unwrap();
    let first = next(&mut successor).await;
    assert_eq!(text(&first), "0");
    first.ack().unwrap();
    successor.flush().await.unwrap();
    let taken_over = cursor(&sql, "g", partition).await;
    assert_eq!(taken_over.epoch, before.epoch + 1);

    // It wakes up. What it acknowledged before is refused, and what it does now.
    let late = taken.pop().unwrap();
    let (flushed, ended, acked) = paused
        .run(move |runtime, messages| {
            let flushed = runtime.block_on(messages.flush());
            let ended = runtime.block_on(next_error(messages));
            (flushed, ended, late.ack())
        })
        .await;
    assert_eq!(flushed.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(ended.kind(), ErrorKind::LeaseLost);
    assert_eq!(acked.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, taken_over.acked_id);

    for n in 1..10 {
        let delivery = next(&mut successor).await;
        assert_eq!(text(&delivery), n.to_string());
        delivery.ack().unwrap();
    }
    successor.shutdown(SECOND).await.unwrap();
    paused.end().await;
}

/// Otherwise nobody sees at once that it has died, until its next heartbeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_tells_its_session_as_soon_as_it_is_there() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 4).await;
    let sql = test.sql(0).await;
    let mut consumers = Vec::new();
    for _ in 0..30 {
        let cluster = Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap();
        let consumer = cluster.consumer("orders", "g").lease(600 * SECOND);
        consumers.push((consumer.stream().await.unwrap(), cluster));
    }
    let untold = "select count(*) from shardmq_control.member where session is null";
    let told = async || sql.query_one(untold, &[]).await.unwrap().get::<_, i64>(0) == 0;
    eventually("all have told it", SOON, told).await;
}
