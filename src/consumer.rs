//! Receiving messages: consumers of a group share the partitions of a topic and keep only a cursor.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, NodeId, PartitionId};
use crate::name::{GroupName, TopicName};
use crate::store::fetch::Batch;
use crate::store::group::Acquired;
use crate::store::node::Connection;
use crate::topology::Topology;

mod acks;
mod assignment;
mod budget;
mod commit;
mod holding;
mod journal;
mod keys;
mod lanes;
mod lease;
mod member;
mod messages;
mod reader;
mod roster;
mod runner;
pub(crate) mod start;
mod wanted;

use budget::{Budget, Room};
use holding::{Bounds, Holding};
use journal::{Before, Journal};
use member::Command;
pub use messages::{Delivery, Messages};
use roster::Roster;
use start::GroupStart;
use wanted::{Reach, Wanted};

/// Where a group starts that has not consumed the topic before, or where a [seek](Cluster::seek) moves it
/// to. In between it goes on from its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// At the first message that is there.
    #[default]
    Earliest,
    /// At the first message from now on, by each node's own clock.
    Latest,
    /// At the first message that was appended at this time or later.
    At(SystemTime),
    /// At this message in its own partition, and at its time in the others.
    Id(MessageId),
}

/// What [`Messages::run`] never has in hand at the same time. A stream hands messages out in the order of
/// their partitions whatever this says: what is done with them at a time is its reader's affair.
///
/// A partition that is lost and taken again, after a seek say, begins anew: a message of before may still be
/// in hand then, which [`Delivery::revoked`] has told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Order {
    /// Two messages of one partition: each is done before the next one is begun.
    #[default]
    ByPartition,
    /// Two messages of one key. Those of different keys, and those without a key, go in parallel.
    ByKey,
    /// Nothing: all go in parallel.
    Unordered,
}

#[derive(Clone)]
pub(crate) struct Options {
    start: Start,
    broadcast: bool,
    order: Order,
    prefetch_messages: usize,
    prefetch_bytes: usize,
    lease: Duration,
    poll_interval: Duration,
    flush_interval: Duration,
    drain_timeout: Duration,
    bounds: Bounds,
    journal: Option<PathBuf>,
    only: Option<Vec<PartitionId>>,
    failpoint: Option<Failpoint>,
}

/// How much longer than its deadline a shutdown may take, where nodes don't answer.
const GRACE: Duration = Duration::from_secs(6);

type Failpoint = Arc<dyn Fn(&'static str) -> BoxFuture<'static, ()> + Send + Sync>;

/// Settings of a consumer.
#[must_use = "a builder does nothing until stream"]
pub struct ConsumerBuilder {
    cluster: Cluster,
    topic: String,
    group: String,
    options: Options,
}

impl ConsumerBuilder {
    pub(crate) fn new(cluster: Cluster, topic: &str, group: &str) -> Self {
        let options = Options {
            start: Start::Earliest,
            broadcast: false,
            order: Order::ByPartition,
            prefetch_messages: 100_000,
            prefetch_bytes: 16 << 20,
            lease: Duration::from_secs(10),
            poll_interval: Duration::from_secs(5),
            flush_interval: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(10),
            bounds: Bounds { messages: 100_000, runs: 10_000 },
            journal: None,
            only: None,
            failpoint: None,
        };
        Self { cluster, topic: topic.to_owned(), group: group.to_owned(), options }
    }

    /// A group of this consumer alone, which goes when it has gone: it begins with what is sent from now
    /// on.
    pub(crate) fn broadcast(cluster: Cluster, topic: &str) -> Self {
        let group = format!("broadcast-{}", Uuid::now_v7().simple());
        let mut builder = Self::new(cluster, topic, &group);
        (builder.options.broadcast, builder.options.start) = (true, Start::Latest);
        builder
    }

    /// Where the group starts if it is new: at the earliest message by default.
    pub fn start(mut self, start: Start) -> Self {
        self.options.start = start;
        self
    }

    /// What a handler never has in hand at the same time: two messages of a partition by default.
    pub fn order(mut self, order: Order) -> Self {
        self.options.order = order;
        self
    }

    /// How many messages may be fetched and not yet handed out: 100,000 by default, at least 1. Whole
    /// batches are fetched, so that a batch may exceed it.
    pub fn prefetch_messages(mut self, messages: usize) -> Self {
        self.options.prefetch_messages = messages.max(1);
        self
    }

    /// How many bytes may be fetched and not yet handed out: 16 MiB by default, 64 KiB to 1 GiB. A
    /// single batch may exceed it.
    pub fn prefetch_bytes(mut self, bytes: usize) -> Self {
        self.options.prefetch_bytes = bytes.clamp(64 << 10, 1 << 30);
        self
    }

    /// How long after its last sign of life a consumer's partitions go to others: 10 s by default, 1 s
    /// to 10 min. Renewed three times in that time.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(Duration::from_secs(1), Duration::from_mins(10));
        self
    }

    /// How often to look for messages without a hint: every 5 s by default, give or take a fifth; 10 ms
    /// to 1 h.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.options.poll_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_hours(1));
        self
    }

    /// How often acknowledgements are committed where there are some: every second by default, 10 ms
    /// to 1 min. Less often where a commit takes longer than a tenth of that, up to every 10 s.
    pub fn flush_interval(mut self, interval: Duration) -> Self {
        self.options.flush_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_mins(1));
        self
    }

    /// How long deliveries may be in hand of a partition that goes to another member: 10 s by default, 0
    /// to 10 min. Then it goes without them, and they are delivered there again.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.options.drain_timeout = timeout.min(Duration::from_mins(10));
        self
    }

    /// How many messages of a partition may lie between the first that is not acknowledged and the last
    /// that was read: 100,000 by default, at least 1. Where one is stuck, its partition waits at that.
    /// Whole batches are read, so that one batch may exceed it.
    pub fn max_unacked(mut self, messages: usize) -> Self {
        self.options.bounds.messages = messages.max(1);
        self
    }

    /// How many separate runs of acknowledged messages may lie behind the first that is not
    /// acknowledged, in a partition: 10,000 by default, at least 1. They are stored with the cursor; no
    /// more are handed out until there are half as many.
    pub fn max_acked_runs(mut self, runs: usize) -> Self {
        self.options.bounds.runs = runs.max(1);
        self
    }

    /// Keeps acknowledgements in this directory until they are committed, so that they survive when the
    /// process is killed: of what was acknowledged nothing is delivered again, if a consumer of the same
    /// cluster, topic, group and directory is started before others take its partitions. Not when the
    /// machine dies. The directory is made if it is missing, and may be shared by consumers of other
    /// groups and topics. An acknowledgement costs a write then, of some microseconds.
    pub fn journal(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.journal = Some(directory.into());
        self
    }

    /// Takes these partitions and no others, instead of an even share of all. Members without a list
    /// leave them alone while this one lives. Where two lists have the same one, who has it keeps it.
    pub fn partitions(mut self, partitions: impl IntoIterator<Item = PartitionId>) -> Self {
        self.options.only = Some(partitions.into_iter().collect());
        self
    }

    /// Called at named places of the library, for tests that stop it there.
    #[doc(hidden)]
    pub fn failpoint(
        mut self,
        hook: impl Fn(&'static str) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        self.options.failpoint = Some(Arc::new(hook));
        self
    }

    /// Joins the group and starts consuming.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such topic, [`ErrorKind::Unavailable`] where the
    /// control database can't be reached and the topic is known neither here nor from a
    /// [topology file](crate::ClusterBuilder::topology_file), or the group on no node. Nodes that can't
    /// be reached are no error: their messages come when they are back. [`ErrorKind::Conflict`] where
    /// another consumer has the [journal](Self::journal), [`ErrorKind::Invalid`] where it can't be used.
    pub async fn stream(self) -> Result<Messages> {
        let topic = TopicName::new(&self.topic)?;
        let group = GroupName::new(&self.group)?;
        let topology = self.cluster.topology(&topic).await?;
        check_partitions(&topology, self.options.only.as_deref())?;
        // Boxed, as the rest is: whoever consumes carries it.
        let Options { start, broadcast, .. } = self.options;
        let start = start::resolve(&self.cluster, &topology, &group, start, broadcast);
        let start = Box::pin(start).await?;
        // Time-ordered, so that members rank by when they joined.
        let member = Uuid::now_v7();
        let journal = open_journal(&self.cluster, &topic, &group, member, &self.options).await?;
        let (events, receiver) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            budget: Budget::new(self.options.prefetch_bytes),
            member,
            journal,
            began: Instant::now(),
            wanted: Mutex::new(Wanted::These(BTreeSet::new())),
            dead: Mutex::default(),
            reach: Reach::default(),
            holdings: Mutex::default(),
            paused: Mutex::default(),
            uncommitted: Mutex::default(),
            pressed: AtomicBool::new(false),
            events: Mutex::new(Some(events)),
            stopped: AtomicBool::new(false),
            stopping: self.cluster.inner.shutdown.child_token(),
            registering: tokio::sync::Mutex::default(),
            left: CancellationToken::new(),
            commands: Mutex::default(),
            cluster: self.cluster,
            topology,
            group,
            start,
            options: self.options,
        });
        shared.cluster.keep_up();
        let messages =
            Messages::new(receiver, topic, ConsumerHandle { shared: Arc::clone(&shared) });
        // In a task: to drop this ends the consumer, in the middle of it too.
        let launched = Arc::clone(&shared);
        let tasks = &shared.cluster.inner.tasks;
        let _ = tasks.spawn(async move { launched.launch().await }).await;
        Ok(messages)
    }
}

impl fmt::Debug for ConsumerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerBuilder")
            .field("topic", &self.topic)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

async fn open_journal(
    cluster: &Cluster,
    topic: &TopicName,
    group: &GroupName,
    member: Uuid,
    options: &Options,
) -> Result<Option<Journal>> {
    let Some(directory) = options.journal.clone() else { return Ok(None) };
    let (id, topic, group) = (cluster.id(), topic.clone(), group.clone());
    let open = move || Journal::open(&directory, id, (&topic, &group), member);
    let opened = tokio::task::spawn_blocking(open).await;
    let failed = |_| Error::closed("the cluster");
    opened.map_err(failed)?.map(Some)
}

fn check_partitions(topology: &Topology, only: Option<&[PartitionId]>) -> Result<()> {
    if only.is_some_and(<[_]>::is_empty) {
        return Err(Error::invalid("the list of partitions to take is empty"));
    }
    check_known(topology, only.unwrap_or_default())
}

fn check_known(topology: &Topology, partitions: &[PartitionId]) -> Result<()> {
    let known = |partition| topology.partitions.binary_search(partition).is_ok();
    let stranger = partitions.iter().find(|partition| !known(partition));
    stranger.map_or(Ok(()), |partition| {
        let what = format!("partition {partition} is not one of topic {}", topology.topic);
        Err(Error::new(ErrorKind::NotFound, what))
    })
}

/// Flushes and shuts down a consumer, from any task. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHandle {
    shared: Arc<Shared>,
}

impl ConsumerHandle {
    /// Commits everything that was acknowledged before. When it returns `Ok`, none of that is delivered
    /// again.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] or [`ErrorKind::Reset`] where a partition's acknowledgements were
    /// refused, [`ErrorKind::Closed`] after a shutdown, or what keeps a node from answering.
    pub async fn flush(&self) -> Result<()> {
        // A node that does not answer holds nobody up that has nothing to be committed there.
        let answers = self.shared.tell_nodes(&self.shared.pending_nodes(), Command::Flush);
        let mut outcome = Ok(());
        for answer in join_all(answers).await {
            outcome = outcome.and(answer.unwrap_or_else(|_| Err(Error::closed("the consumer"))));
        }
        outcome = outcome.and(self.shared.take_uncommitted());
        if self.shared.left.is_cancelled() {
            return Err(Error::closed("the consumer"));
        }
        outcome
    }

    /// Ends consuming: nothing new is handed out; deliveries in hand may be answered until the deadline;
    /// then acknowledgements are committed, the partitions given back, and the stream ends.
    /// Idempotent: a second call waits for the first.
    ///
    /// # Errors
    /// Those of [`flush`](Self::flush); the consumer has ended all the same.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let shared = &self.shared;
        let Some(answers) = shared.stop(Instant::now() + deadline) else {
            shared.left.cancelled().await;
            return Ok(());
        };
        let ended = async {
            let mut outcome = Ok(());
            for answer in join_all(answers).await {
                outcome = outcome.and(answer.unwrap_or(Ok(())));
            }
            shared.left.cancelled().await;
            outcome.and(shared.take_uncommitted())
        };
        if let Ok(outcome) = timeout(deadline + GRACE, ended).await {
            return outcome;
        }
        shared.leave().await;
        let what = "commit acknowledgements at shutdown: a node did not answer";
        Err(Error::new(ErrorKind::Timeout, what))
    }

    /// This consumer's name in the group, as [`PartitionLag::member`](crate::PartitionLag::member) shows it.
    pub fn member(&self) -> Uuid {
        self.shared.member
    }

    /// The partitions that this consumer owns now.
    pub fn held_partitions(&self) -> usize {
        self.shared.holdings().values().filter(|holding| holding.is_held()).count()
    }

    /// Hands out nothing of these partitions from now on, whether they are owned now or later, until they
    /// are resumed. Others go on. They stay this consumer's; what is in hand can be acknowledged, and
    /// messages that were fetched are dropped, and fetched again later.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is not of the topic; nothing is paused then.
    pub fn pause(&self, partitions: impl IntoIterator<Item = PartitionId>) -> Result<()> {
        let partitions: Vec<_> = partitions.into_iter().collect();
        check_known(&self.shared.topology, &partitions)?;
        let mut paused = self.shared.paused();
        paused.extend(&partitions);
        let holdings = self.shared.holdings();
        partitions.iter().filter_map(|p| holdings.get(p)).for_each(|holding| holding.pause());
        Ok(())
    }

    /// Hands messages of these partitions out again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is not of the topic; nothing is resumed then.
    pub fn resume(&self, partitions: impl IntoIterator<Item = PartitionId>) -> Result<()> {
        let partitions: Vec<_> = partitions.into_iter().collect();
        check_known(&self.shared.topology, &partitions)?;
        let mut paused = self.shared.paused();
        paused.retain(|partition| !partitions.contains(partition));
        let holdings = self.shared.holdings();
        partitions.iter().filter_map(|p| holdings.get(p)).for_each(|holding| holding.resume());
        Ok(())
    }

    /// The partitions that this consumer owns now, in rising order, and whether each is paused.
    pub fn partitions(&self) -> Vec<(PartitionId, bool)> {
        let holdings = self.shared.holdings();
        let held = holdings.values().filter(|holding| holding.is_held());
        let mut held: Vec<_> = held.map(|h| (h.partition, h.is_paused())).collect();
        held.sort_unstable();
        held
    }

    /// Bytes that are fetched, or about to be, and not yet handed out: for tests.
    #[doc(hidden)]
    pub fn prefetched_bytes(&self) -> usize {
        self.shared.budget.taken()
    }

    /// Whether a shutdown has begun, also by dropping the stream: nothing is handed out any more.
    pub fn is_shutting_down(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Nobody reads the stream any more: gives everything back, and waits for nothing.
    fn abandon(&self) {
        drop(self.shared.stop(Instant::now()));
    }
}

impl fmt::Debug for ConsumerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.shared;
        f.debug_struct("ConsumerHandle")
            .field("member", &shared.member)
            .field("group", &shared.group)
            .field("held", &self.held_partitions())
            .finish_non_exhaustive()
    }
}

/// What goes through the stream's channel.
#[derive(Debug)]
pub(crate) enum Event {
    Batch(Read),
    /// Whether an acquisition's messages may be handed out has changed.
    Turn(Uuid),
    /// A reader waits for room.
    Pressure,
    /// News for whoever consumes.
    Error(Error),
}

/// Messages of one row, from an id on, with the room that they take.
#[derive(Debug)]
pub(crate) struct Read {
    holding: Arc<Holding>,
    row: Arc<Batch>,
    from: i64,
    /// Some of them were acknowledged in an earlier holding.
    patchy: bool,
    /// Of the holding, when they were read.
    round: u32,
    room: Room,
}

/// What a consumer's tasks share.
pub(crate) struct Shared {
    cluster: Cluster,
    topology: Topology,
    group: GroupName,
    member: Uuid,
    journal: Option<Journal>,
    /// When it joined.
    began: Instant,
    start: GroupStart,
    options: Options,
    /// Taken when the consumer has left: the stream ends then.
    events: Mutex<Option<mpsc::UnboundedSender<Event>>>,
    budget: Arc<Budget>,
    /// What this member should have.
    wanted: Mutex<Wanted>,
    /// Members that have died, as somebody saw.
    dead: Mutex<Vec<Uuid>>,
    reach: Reach,
    /// What it owns, or gives up.
    holdings: Mutex<HashMap<PartitionId, Arc<Holding>>>,
    paused: Mutex<BTreeSet<PartitionId>>,
    /// Why acknowledgements were not committed, since somebody asked.
    uncommitted: Mutex<Vec<Error>>,
    /// It was said that a reader waits for room.
    pressed: AtomicBool,
    /// A shutdown was asked for.
    stopped: AtomicBool,
    /// Ends the heartbeat.
    stopping: CancellationToken,
    /// Held while the member is put on the list of live ones, or taken off it.
    registering: tokio::sync::Mutex<()>,
    /// All is given back, and the stream has ended.
    left: CancellationToken,
    commands: Mutex<Vec<(NodeId, mpsc::UnboundedSender<Command>)>>,
}

impl Shared {
    /// Registers, then starts the roster and one member for each node.
    async fn launch(self: &Arc<Self>) {
        roster::bury_former(self).await;
        let mut roster = Roster::new(Arc::clone(self));
        if let Err(error) = roster.beat().await {
            // What nobody has, until a heartbeat says what is this member's.
            tracing::warn!(group = %self.group, error = %error.chain(), "no heartbeat: taking what is free");
            self.want(Wanted::Anything);
        }
        let tasks = &self.cluster.inner.tasks;
        tasks.spawn(roster.run());
        let mut members = Vec::new();
        for (node, partitions) in self.topology.by_node() {
            let (sender, commands) = mpsc::unbounded_channel();
            lock(&self.commands).push((node, sender));
            members.push(tasks.spawn(member::run(Arc::clone(self), node, partitions, commands)));
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
        });
    }

    /// Tells every node's member to give everything back; returns their answers to come. None where
    /// they were told before. The group is told first: it finds out who takes over meanwhile.
    fn stop(&self, until: Instant) -> Option<Vec<oneshot::Receiver<Result<()>>>> {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.stopping.cancel();
        Some(self.stop_nodes(until))
    }

    fn stop_nodes(&self, until: Instant) -> Vec<oneshot::Receiver<Result<()>>> {
        let all: Vec<NodeId> = lock(&self.commands).iter().map(|(node, _)| *node).collect();
        self.tell_nodes(&all, |reply| Command::Stop { until, reply })
    }

    /// Tells some nodes' members; returns their answers to come.
    fn tell_nodes(
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

    fn tell_all(&self, make: impl Fn() -> Command) {
        for (_, sender) in lock(&self.commands).iter() {
            let _ = sender.send(make());
        }
    }

    /// What this member should have is another from now on.
    fn want(&self, wanted: Wanted) {
        let mut before = lock(&self.wanted);
        if *before != wanted {
            *before = wanted;
            drop(before);
            self.tell_all(|| Command::Rebalance);
        }
    }

    fn wants(&self, partition: PartitionId) -> bool {
        let listed = self.options.only.as_ref().is_none_or(|only| only.contains(&partition));
        listed && lock(&self.wanted).wants(partition)
    }

    /// Which of these it should have.
    fn wanted_of(&self, partitions: &[PartitionId]) -> BTreeSet<PartitionId> {
        partitions.iter().copied().filter(|partition| self.wants(*partition)).collect()
    }

    /// Cursors may have been moved: looks at all of them.
    fn renew_all(&self) {
        self.tell_all(|| Command::Renew);
    }

    /// Others do not reach these nodes.
    fn probe(&self, nodes: BTreeSet<NodeId>) {
        for node in nodes {
            self.tell(node, Command::Probe);
        }
    }

    fn note_dead(&self, members: Vec<Uuid>) {
        *lock(&self.dead) = members;
    }

    fn dead(&self) -> Vec<Uuid> {
        lock(&self.dead).clone()
    }

    fn out_of_reach(&self) -> (Vec<i32>, Vec<i32>) {
        self.reach.out_of_reach(self.options.lease)
    }

    fn holdings(&self) -> MutexGuard<'_, HashMap<PartitionId, Arc<Holding>>> {
        lock(&self.holdings)
    }

    fn paused(&self) -> MutexGuard<'_, BTreeSet<PartitionId>> {
        lock(&self.paused)
    }

    /// Of a partition that was taken.
    fn holding(&self, acquired: Acquired) -> Holding {
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
        Holding::new(acquired, self.options.bounds, ended, stream, written)
    }

    /// From now on it is among what this consumer owns, and paused with that.
    fn hold(&self, holding: &Arc<Holding>) {
        let paused = self.paused();
        if paused.contains(&holding.partition) {
            holding.pause();
        }
        self.holdings().insert(holding.partition, Arc::clone(holding));
    }

    /// The nodes on which something is to be committed.
    fn pending_nodes(&self) -> Vec<NodeId> {
        let holdings = self.holdings();
        let pending = holdings.values().filter(|holding| holding.tracker().pending().is_some());
        let nodes: BTreeSet<NodeId> = pending.map(|holding| holding.partition.node()).collect();
        nodes.into_iter().collect()
    }

    fn note_uncommitted(&self, why: Error) {
        let mut uncommitted = lock(&self.uncommitted);
        // The first is what is told.
        if uncommitted.is_empty() {
            uncommitted.push(why);
        }
    }

    fn take_uncommitted(&self) -> Result<()> {
        lock(&self.uncommitted).pop().map_or(Ok(()), Err)
    }

    /// Says once that a reader waits for room.
    fn press(&self) {
        if !self.pressed.swap(true, Ordering::AcqRel) {
            self.send(Event::Pressure);
        }
    }

    /// Tells one node's member.
    fn tell(&self, node: NodeId, command: Command) {
        let commands = lock(&self.commands);
        if let Some((_, sender)) = commands.iter().find(|(known, _)| *known == node) {
            let _ = sender.send(command);
        }
    }

    /// The members of all nodes have ended: the stream ends too. Idempotent.
    async fn leave(&self) {
        roster::leave(self).await;
        if let Some(journal) = &self.journal {
            journal.close();
        }
        if self.options.broadcast && !self.left.is_cancelled() {
            Box::pin(self.remove_group()).await;
        }
        drop(lock(&self.events).take());
        self.left.cancel();
    }

    /// What this fails at is swept later.
    async fn remove_group(&self) {
        let names = (self.topology.topic.as_str(), self.group.as_str());
        let removed = timeout(GRACE, self.cluster.delete_group(names.0, names.1)).await;
        if let Ok(Err(error)) = removed {
            tracing::debug!(error = %error.chain(), "the group of a broadcast consumer stays for a while");
        }
    }

    fn send(&self, event: Event) {
        if let Some(events) = &*lock(&self.events) {
            // Nobody polls a stream that was dropped.
            let _ = events.send(event);
        }
    }

    async fn connection(&self, node: NodeId) -> Result<Connection> {
        self.cluster.inner.nodes.node(node).await?.get().await
    }

    /// What a row counts for: its bytes, or more where its messages are many and small.
    fn weight(&self, row: &Batch) -> usize {
        let each = self.options.prefetch_bytes / self.options.prefetch_messages;
        let many = (row.count as usize).saturating_mul(each);
        row.bytes.max(many.min(self.options.prefetch_bytes))
    }

    async fn failpoint(&self, name: &'static str) {
        if let Some(hook) = &self.options.failpoint {
            hook(name).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
