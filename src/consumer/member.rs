//! What a consumer does on one node: keeps its lease, takes and gives partitions, commits cursors,
//! looks for what no hint told.
//!
//! ```text
//!           acquire                 drain (surplus, shutdown)
//! free ───────────────> held ───────────────────────────────> flush, release ─> free
//!                        │
//!                        └── another took it (lease over) ─> lost: acks and flushes are refused
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use uuid::Uuid;

use crate::consumer::Shared;
use crate::consumer::holding::Holding;
use crate::consumer::roster::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::notifier::{Hint, Hints};
use crate::store::connect::refused;
use crate::store::{fetch, group};

/// What a member is told.
pub(crate) enum Command {
    /// Commit what is acknowledged.
    Flush(oneshot::Sender<Result<()>>),
    /// The share has changed.
    Rebalance(oneshot::Sender<Result<()>>),
    /// A reader found that the server lacks what it has read.
    TailLost { partition: PartitionId, owner: Uuid },
    /// Give everything back: when all is answered, or at the deadline.
    Stop { until: Instant, reply: oneshot::Sender<Result<()>> },
}

/// How long a statement of a member may take.
pub(super) const STATEMENT: Duration = Duration::from_secs(5);
/// How often a member that has less than its share tries for more.
const ACQUIRE_INTERVAL: Duration = Duration::from_secs(1);
/// How soon a renewal that failed is tried again.
const RENEW_AGAIN: Duration = Duration::from_millis(500);
/// How soon a member tries again to renew, after it found another server.
const UNSETTLED: Duration = Duration::from_millis(100);

pub(super) struct Member {
    pub(super) shared: Arc<Shared>,
    pub(super) node: NodeId,
    pub(super) partitions: Vec<i32>,
    pub(super) holdings: HashMap<PartitionId, Arc<Holding>>,
    /// Partitions being given up, until they are answered.
    pub(super) draining: JoinSet<Arc<Holding>>,
    /// When the lease was renewed last.
    pub(super) renewed: Option<Instant>,
    /// Since when it was renewed in time.
    pub(super) kept_since: Option<Instant>,
    /// The server whose log all partitions were last seen on: when it was started.
    pub(super) incarnation: Option<SystemTime>,
    /// Another server has answered, and not all partitions were looked at there.
    pub(super) other_server: bool,
    /// The node knows where the group starts.
    pub(super) started: bool,
    /// Why acknowledgements were not committed since the last flush that told.
    pub(super) uncommitted: Option<Error>,
    failing: bool,
    stop: Option<(Instant, oneshot::Sender<Result<()>>)>,
}

/// Works until it is told to stop.
pub(crate) async fn run(
    shared: Arc<Shared>,
    node: NodeId,
    partitions: Vec<PartitionId>,
    commands: mpsc::UnboundedReceiver<Command>,
) {
    let hints = shared.cluster.inner.notifier.subscribe(&partitions);
    let numbers = partitions.iter().map(|partition| partition.as_i32());
    let mut member = Member {
        partitions: numbers.collect(),
        shared,
        node,
        holdings: HashMap::new(),
        draining: JoinSet::new(),
        renewed: None,
        kept_since: None,
        incarnation: None,
        other_server: false,
        started: false,
        uncommitted: None,
        failing: false,
        stop: None,
    };
    member.run(commands, hints).await;
    member.end().await;
}

impl Member {
    async fn run(&mut self, mut commands: mpsc::UnboundedReceiver<Command>, mut hints: Hints) {
        let options = &self.shared.options;
        let mut flush = patient(options.flush_interval);
        let mut acquire = patient(ACQUIRE_INTERVAL.min(options.lease / 3));
        let (lease, poll) = (options.lease, options.poll_interval);
        let mut renew_at = Instant::now();
        let mut look_at = Instant::now() + jitter(poll);
        let cluster_ends = self.shared.cluster.inner.shutdown.clone();
        while !self.is_done() {
            if self.other_server || self.renewed.is_none() {
                renew_at = renew_at.min(Instant::now() + UNSETTLED);
            }
            tokio::select! {
                () = sleep_until(renew_at) => {
                    let soon = match self.attempt(Work::Renew).await {
                        true if self.other_server => UNSETTLED,
                        true => lease,
                        false => RENEW_AGAIN,
                    };
                    renew_at = Instant::now() + soon.min(lease * 3 / 10);
                }
                _ = acquire.tick(), if self.stop.is_none() => {
                    self.attempt(Work::Balance).await;
                }
                _ = flush.tick() => {
                    self.attempt(Work::Flush).await;
                }
                () = sleep_until(look_at) => {
                    self.attempt(Work::Look).await;
                    look_at = Instant::now() + jitter(poll);
                }
                Some(hint) = hints.next() => self.hear(hint),
                Some(Ok(holding)) = self.draining.join_next() => self.give_back(holding).await,
                Some(command) = commands.recv() => self.obey(command).await,
                () = stopped(&self.holdings, self.stop.as_ref()) => return,
                () = cluster_ends.cancelled() => return,
            }
        }
    }

    /// Told to stop, with nothing left to wait for.
    fn is_done(&self) -> bool {
        self.stop.is_some() && self.holdings.is_empty()
    }

    /// Tries something that may fail and is tried again; says whether it was done.
    async fn attempt(&mut self, work: Work) -> bool {
        let outcome = match work {
            Work::Renew => timeout(STATEMENT, self.renew()).await,
            Work::Balance => timeout(STATEMENT, self.balance()).await,
            Work::Flush => {
                timeout(STATEMENT, self.flush(None)).await.map(|flushed| flushed.map(drop))
            }
            Work::Look => {
                let looked = timeout(STATEMENT, self.look()).await;
                if !matches!(looked, Ok(Ok(()))) {
                    self.wake_all();
                }
                looked
            }
        };
        let late = || {
            let what = format!("node {}: no answer in time", self.node);
            Err(Error::new(ErrorKind::Timeout, what))
        };
        let outcome = outcome.unwrap_or_else(|_| late());
        let done = outcome.is_ok();
        self.note(outcome);
        done
    }

    /// Says once that a node is in trouble, and once that it is well again.
    pub(super) fn note(&mut self, outcome: Result<()>) {
        match outcome {
            Ok(()) if self.failing => {
                self.failing = false;
                tracing::info!(node = %self.node, group = %self.shared.group, "node is back");
            }
            // A partition's trouble, and not the node's; the stream says so.
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::Reset) => {}
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::error!(
                    node = %self.node, group = %self.shared.group, error = %error.chain(),
                    "node in trouble: its partitions pause"
                );
            }
            _ => {}
        }
    }

    /// Asks all partitions at once whether they have something, and wakes the readers of those.
    async fn look(&mut self) -> Result<()> {
        let mut known = Vec::new();
        for holding in self.holdings.values().filter(|holding| holding.is_held()) {
            match holding.position() {
                (Some(day), position) => known.push((holding.partition, day, position)),
                (None, _) => holding.wake.notify_one(),
            }
        }
        for part in known.chunks(fetch::MAX_LOOK) {
            let connection = self.shared.connection(self.node).await?;
            let changed = fetch::look(&connection, part)
                .await
                .map_err(|error| refused(error, &format!("look at node {}", self.node)))?;
            self.wake(&changed);
        }
        Ok(())
    }

    fn hear(&mut self, hint: Hint) {
        match hint {
            Hint::Partitions(partitions) => self.wake(&partitions),
            Hint::Look => self.wake_all(),
        }
    }

    fn wake(&self, partitions: &[PartitionId]) {
        for holding in partitions.iter().filter_map(|partition| self.holdings.get(partition)) {
            holding.wake.notify_one();
        }
    }

    pub(super) fn wake_all(&self) {
        self.holdings.values().for_each(|holding| holding.wake.notify_one());
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Flush(reply) => {
                let done = timeout(STATEMENT, self.flush_through()).await;
                let late =
                    || Err(Error::new(ErrorKind::Timeout, "commit cursors: no answer in time"));
                let _ = reply.send(done.unwrap_or_else(|_| late()));
            }
            Command::TailLost { partition, owner } => {
                self.lose_tail(partition, owner).await;
                self.attempt(Work::Balance).await;
            }
            Command::Rebalance(reply) => {
                self.attempt(Work::Balance).await;
                let _ = reply.send(Ok(()));
            }
            Command::Stop { until, reply } => {
                self.holdings.values().for_each(|holding| holding.drain());
                self.stop = Some((until, reply));
            }
        }
    }

    /// Commits and releases all that is left, and leaves.
    async fn end(mut self) {
        let holdings: Vec<Arc<Holding>> = self.holdings.values().cloned().collect();
        for holding in &holdings {
            holding.end(ErrorKind::LeaseLost);
        }
        let done = timeout(STATEMENT, async {
            let flushed = self.flush_through().await;
            let released = self.release(&holdings).await;
            let _ = group::sweep_members(self.shared.connection(self.node).await?).await;
            let connection = self.shared.connection(self.node).await?;
            let left = group::leave(connection, self.shared.member).await;
            flushed.and(released).and(left.map_err(|error| refused(error, "end the lease")))
        });
        let outcome = done.await.unwrap_or_else(|_| {
            let what = format!("commit acknowledgements on node {}: no answer", self.node);
            Err(Error::new(ErrorKind::Timeout, what))
        });
        if let Some((_, reply)) = self.stop {
            let _ = reply.send(outcome);
        }
    }
}

/// What a member does from time to time.
#[derive(Clone, Copy)]
enum Work {
    Renew,
    Balance,
    Flush,
    Look,
}

/// An interval that does not catch up on ticks it missed.
fn patient(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// After a stop: all that was handed out is answered, or the deadline is over.
async fn stopped<T>(holdings: &HashMap<PartitionId, Arc<Holding>>, stop: Option<&(Instant, T)>) {
    let Some((deadline, _)) = stop else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = join_all(holdings.values().map(|holding| holding.drained())) => {}
        () = sleep_until(*deadline) => {}
    }
}
