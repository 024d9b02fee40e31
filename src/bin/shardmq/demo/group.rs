//! The demo's group of three, and the crash: one member is a process that gets SIGKILL while it has
//! partitions, messages in hand, and acknowledgements not yet committed.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use indicatif::ProgressBar;
use shardmq::{Cluster, ConsumerBuilder, ConsumerHandle, ErrorKind, Messages};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::TOPIC;
use super::record::{Member, Record, lock};
use super::workload::Order;
use crate::failure::{FAILED, Failure};
use crate::output::{note, progress};

const GROUP: &str = "demo";
/// Short, so that the takeover is soon.
const LEASE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long nothing may come before the wait is given up.
const STALLED: Duration = Duration::from_secs(20);
const SHUTDOWN: Duration = Duration::from_secs(5);
/// The member that is a process of its own.
const DOOMED: Member = 0;

/// How each member of the group consumes.
pub(super) fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    cluster.consumer(TOPIC, GROUP).lease(LEASE)
}

/// Where the servers are, passwords included.
#[derive(Clone, Copy)]
pub(super) struct Urls<'a> {
    pub(super) control: &'a str,
    pub(super) redis: Option<&'a str>,
}

/// A group with all its members.
pub(super) struct Group {
    doomed: Child,
    /// To drop it ends that process too.
    _stdin: Option<ChildStdin>,
    reading: JoinHandle<()>,
    here: Vec<ConsumerHandle>,
    record: Arc<Mutex<Record>>,
    bar: ProgressBar,
}

impl Group {
    /// The process joins first, then two members here; returns when all three have partitions.
    pub(super) async fn join(
        cluster: &Cluster,
        urls: Urls<'_>,
        record: &Arc<Mutex<Record>>,
        messages: u32,
    ) -> Result<Self, Failure> {
        let mut doomed = start_process(urls, messages / 10)?;
        let stdin = doomed.stdin.take();
        let stdout = doomed.stdout.take().ok_or_else(|| Failure::new(FAILED, "no pipe"))?;
        let reading = tokio::spawn(read_process(stdout, Arc::clone(record)));
        let mut group = Self {
            doomed,
            _stdin: stdin,
            reading,
            here: Vec::new(),
            record: Arc::clone(record),
            bar: progress(u64::from(messages), "consumed"),
        };
        group
            .until("the first member consumes", |group| lock(&group.record).distinct() > 0)
            .await?;
        for member in 1..=2 {
            let messages = consumer(cluster).stream().await?;
            group.here.push(messages.handle());
            tokio::spawn(consume(messages, member, Arc::clone(record)));
        }
        group.until("all members have partitions", Self::is_shared).await?;
        Ok(group)
    }

    fn is_shared(&self) -> bool {
        self.here.iter().all(|handle| handle.held_partitions() > 0)
    }

    /// Kills the process in the middle of its work.
    pub(super) async fn crash(mut self) -> Result<Crashed, Failure> {
        self.doomed.start_kill()?;
        self.doomed.wait().await?;
        // What it wrote before it died is still in the pipe.
        let _ = (&mut self.reading).await;
        Ok(Crashed(self))
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<(), Failure> {
        let began = Instant::now();
        while !holds(self) {
            if began.elapsed() > STALLED {
                return Err(Failure::new(FAILED, format!("gave up waiting until {what}")));
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

/// The group without the member that died.
pub(super) struct Crashed(Group);

impl Crashed {
    pub(super) fn delivered_by_dead(&self) -> u64 {
        lock(&self.0.record).of_member(DOOMED)
    }

    /// Waits until so many different messages were delivered, or nothing comes any more.
    pub(super) async fn wait_for(&self, messages: u64) {
        let (mut last, mut since) = (0, Instant::now());
        while since.elapsed() < STALLED {
            let distinct = lock(&self.0.record).distinct();
            self.0.bar.set_position(distinct);
            if distinct >= messages {
                break;
            }
            if distinct != last {
                (last, since) = (distinct, Instant::now());
            }
            sleep(LOOK_EVERY).await;
        }
        self.0.bar.finish_and_clear();
    }

    /// The members here acknowledge and leave.
    pub(super) async fn leave(self) -> Result<(), Failure> {
        for handle in &self.0.here {
            handle.shutdown(SHUTDOWN).await?;
        }
        Ok(())
    }
}

/// Consumes in this process until the stream ends.
async fn consume(mut messages: Messages, member: Member, record: Arc<Mutex<Record>>) {
    while let Some(received) = messages.next().await {
        let acked = received.and_then(|delivery| {
            let order: Order = delivery.json()?;
            let mut record = lock(&record);
            record.deliver(member, delivery.id(), order.number);
            if order.is_timed {
                record.took(order.age());
            }
            drop(record);
            delivery.ack()
        });
        match acked {
            // The partition is another member's now.
            Err(error) if error.kind() == ErrorKind::LeaseLost => {}
            Err(error) => note(&format!("warning: {}", error.chain())),
            Ok(()) => {}
        }
    }
}

fn start_process(urls: Urls<'_>, per_second: u32) -> Result<Child, Failure> {
    let child = Command::new(std::env::current_exe()?)
        .envs(urls.redis.map(|url| ("SHARDMQ_REDIS_URL", url)))
        .args(["demo-member", "--per-second"])
        .arg(per_second.to_string())
        .env("SHARDMQ_URL", urls.control)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    Ok(child)
}

/// Records what the process writes, until it is dead and its pipe is empty.
async fn read_process(stdout: ChildStdout, record: Arc<Mutex<Record>>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // It may have died in the middle of a line, which it then has not acknowledged.
        let parsed = line
            .split_once(' ')
            .and_then(|(id, number)| Some((id.parse().ok()?, number.parse().ok()?)));
        if let Some((id, number)) = parsed {
            lock(&record).deliver(DOOMED, id, number);
        }
    }
}
