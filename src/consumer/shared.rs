//! What a consumer's tasks share.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::consumer::aside::Aside;
use crate::consumer::budget::Budget;
use crate::consumer::builder::Options;
use crate::consumer::ending::Life;
use crate::consumer::handle::GRACE;
use crate::consumer::holding::Holding;
use crate::consumer::journal::{Before, Journal};
use crate::consumer::member::{self, Command};
use crate::consumer::roster::{self, Roster};
use crate::consumer::start::GroupStart;
use crate::consumer::status::ConsumerEvent;
use crate::consumer::wanted::{Reach, Wanted};
use crate::consumer::{Delivery, Event, Verdict, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Teller;
use crate::id::{NodeId, PartitionId};
use crate::name::GroupName;
use crate::store::fetch::Batch;
use crate::store::group::Acquired;
use crate::store::node::Connection;
use crate::supervise::{Pauses, supervised};
use crate::topology::Topology;

/// What a consumer's tasks share.
pub(crate) struct Shared {
    pub(super) cluster: Cluster,
    pub(super) topology: Topology,
    pub(super) group: GroupName,
    pub(super) member: Uuid,
    pub(super) journal: Option<Journal>,
    pub(super) start: GroupStart,
    pub(super) options: Options,
    /// Taken when the consumer has left: the stream ends then.
    pub(super) events: Mutex<Option<mpsc::UnboundedSender<Event>>>,
    /// Who listens to what the consumer tells about itself.
    pub(super) told: Teller<ConsumerEvent>,
    pub(super) budget: Arc<Budget>,
    /// Takes what the stream's deliveries were not handled, until the consumer has left.
    pub(super) failures: Mutex<Option<mpsc::UnboundedSender<(Delivery, Verdict)>>>,
    pub(super) aside: Aside,
    pub(super) parked_wakers: Mutex<HashMap<NodeId, Arc<Notify>>>,
    /// It was said that a delivery was dropped.
    pub(super) drop_said: AtomicBool,
    /// What this member should have.
    pub(super) wanted: Mutex<Wanted>,
    /// Members that have died, as somebody saw.
    pub(super) dead: Mutex<Vec<Uuid>>,
    pub(super) reach: Reach,
    /// What it owns, or gives up.
    pub(super) holdings: Mutex<HashMap<PartitionId, Arc<Holding>>>,
    pub(super) paused: Mutex<BTreeSet<PartitionId>>,
    /// Partitions whose readers have failed.
    pub(super) failed_readers: Mutex<HashMap<PartitionId, Pauses>>,
    /// How many renewals of leases and ends of them were sent.
    pub(super) turns: AtomicI64,
    /// How many flushes have begun.
    pub(super) flushes: Arc<AtomicU64>,
    /// Why acknowledgements were not committed, and how many flushes had begun at the last of them.
    pub(super) uncommitted: Mutex<Option<(Error, u64)>>,
    /// It was said that a reader waits for room.
    pub(super) pressed: AtomicBool,
    /// Why the stream ended, where nobody shut it down.
    pub(super) ended_by: OnceLock<Error>,
    /// A shutdown was asked for.
    pub(super) stopped: AtomicBool,
    /// Ends the heartbeat.
    pub(super) stopping: CancellationToken,
    /// Held while the member is put on the list of live ones, or taken off it.
    pub(super) registering: tokio::sync::Mutex<()>,
    /// All is given back, and the stream has ended.
    pub(super) left: CancellationToken,
    pub(super) commands: Mutex<Vec<(NodeId, mpsc::UnboundedSender<Command>)>>,
}

impl Shared {
    /// Registers, then starts the roster and one member for each node.
    pub(super) async fn launch(self: &Arc<Self>, life: Life) {
        roster::bury_former(self).await;
        let mut roster = Roster::new(Arc::clone(self));
        if let Err(error) = roster.beat().await {
            // What nobody has, until a heartbeat says what is this member's.
            tracing::warn!(group = %self.group, error = %error.chain(), "no heartbeat: taking what is free");
            self.want(Wanted::Anything);
        }
        let tasks = &self.cluster.inner.tasks;
        let (of, mut first) = (Arc::clone(self), Some(roster));
        let run = move || first.take().unwrap_or_else(|| Roster::new(Arc::clone(&of))).run();
        tasks.spawn(supervised("roster", self.stopping.clone(), run, |_| {}));
        let mut members = Vec::new();
        for (node, partitions) in self.topology.by_node() {
            let (sender, commands) = mpsc::unbounded_channel();
            lock(&self.commands).push((node, sender));
            members.push(tasks.spawn(member::keep(Arc::clone(self), node, partitions, commands)));
        }
        // Stopped meanwhile: whoever did may have found nobody to tell.
        if self.stopped.load(Ordering::Acquire) {
            drop(self.stop_nodes(Instant::now()));
        }
        // However they end, by a shutdown of the consumer or of the whole cluster.
        let shared = Arc::clone(self);
        tasks.spawn(async move {
            join_all(members).await;
            shared.leave().await;
            drop(life);
        });
        let shared = Arc::clone(self);
        tasks.spawn(async move { shared.close_with_the_cluster().await });
        let shared = Arc::clone(self);
        tasks.spawn(async move { shared.end_with_the_topic().await });
    }

    /// Tells every node's member to give everything back; returns their answers to come. None where
    /// they were told before. The group is told first: it finds out who takes over meanwhile.
    pub(super) fn stop(&self, until: Instant) -> Option<Vec<oneshot::Receiver<Result<()>>>> {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.stopping.cancel();
        Some(self.stop_nodes(until))
    }

    pub(super) fn stop_nodes(&self, until: Instant) -> Vec<oneshot::Receiver<Result<()>>> {
        let all: Vec<NodeId> = lock(&self.commands).iter().map(|(node, _)| *node).collect();
        self.tell_nodes(&all, |reply| Command::Stop { until, reply })
    }

    /// Tells some nodes' members; returns their answers to come.
    pub(super) fn tell_nodes(
        &self,
        nodes: &[NodeId],
        make: impl Fn(oneshot::Sender<Result<()>>) -> Command,
    ) -> Vec<oneshot::Receiver<Result<()>>> {
        let tell = |node: &NodeId| {
            let (reply, answer) = oneshot::channel();
            // A member that has ended drops the reply, which the receiver sees.
            self.tell(*node, make(reply));
            answer
        };
        nodes.iter().map(tell).collect()
    }

    pub(super) fn tell_all(&self, make: impl Fn() -> Command) {
        for (_, sender) in lock(&self.commands).iter() {
            let _ = sender.send(make());
        }
    }

    /// What this member should have is another from now on.
    pub(super) fn want(&self, wanted: Wanted) {
        let mut before = lock(&self.wanted);
        if *before != wanted {
            *before = wanted;
            drop(before);
            self.tell_all(|| Command::Rebalance);
        }
    }

    pub(super) fn wants(&self, partition: PartitionId) -> bool {
        let listed = self.options.only.as_ref().is_none_or(|only| only.contains(&partition));
        listed && lock(&self.wanted).wants(partition)
    }

    /// Which of these it should have.
    pub(super) fn wanted_of(&self, partitions: &[PartitionId]) -> BTreeSet<PartitionId> {
        partitions.iter().copied().filter(|partition| self.wants(*partition)).collect()
    }

    /// Cursors may have been moved: looks at all of them.
    pub(super) fn renew_all(&self) {
        self.tell_all(|| Command::Renew);
    }

    /// Others do not reach these nodes.
    pub(super) fn probe(&self, nodes: BTreeSet<NodeId>) {
        for node in nodes {
            self.tell(node, Command::Probe);
        }
    }

    pub(super) fn note_dead(&self, members: Vec<Uuid>) {
        *lock(&self.dead) = members;
    }

    pub(super) fn dead(&self) -> Vec<Uuid> {
        lock(&self.dead).clone()
    }

    pub(super) fn out_of_reach(&self) -> (Vec<i32>, Vec<i32>) {
        self.reach.out_of_reach(self.options.lease)
    }

    pub(super) fn holdings(&self) -> MutexGuard<'_, HashMap<PartitionId, Arc<Holding>>> {
        lock(&self.holdings)
    }

    pub(super) fn paused(&self) -> MutexGuard<'_, BTreeSet<PartitionId>> {
        lock(&self.paused)
    }

    /// Of a partition that was taken.
    pub(super) fn holding(&self, acquired: Acquired) -> Holding {
        let ended = self.cluster.inner.shutdown.child_token();
        let stream = lock(&self.events).as_ref().map(mpsc::UnboundedSender::downgrade);
        let stream = stream.unwrap_or_else(|| mpsc::unbounded_channel().0.downgrade());
        let written = self.journal.as_ref().map(|journal| {
            let before = Before {
                member: acquired.member_before,
                owner: acquired.owner_before,
                epoch: acquired.fence.epoch - 1,
                reset_epoch: acquired.fence.reset_epoch,
            };
            journal.holding(&acquired, &before)
        });
        let flushes = Arc::clone(&self.flushes);
        let (group, bounds) = (self.group.clone(), self.options.bounds);
        let holding = Holding::new(acquired, group, bounds, ended, stream, flushes, written);
        let failures = lock(&self.failures).as_ref().map(mpsc::UnboundedSender::downgrade);
        let waker = self.parked_waker(holding.partition.node());
        holding.in_order(self.options.order, failures, waker)
    }

    /// What was in a task's hands that has failed is nobody's now: partitions of a node, or of all,
    /// are read anew from their committed cursors.
    pub(super) fn read_anew(&self, node: Option<NodeId>) {
        let holdings: Vec<_> = self.holdings().values().cloned().collect();
        for holding in holdings {
            let (partition, owner) = (holding.partition, holding.owner());
            if node.is_none_or(|node| partition.node() == node) {
                self.tell(partition.node(), Command::Anew { partition, owner });
            }
        }
    }

    /// The member of a node has failed: nobody renews or commits what it held.
    pub(super) fn give_up_all(&self, node: NodeId, why: &Error) {
        let mut holdings = self.holdings();
        let of_node = |partition: &PartitionId| partition.node() == node;
        let held: Vec<_> = holdings.extract_if(|partition, _| of_node(partition)).collect();
        drop(holdings);
        for (partition, holding) in held {
            holding.end(ErrorKind::LeaseLost);
            if holding.is_pending() {
                self.note_uncommitted(holding.refusal(ErrorKind::LeaseLost), &holding);
            }
            let what = format!("hold partition {partition}: {why}; it is read anew");
            self.send(Event::Error(Error::new(ErrorKind::LeaseLost, what)));
        }
    }

    /// How long to wait before a partition is read again whose reader has failed.
    pub(super) fn reader_failed(&self, partition: PartitionId) -> Duration {
        let mut failed = lock(&self.failed_readers);
        failed.entry(partition).or_insert_with(Pauses::new).failed(Instant::now())
    }

    /// From now on it is among what this consumer owns, and paused with that.
    pub(super) fn hold(&self, holding: &Arc<Holding>) {
        let paused = self.paused();
        if paused.contains(&holding.partition) {
            holding.pause();
        }
        self.holdings().insert(holding.partition, Arc::clone(holding));
    }

    /// The nodes on which something is to be committed.
    pub(super) fn pending_nodes(&self) -> Vec<NodeId> {
        let holdings = self.holdings();
        let pending = holdings.values().filter(|holding| holding.is_pending());
        let nodes: BTreeSet<NodeId> = pending.map(|holding| holding.partition.node()).collect();
        nodes.into_iter().collect()
    }

    /// Acknowledgements of a holding are lost.
    pub(super) fn note_uncommitted(&self, why: Error, holding: &Holding) {
        let mut uncommitted = lock(&self.uncommitted);
        let (first, last) = uncommitted.take().unwrap_or((why, 0));
        *uncommitted = Some((first, last.max(holding.acked_since())));
    }

    /// A flush begins: returns its number.
    pub(super) fn begin_flush(&self) -> u64 {
        self.flushes.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// What a flush must tell. The next one tells it again, where some of what was lost was
    /// acknowledged after this one had begun.
    pub(super) fn take_uncommitted(&self, flush: u64) -> Result<()> {
        let mut uncommitted = lock(&self.uncommitted);
        let Some((why, last)) = &*uncommitted else { return Ok(()) };
        let (why, covered) = (why.clone(), *last < flush);
        if covered {
            *uncommitted = None;
        }
        Err(why)
    }

    /// Says once that a reader waits for room.
    pub(super) fn press(&self) {
        if !self.pressed.swap(true, Ordering::AcqRel) {
            self.send(Event::Pressure);
        }
    }

    /// The number of the next renewal of a lease, or of its end: by it a node tells which was sent
    /// later.
    pub(super) fn turn(&self) -> i64 {
        self.turns.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Tells one node's member.
    pub(super) fn tell(&self, node: NodeId, command: Command) {
        let commands = lock(&self.commands);
        if let Some((_, sender)) = commands.iter().find(|(known, _)| *known == node) {
            let _ = sender.send(command);
        }
    }

    /// The members of all nodes have ended: the stream ends too. Idempotent.
    pub(super) async fn leave(&self) {
        roster::leave(self).await;
        if let Some(journal) = &self.journal {
            journal.close();
        }
        if self.options.broadcast && !self.left.is_cancelled() {
            Box::pin(self.remove_group()).await;
        }
        drop(lock(&self.failures).take());
        self.close_stream();
        self.left.cancel();
    }

    /// What this fails at is swept later.
    pub(super) async fn remove_group(&self) {
        let names = (self.topology.topic.as_str(), self.group.as_str());
        let removed = timeout(GRACE, self.cluster.delete_group(names.0, names.1)).await;
        if let Ok(Err(error)) = removed {
            tracing::debug!(error = %error.chain(), "the group of a broadcast consumer stays for a while");
        }
    }

    pub(super) fn send(&self, event: Event) {
        if let Some(events) = &*lock(&self.events) {
            // Nobody polls a stream that was dropped.
            let _ = events.send(event);
        }
    }

    pub(super) async fn connection(&self, node: NodeId) -> Result<Connection> {
        self.cluster.inner.nodes.node(node).await?.get().await
    }

    /// What a row counts for: its bytes, or more where its messages are many and small.
    pub(super) fn weight(&self, row: &Batch) -> usize {
        let each = self.options.prefetch_bytes / self.options.prefetch_messages;
        let many = (row.count as usize).saturating_mul(each);
        row.bytes.max(many.min(self.options.prefetch_bytes))
    }

    pub(super) async fn failpoint(&self, name: &'static str) {
        if let Some(hook) = &self.options.failpoint {
            hook(name).await;
        }
    }
}
