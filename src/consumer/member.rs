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
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use uuid::Uuid;

use crate::consumer::holding::Holding;
use crate::consumer::reader::read;
use crate::consumer::roster::jitter;
use crate::consumer::{Event, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::notifier::{Hint, Hints};
use crate::store::connect::refused;
use crate::store::group::{Fence, Move, Moved};
use crate::store::{fetch, group};

/// What a member is told.
pub(crate) enum Command {
    /// Commit what is acknowledged.
    Flush(oneshot::Sender<Result<()>>),
    /// The share has changed.
    Rebalance(oneshot::Sender<Result<()>>),
    /// A reader found that the server lacks what it has read.
    TailLost { partition: PartitionId, owner: Uuid, silent: bool },
    /// Give everything back: when all is answered, or at the deadline.
    Stop {
        until: Instant,
        reply: oneshot::Sender<Result<()>>,
    },
}

/// How long a statement of a member may take.
const STATEMENT: Duration = Duration::from_secs(5);
/// How often a member that has less than its share tries for more.
const ACQUIRE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a partition that is given up may be in hand.
const DRAIN: Duration = Duration::from_secs(10);
/// How much longer than its lease a partition stays another's for a member that was not there all the
/// time: after a restart of the server all leases may be over, and all members well.
const GRACE: Duration = Duration::from_secs(3);

/// How soon a member tries again to renew, after it found another server.
const UNSETTLED: Duration = Duration::from_millis(100);

struct Member {
    shared: Arc<Shared>,
    node: NodeId,
    partitions: Vec<i32>,
    holdings: HashMap<PartitionId, Arc<Holding>>,
    /// Partitions being given up, until they are answered.
    draining: JoinSet<PartitionId>,
    renewed: Option<Instant>,
    /// Since when the lease was kept without a break.
    kept_since: Option<Instant>,
    /// The server whose log all partitions were last seen on: when it was started.
    incarnation: Option<SystemTime>,
    other_server: bool,
    started: bool,
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
    let member = Member {
        shared,
        node,
        partitions: partitions
            .iter()
            .map(|partition| partition.as_i32())
            .collect(),
        holdings: HashMap::new(),
        draining: JoinSet::new(),
        renewed: None,
        kept_since: None,
        incarnation: None,
        other_server: false,
        started: false,
        failing: false,
        stop: None,
    };
    member.run(commands, hints).await;
}

impl Member {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>, mut hints: Hints) {
        let options = &self.shared.options;
        let mut renew = patient(options.lease * 3 / 10);
        let mut flush = patient(options.flush_interval);
        let mut acquire = patient(ACQUIRE_INTERVAL.min(options.lease / 3));
        let poll = options.poll_interval;
        let mut look_at = Instant::now() + jitter(poll);
        let cluster_ends = self.shared.cluster.inner.shutdown.clone();
        loop {
            let deadline = self.stop.as_ref().map(|(until, _)| *until);
            tokio::select! {
                _ = renew.tick() => {
                    self.attempt(Work::Renew).await;
                    if self.unsettled() {
                        renew.reset_after(UNSETTLED);
                    }
                }
                _ = acquire.tick(), if deadline.is_none() => self.attempt(Work::Balance).await,
                _ = flush.tick() => self.attempt(Work::Flush).await,
                () = sleep_until(look_at) => {
                    self.attempt(Work::Look).await;
                    look_at = Instant::now() + jitter(poll);
                }
                Some(hint) = hints.next() => self.hear(hint),
                Some(Ok(partition)) = self.draining.join_next() => self.give_back(&[partition]).await,
                Some(command) = commands.recv() => self.obey(command).await,
                () = until(deadline) => break,
                () = cluster_ends.cancelled() => break,
            }
            if deadline.is_some()
                && self
                    .holdings
                    .values()
                    .all(|h| h.drained().now_or_never().is_some())
            {
                break;
            }
        }
        self.end().await;
    }

    async fn attempt(&mut self, work: Work) {
        let outcome = match work {
            Work::Renew => timeout(STATEMENT, self.renew()).await,
            Work::Balance => timeout(STATEMENT, self.balance()).await,
            Work::Flush => timeout(STATEMENT, self.flush(None))
                .await
                .map(|done| match done {
                    // The stream says so too.
                    Err(error)
                        if matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::Reset) =>
                    {
                        Ok(())
                    }
                    other => other,
                }),
            Work::Look => {
                let looked = timeout(STATEMENT, self.look()).await;
                if !matches!(looked, Ok(Ok(()))) {
                    self.wake_all();
                }
                looked
            }
        };
        self.note(outcome.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!("node {}: no answer in time", self.node),
            ))
        }));
    }

    /// Whether another server has answered, and not all partitions were looked at there.
    fn unsettled(&self) -> bool {
        self.other_server
    }

    /// Says once that a node is in trouble, and once that it is well again.
    fn note(&mut self, outcome: Result<()>) {
        match outcome {
            Ok(()) if self.failing => {
                self.failing = false;
                tracing::info!(node = %self.node, group = %self.shared.group, "node is back");
            }
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

    async fn renew(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let connection = shared.connection(self.node).await?;
        let asked = Instant::now();
        let lease = shared.options.lease.as_secs_f64();
        let renewed =
            group::renew(connection, shared.member, &shared.group, lease, self.incarnation)
                .await
                .map_err(|error| refused(error, &format!("renew the lease on node {}", self.node)))?;
        self.other_server = !renewed.same_server;
        if self.other_server {
            // Every partition is looked at before anything moves there.
            self.wake_all();
            let held = || self.holdings.values().filter(|holding| holding.is_held());
            if held().all(|holding| holding.incarnation() == renewed.incarnation) {
                self.incarnation = Some(renewed.incarnation);
            }
            return Ok(());
        }
        self.incarnation = Some(renewed.incarnation);
        if self.renewed.is_none_or(|at| asked - at > shared.options.lease) {
            self.kept_since = Some(asked);
        }
        self.renewed = Some(asked);
        self.reconcile(renewed.owned.into_iter().collect()).await
    }

    /// Compares what is owned by the node's account with what is held here.
    async fn reconcile(&mut self, owned: HashMap<PartitionId, Fence>) -> Result<()> {
        let holdings: Vec<_> = self.holdings.values().cloned().collect();
        for holding in &holdings {
            match owned.get(&holding.partition) {
                Some(fence) if *fence == holding.fence => {}
                Some(fence) if fence.owner == holding.fence.owner => {
                    self.lose(holding, ErrorKind::Reset).await;
                }
                _ => self.lose(holding, ErrorKind::LeaseLost).await,
            }
        }
        // Rolled back to an earlier acquisition of this member, which nobody can take while it lives.
        let ours = |fence: &Fence| holdings.iter().any(|holding| holding.fence.owner == fence.owner);
        let orphans: Vec<_> = owned.into_iter().filter(|(_, fence)| !ours(fence)).collect();
        let orphans: Vec<_> = orphans.into_iter().map(|(id, fence)| (id, fence.owner)).collect();
        self.release_owned(&orphans).await
    }

    /// The server lacks what a reader has read: what was not committed is void, and the partition is
    /// taken again, under a new epoch, from the committed cursor.
    async fn lose_tail(&mut self, partition: PartitionId, owner: Uuid, silent: bool) {
        let held = self.holdings.get(&partition).filter(|holding| holding.fence.owner == owner);
        let Some(holding) = held.cloned() else { return };
        if !silent {
            let what = format!(
                "partition {partition}: the server lacks messages that were read: a failover lost the \
                 end of the log; reading goes on from the committed cursor, and effects of lost \
                 messages may exist"
            );
            tracing::error!(alert = "lost_tail", "{what}");
            self.shared.send(Event::Error(Error::new(ErrorKind::LeaseLost, what)));
        }
        self.forget(&holding, ErrorKind::LeaseLost);
        let released = timeout(STATEMENT, self.release_owned(&[(partition, owner)])).await;
        if let Ok(Err(error)) = released {
            tracing::debug!(error = %error.chain(), "release after a lost tail");
        }
        self.attempt(Work::Balance).await;
    }

    /// Takes free partitions up to the even share, or gives up what is above it.
    async fn balance(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (share, held) = (&shared.share, &shared.held);
        let surplus = held
            .load(Ordering::Acquire)
            .saturating_sub(share.load(Ordering::Acquire));
        if surplus > 0 {
            self.give_up(surplus);
            return Ok(());
        }
        if self
            .renewed
            .is_none_or(|at| at.elapsed() > shared.options.lease)
        {
            self.renew().await?;
        }
        // The room is taken before it is used, since members of other nodes do the same.
        let free_here = self.partitions.len() - self.holdings.len();
        let room = held.fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
            let room = share
                .load(Ordering::Acquire)
                .saturating_sub(held)
                .min(free_here);
            (room > 0).then_some(held + room)
        });
        let Ok(before) = room else { return Ok(()) };
        let room = share
            .load(Ordering::Acquire)
            .saturating_sub(before)
            .min(free_here);
        let acquired = self.acquire(room).await;
        let count = acquired.as_ref().map_or(0, Vec::len);
        held.fetch_sub(room.saturating_sub(count), Ordering::AcqRel);
        for acquired in acquired? {
            self.begin(acquired);
        }
        Ok(())
    }

    async fn acquire(&mut self, most: usize) -> Result<Vec<group::Acquired>> {
        let shared = &self.shared;
        let topic = &shared.topology.topic;
        let what = format!("take partitions on node {}", self.node);
        if !self.started {
            shared
                .start
                .tell(&shared.cluster, &shared.topology, &shared.group, self.node)
                .await?;
            self.started = true;
        }
        let connection = shared.connection(self.node).await?;
        group::make_cursors(connection, topic, &shared.group)
            .await
            .map_err(|error| refused(error, &what))?;
        let kept = self
            .kept_since
            .is_some_and(|since| since.elapsed() >= shared.options.lease);
        let grace = if kept { 0.0 } else { GRACE.as_secs_f64() };
        let only = shared
            .options
            .only
            .is_some()
            .then_some(self.partitions.as_slice());
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let connection = shared.connection(self.node).await?;
        group::acquire(
            connection,
            (topic, &shared.group),
            shared.member,
            most,
            grace,
            only,
        )
        .await
        .map_err(|error| refused(error, &what))
    }

    /// Starts to read a partition that was taken.
    fn begin(&mut self, acquired: group::Acquired) {
        let partition = acquired.partition;
        let ended = self.shared.cluster.inner.shutdown.child_token();
        let holding = Arc::new(Holding::new(acquired, ended));
        self.shared
            .cluster
            .inner
            .tasks
            .spawn(read(Arc::clone(&self.shared), Arc::clone(&holding)));
        ::metrics::counter!(names::ACQUIRED).increment(1);
        tracing::info!(%partition, group = %self.shared.group, "partition taken");
        self.holdings.insert(partition, holding);
    }

    /// Gives up so many partitions, once their deliveries are answered.
    fn give_up(&mut self, surplus: usize) {
        let held: Vec<_> = self
            .holdings
            .values()
            .filter(|h| h.is_held())
            .cloned()
            .collect();
        for holding in held.into_iter().take(surplus) {
            // Counted at once, so that members of other nodes don't give up more.
            self.shared.held.fetch_sub(1, Ordering::AcqRel);
            holding.drain();
            self.draining.spawn(async move {
                let _ = timeout(DRAIN, holding.drained()).await;
                holding.partition
            });
        }
    }

    /// Commits cursors: all that have changed, or those of some partitions.
    async fn flush(&mut self, only: Option<&[PartitionId]>) -> Result<()> {
        let chosen = |holding: &&Arc<Holding>| {
            only.is_none_or(|partitions| partitions.contains(&holding.partition))
        };
        let mut moves = Vec::new();
        let mut versions = HashMap::new();
        for holding in self.holdings.values().filter(chosen) {
            if let Some((acked_id, acked_ahead, version)) = holding.tracker().pending() {
                let (partition, fence) = (holding.partition, holding.fence);
                moves.push(Move {
                    partition,
                    fence,
                    incarnation: holding.incarnation(),
                    acked_id,
                    acked_ahead,
                });
                versions.insert(partition, version);
            }
        }
        if moves.is_empty() {
            return Ok(());
        }
        let connection = self.shared.connection(self.node).await?;
        let what = format!("commit cursors on node {}", self.node);
        let outcomes = group::flush(connection, &self.shared.group, &moves)
            .await
            .map_err(|error| refused(error, &what))?;
        let mut result = Ok(());
        for (partition, moved) in outcomes {
            let Some(holding) = self.holdings.get(&partition).cloned() else {
                continue;
            };
            let refusal = match moved {
                Moved::Yes => {
                    let version = versions.get(&partition).copied().unwrap_or(0);
                    holding.tracker().flushed(version);
                    ::metrics::counter!(names::FLUSHED).increment(1);
                    continue;
                }
                Moved::Locked => {
                    let why = format!("{what}: partition {partition} is locked by a transaction");
                    result = result.and(Err(Error::new(ErrorKind::Unavailable, why)));
                    continue;
                }
                Moved::OtherServer => {
                    holding.wake.notify_one();
                    let why = format!("{what}: another server answered, partition {partition} is looked at first");
                    result = result.and(Err(Error::new(ErrorKind::Unavailable, why)));
                    continue;
                }
                Moved::LeaseLost => ErrorKind::LeaseLost,
                Moved::Reset => ErrorKind::Reset,
            };
            result = result.and(Err(holding.refusal(refusal)));
            self.lose(&holding, refusal).await;
        }
        result
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
        for holding in partitions
            .iter()
            .filter_map(|partition| self.holdings.get(partition))
        {
            holding.wake.notify_one();
        }
    }

    fn wake_all(&self) {
        self.holdings
            .values()
            .for_each(|holding| holding.wake.notify_one());
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Flush(reply) => {
                let done = timeout(STATEMENT, self.flush_through()).await;
                let late = || {
                    Err(Error::new(
                        ErrorKind::Timeout,
                        "commit cursors: no answer in time",
                    ))
                };
                let _ = reply.send(done.unwrap_or_else(|_| late()));
            }
            Command::TailLost { partition, owner, silent } => {
                self.lose_tail(partition, owner, silent).await;
            }
            Command::Rebalance(reply) => {
                self.attempt(Work::Balance).await;
                let _ = reply.send(Ok(()));
            }
            Command::Stop { until, reply } => {
                self.holdings.values().for_each(|holding| holding.drain());
                for holding in self.holdings.values().cloned() {
                    self.draining.spawn(async move {
                        holding.drained().await;
                        holding.partition
                    });
                }
                self.stop = Some((until, reply));
            }
        }
    }

    /// Flushes until no row was passed over because a transaction had locked it.
    async fn flush_through(&mut self) -> Result<()> {
        loop {
            match self.flush(None).await {
                Err(error) if error.kind() == ErrorKind::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }

    /// Commits and releases partitions that are answered, or that were waited for long enough.
    async fn give_back(&mut self, partitions: &[PartitionId]) {
        let done = timeout(STATEMENT, async {
            self.flush(Some(partitions)).await?;
            self.release(partitions).await
        });
        let outcome = done
            .await
            .unwrap_or_else(|_| Err(Error::closed("the consumer")));
        if self.stop.is_none() {
            self.note(outcome);
        }
        for partition in partitions {
            if let Some(holding) = self.holdings.remove(partition) {
                // What is acknowledged from now on would never be committed.
                holding.end(ErrorKind::LeaseLost);
                if self.stop.is_some() {
                    self.shared.held.fetch_sub(1, Ordering::AcqRel);
                }
            }
        }
    }

    async fn release(&self, partitions: &[PartitionId]) -> Result<()> {
        let owned: Vec<_> = partitions
            .iter()
            .filter_map(|partition| self.holdings.get(partition))
            .map(|holding| (holding.partition, holding.fence.owner))
            .collect();
        self.release_owned(&owned).await
    }

    async fn release_owned(&self, owned: &[(PartitionId, Uuid)]) -> Result<()> {
        if owned.is_empty() {
            return Ok(());
        }
        let connection = self.shared.connection(self.node).await?;
        group::release(connection, &self.shared.group, owned)
            .await
            .map_err(|error| refused(error, &format!("release partitions on node {}", self.node)))
    }

    /// A partition is another's, or was moved by a seek.
    async fn lose(&mut self, holding: &Arc<Holding>, why: ErrorKind) {
        self.shared.send(Event::Error(holding.refusal(why)));
        if why == ErrorKind::Reset {
            // Still this member's: free, to be taken again from the new position.
            if let Err(error) = self.release(&[holding.partition]).await {
                tracing::debug!(error = %error.chain(), "release after a seek");
            }
        }
        self.forget(holding, why);
    }

    /// Refuses what is acknowledged from now on.
    fn forget(&mut self, holding: &Arc<Holding>, why: ErrorKind) {
        if holding.is_held() {
            self.shared.held.fetch_sub(1, Ordering::AcqRel);
        }
        holding.end(why);
        ::metrics::counter!(names::LEASE_LOST).increment(1);
        self.holdings.remove(&holding.partition);
    }

    async fn end(mut self) {
        let partitions: Vec<PartitionId> = self.holdings.keys().copied().collect();
        let stop = self.stop.take();
        let done = timeout(STATEMENT, async {
            let flushed = self.flush_through().await;
            let released = self.release(&partitions).await;
            let connection = self.shared.connection(self.node).await?;
            let _ = group::sweep_members(self.shared.connection(self.node).await?).await;
            let left = group::leave(connection, self.shared.member).await;
            flushed
                .and(released)
                .and(left.map_err(|error| refused(error, "end the lease")))
        });
        let outcome = done.await.unwrap_or_else(|_| {
            let what = format!("commit acknowledgements on node {}: no answer", self.node);
            Err(Error::new(ErrorKind::Timeout, what))
        });
        for holding in self.holdings.into_values() {
            holding.end(ErrorKind::LeaseLost);
            self.shared.held.fetch_sub(1, Ordering::AcqRel);
        }
        if let Some((_, reply)) = stop {
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

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
