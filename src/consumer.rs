//! Receiving messages: consumers of a group share the partitions of a topic and keep only a cursor.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
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
mod holding;
mod member;
mod messages;
mod reader;
mod roster;
mod start;

use holding::Holding;
use member::Command;
pub use messages::{Delivery, Messages};
pub(crate) use roster::jitter;
use start::GroupStart;

/// Where a group starts that has not consumed the topic before. Later it goes on from its cursor.
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
        Self {
            cluster,
            topic: topic.to_owned(),
            group: group.to_owned(),
            options,
        }
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
        self.options.lease = lease.clamp(Duration::from_secs(1), Duration::from_secs(600));
        self
    }

    /// How often to look for messages without a hint: every 5 s by default, give or take a fifth; 10 ms
    /// to 1 h.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.options.poll_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_secs(3600));
        self
    }

    /// How often acknowledgements are committed where there are some: every second by default, 10 ms
    /// to 1 min.
    pub fn flush_interval(mut self, interval: Duration) -> Self {
        self.options.flush_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_secs(60));
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
    /// control database can't be reached. Nodes that can't be reached are no error: their messages come
    /// when they are back.
    pub async fn stream(self) -> Result<Messages> {
        let topic = TopicName::new(&self.topic)?;
        let group = GroupName::new(&self.group)?;
        let topology = self.cluster.topology(&topic).await?;
        check_partitions(&topology, self.options.only.as_deref())?;
        let start = start::resolve(&self.cluster, &topology, &group, self.options.start).await?;
        let (events, receiver) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            budget: Arc::new(Semaphore::new(self.options.prefetch_bytes)),
            // Time-ordered, so that members rank by when they joined.
            member: Uuid::now_v7(),
            share: AtomicUsize::new(topology.partitions.len()),
            held: AtomicUsize::new(0),
            events: Mutex::new(Some(events)),
            stopping: self.cluster.inner.shutdown.child_token(),
            left: CancellationToken::new(),
            commands: Mutex::default(),
            cluster: self.cluster,
            topology,
            group,
            start,
            options: self.options,
        });
        shared.cluster.keep_up();
        shared.launch().await;
        Ok(Messages::new(
            receiver,
            topic,
            ConsumerHandle {
                owner: Arc::new(Owner { shared }),
            },
        ))
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
    let stranger = only
        .unwrap_or_default()
        .iter()
        .find(|p| !topology.partitions.contains(p));
    stranger.map_or(Ok(()), |partition| {
        let what = format!(
            "partition {partition} is not one of topic {}",
            topology.topic
        );
        Err(Error::new(ErrorKind::NotFound, what))
    })
}

/// Flushes and shuts down a consumer, from any task. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHandle {
    owner: Arc<Owner>,
}

/// Gives the partitions back when the last handle and the stream are gone.
struct Owner {
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
        let answers = self.owner.shared.command(Command::Flush);
        let mut outcome = Ok(());
        for answer in join_all(answers).await {
            outcome = outcome.and(answer.unwrap_or_else(|_| Err(Error::closed("the consumer"))));
        }
        if self.owner.shared.left.is_cancelled() {
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
        let shared = &self.owner.shared;
        if shared.stopping.is_cancelled() {
            shared.left.cancelled().await;
            return Ok(());
        }
        shared.stopping.cancel();
        let until = Instant::now() + deadline;
        let answers = join_all(shared.command(|reply| Command::Stop { until, reply }));
        let grace = deadline + Duration::from_secs(5);
        let mut outcome = Ok(());
        match tokio::time::timeout(grace, answers).await {
            Ok(answers) => {
                for answer in answers {
                    outcome = outcome.and(answer.unwrap_or(Ok(())));
                }
            }
            Err(_) => {
                let what = "commit acknowledgements at shutdown: a node did not answer";
                outcome = Err(Error::new(ErrorKind::Timeout, what));
            }
        }
        shared.leave().await;
        outcome
    }

    /// The partitions that this consumer owns now.
    pub fn held_partitions(&self) -> usize {
        self.owner.shared.held.load(Ordering::Acquire)
    }
}

impl fmt::Debug for ConsumerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.owner.shared;
        f.debug_struct("ConsumerHandle")
            .field("member", &shared.member)
            .field("group", &shared.group)
            .field("held", &shared.held)
            .finish_non_exhaustive()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.shared);
        if shared.stopping.is_cancelled() {
            return;
        }
        shared.stopping.cancel();
        let until = Instant::now();
        let answers = shared.command(|reply| Command::Stop { until, reply });
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                join_all(answers).await;
                shared.leave().await;
            });
        }
    }
}

/// What goes through the stream's channel.
pub(crate) enum Event {
    /// Messages of one row, from an id on, with the room that they take.
    Batch {
        holding: Arc<Holding>,
        row: Arc<Batch>,
        from: i64,
        permit: Option<OwnedSemaphorePermit>,
    },
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
    /// Bytes that may be fetched and not yet handed out.
    budget: Arc<Semaphore>,
    /// How many partitions are this member's even share.
    share: AtomicUsize,
    held: AtomicUsize,
    stopping: CancellationToken,
    left: CancellationToken,
    commands: Mutex<Vec<(NodeId, mpsc::UnboundedSender<Command>)>>,
}

impl Shared {
    /// Registers, then starts the roster and one member for each node.
    async fn launch(self: &Arc<Self>) {
        roster::beat(self).await;
        let tasks = &self.cluster.inner.tasks;
        tasks.spawn(roster::run(Arc::clone(self)));
        for (node, partitions) in self.topology.by_node() {
            let wanted = |p: &PartitionId| self.options.only.as_ref().is_none_or(|o| o.contains(p));
            let partitions: Vec<PartitionId> = partitions.into_iter().filter(wanted).collect();
            if partitions.is_empty() {
                continue;
            }
            let (sender, commands) = mpsc::unbounded_channel();
            self.commands
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((node, sender));
            tasks.spawn(member::run(Arc::clone(self), node, partitions, commands));
        }
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

    /// The members of all nodes have ended: the stream ends too.
    async fn leave(&self) {
        roster::leave(self).await;
        drop(
            self.events
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
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

    /// Takes room for one fetch.
    async fn reserve(&self) -> Result<OwnedSemaphorePermit> {
        let size = (self.options.prefetch_bytes / 4).clamp(1, 1 << 20);
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.budget).acquire_many_owned(size).await;
        permit.map_err(|_| Error::closed("the consumer"))
    }

    /// What a row counts for: its bytes, or more where its messages are many and small.
    fn weight(&self, row: &Batch) -> usize {
        let each = self.options.prefetch_bytes / self.options.prefetch_messages;
        row.bytes.max(row.count as usize * each)
    }

    async fn failpoint(&self, name: &'static str) {
        if let Some(hook) = &self.options.failpoint {
            hook(name).await;
        }
    }
}
