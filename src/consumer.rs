//! Receiving messages: consumers of a group share the partitions of a topic and keep only a cursor.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
use crate::store::node::Connection;
use crate::topology::Topology;

mod acks;
mod budget;
mod commit;
mod holding;
mod lease;
mod member;
mod messages;
mod reader;
mod roster;
mod seat;
pub(crate) mod start;

use budget::{Budget, Room};
use holding::Holding;
use member::Command;
pub use messages::{Delivery, Messages};
pub(crate) use roster::jitter;
use seat::Seats;
use start::GroupStart;

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

#[derive(Clone)]
pub(crate) struct Options {
    start: Start,
    prefetch_messages: usize,
    prefetch_bytes: usize,
    lease: Duration,
    poll_interval: Duration,
    flush_interval: Duration,
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
            prefetch_messages: 100_000,
            prefetch_bytes: 16 << 20,
            lease: Duration::from_secs(10),
            poll_interval: Duration::from_secs(5),
            flush_interval: Duration::from_secs(1),
            only: None,
            failpoint: None,
        };
        Self { cluster, topic: topic.to_owned(), group: group.to_owned(), options }
    }

    /// Where the group starts if it is new: at the earliest message by default.
    pub fn start(mut self, start: Start) -> Self {
        self.options.start = start;
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
    /// to 1 min.
    pub fn flush_interval(mut self, interval: Duration) -> Self {
        self.options.flush_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_mins(1));
        self
    }

    /// Takes these partitions and no others, instead of an even share of all. Who else owns one keeps
    /// it.
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
    /// be reached are no error: their messages come when they are back.
    pub async fn stream(self) -> Result<Messages> {
        let topic = TopicName::new(&self.topic)?;
        let group = GroupName::new(&self.group)?;
        let topology = self.cluster.topology(&topic).await?;
        check_partitions(&topology, self.options.only.as_deref())?;
        // Boxed, as the rest is: whoever consumes carries it.
        let start = start::resolve(&self.cluster, &topology, &group, self.options.start);
        let start = Box::pin(start).await?;
        let (events, receiver) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            budget: Budget::new(self.options.prefetch_bytes),
            // Time-ordered, so that members rank by when they joined.
            member: Uuid::now_v7(),
            share: AtomicUsize::new(topology.partitions.len()),
            seats: Arc::default(),
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
        Box::pin(shared.launch()).await;
        Ok(Messages::new(receiver, topic, ConsumerHandle { shared }))
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

fn check_partitions(topology: &Topology, only: Option<&[PartitionId]>) -> Result<()> {
    if only.is_some_and(<[_]>::is_empty) {
        return Err(Error::invalid("the list of partitions to take is empty"));
    }
    let stranger = only.unwrap_or_default().iter().find(|p| !topology.partitions.contains(p));
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
        let answers = self.shared.command(Command::Flush);
        let mut outcome = Ok(());
        for answer in join_all(answers).await {
            outcome = outcome.and(answer.unwrap_or_else(|_| Err(Error::closed("the consumer"))));
        }
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
            outcome
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
        self.shared.seats.occupied()
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
            .field("held", &shared.seats.occupied())
            .finish_non_exhaustive()
    }
}

/// What goes through the stream's channel.
pub(crate) enum Event {
    /// Messages of one row, from an id on, with the room that they take. Patchy: some of them were
    /// acknowledged in an earlier holding.
    Batch { holding: Arc<Holding>, row: Arc<Batch>, from: i64, patchy: bool, room: Room },
    /// News for whoever consumes.
    Error(Error),
}

/// What a consumer's tasks share.
pub(crate) struct Shared {
    cluster: Cluster,
    topology: Topology,
    group: GroupName,
    member: Uuid,
    start: GroupStart,
    options: Options,
    /// Taken when the consumer has left: the stream ends then.
    events: Mutex<Option<mpsc::UnboundedSender<Event>>>,
    budget: Arc<Budget>,
    /// How many partitions are this member's even share.
    share: AtomicUsize,
    seats: Arc<Seats>,
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
        // Where that fails it has every partition that is free, until a heartbeat says what its share is.
        let _ = roster::beat(self).await;
        let tasks = &self.cluster.inner.tasks;
        tasks.spawn(roster::run(Arc::clone(self)));
        let mut members = Vec::new();
        for (node, partitions) in self.topology.by_node() {
            let wanted = |p: &PartitionId| self.options.only.as_ref().is_none_or(|o| o.contains(p));
            let partitions: Vec<PartitionId> = partitions.into_iter().filter(wanted).collect();
            if partitions.is_empty() {
                continue;
            }
            let (sender, commands) = mpsc::unbounded_channel();
            self.commands.lock().unwrap_or_else(PoisonError::into_inner).push((node, sender));
            members.push(tasks.spawn(member::run(Arc::clone(self), node, partitions, commands)));
        }
        // However they end, by a shutdown of the consumer or of the whole cluster.
        let shared = Arc::clone(self);
        tasks.spawn(async move {
            join_all(members).await;
            shared.leave().await;
        });
    }

    /// Tells every node's member to give everything back; returns their answers to come. None where
    /// they were told before.
    fn stop(&self, until: Instant) -> Option<Vec<oneshot::Receiver<Result<()>>>> {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.stopping.cancel();
        Some(self.command(|reply| Command::Stop { until, reply }))
    }

    /// Tells every node's member; returns their answers to come.
    fn command(
        &self,
        make: impl Fn(oneshot::Sender<Result<()>>) -> Command,
    ) -> Vec<oneshot::Receiver<Result<()>>> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let tell = |(_, sender): &(NodeId, mpsc::UnboundedSender<Command>)| {
            let (reply, answer) = oneshot::channel();
            // A member that has ended drops the reply, which the receiver sees.
            let _ = sender.send(make(reply));
            answer
        };
        commands.iter().map(tell).collect()
    }

    /// Tells one node's member.
    fn tell(&self, node: NodeId, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, sender)) = commands.iter().find(|(known, _)| *known == node) {
            let _ = sender.send(command);
        }
    }

    /// The members of all nodes have ended: the stream ends too. Idempotent.
    async fn leave(&self) {
        roster::leave(self).await;
        drop(self.events.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.left.cancel();
    }

    fn send(&self, event: Event) {
        if let Some(events) = &*self.events.lock().unwrap_or_else(PoisonError::into_inner) {
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
