//! Sending messages.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, MessageId, NodeId};
use crate::message::{DEFAULT_MAX_PAYLOAD_LEN, MAX_PAYLOAD_LEN, Message};
use crate::metrics as names;
use crate::name::TopicName;
use crate::topology::{Topology, key_slot};

mod batch;
mod lane;
mod settle;
mod writer;

use batch::Batch;
pub use batch::Receipt;
use lane::Lane;
use writer::Writer;

/// What a full buffer does to whoever sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// They wait until there is room.
    #[default]
    Wait,
    /// They get an error of the kind [`ErrorKind::Full`].
    Fail,
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    max_payload: usize,
    buffer_bytes: usize,
    when_full: WhenFull,
    send_timeout: Duration,
    append_timeout: Duration,
    clock: Clock,
}

/// This machine's clock, so that a test can move it.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Settings of a [`Producer`].
#[derive(Debug)]
#[must_use = "a builder does nothing until build"]
pub struct ProducerBuilder {
    cluster: Cluster,
    topic: String,
    options: Options,
}

impl ProducerBuilder {
    pub(crate) fn new(cluster: Cluster, topic: &str) -> Self {
        let options = Options {
            max_payload: DEFAULT_MAX_PAYLOAD_LEN,
            buffer_bytes: 64 << 20,
            when_full: WhenFull::Wait,
            send_timeout: Duration::from_secs(30),
            append_timeout: Duration::from_secs(2),
            clock: Clock(Arc::new(SystemTime::now)),
        };
        Self { cluster, topic: topic.to_owned(), options }
    }

    /// The most bytes of a payload: 4 MiB by default, up to 64 MiB.
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.options.max_payload = bytes.min(MAX_PAYLOAD_LEN);
        self
    }

    /// How many bytes of messages may be under way: 64 MiB by default, at least 64 KiB. A message
    /// counts 64 bytes more than it has.
    pub fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.options.buffer_bytes = bytes.clamp(64 << 10, u32::MAX as usize);
        self
    }

    /// What a full buffer does to whoever sends: they wait by default.
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.options.when_full = when_full;
        self
    }

    /// How long a message is tried before it fails: 30 s by default.
    pub fn send_timeout(mut self, timeout: Duration) -> Self {
        self.options.send_timeout = timeout;
        self
    }

    /// How long one attempt may take before its connection is given up: 2 s by default.
    pub fn append_timeout(mut self, timeout: Duration) -> Self {
        self.options.append_timeout = timeout.max(Duration::from_millis(10));
        self
    }

    /// Takes another clock than this machine's, for tests.
    #[doc(hidden)]
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.options.clock = Clock(Arc::new(clock));
        self
    }

    /// Looks the topic up and makes the producer. Partitions are contacted when they are first written
    /// to. Cancel safe.
    pub async fn build(self) -> Result<Producer> {
        let topic = TopicName::new(&self.topic)?;
        let topology = self.cluster.topology(&topic).await?;
        if topology.partitions.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("topic {topic} has no partitions"),
            ));
        }
        let shared = Arc::new(Shared::new(self.cluster, topology, self.options));
        shared.cluster.keep_up();
        let tasks = &shared.cluster.inner.tasks;
        for writer in shared.writers.values() {
            tasks.spawn(writer::run(Arc::clone(&shared), Arc::clone(writer)));
        }
        Ok(Producer { handle: Arc::new(Handle { shared }) })
    }
}

/// Sends messages to a topic. Cheap to clone; clones share buffer and batches.
///
/// Messages that are sent while a batch is under way fill the next one, so that one flush of the disk
/// serves many: send from many tasks, [`enqueue`](Self::enqueue) from one, or
/// [`send_all`](Self::send_all).
///
/// Messages of one key that are sent one after the other are stored in that order.
#[derive(Clone)]
pub struct Producer {
    handle: Arc<Handle>,
}

/// Ends the producer's tasks with its last clone.
struct Handle {
    shared: Arc<Shared>,
}

impl Producer {
    /// Sends a message and waits until it is on disk. The id says where.
    ///
    /// Not cancel safe in the sense that a dropped future does not take the message back: once it is in
    /// the buffer it is sent.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the message is outside of a limit, [`ErrorKind::Full`] where the
    /// partition of its key is full until midnight UTC or the buffer is and was asked not to wait,
    /// [`ErrorKind::Timeout`] where it was certainly not stored in time, [`ErrorKind::Unknown`] where it
    /// may have been.
    pub async fn send(&self, message: Message) -> Result<MessageId> {
        let receipt = {
            let shared = &self.handle.shared;
            shared.admit(&message).await?;
            shared.push(&message)
        };
        // Its batch has a copy: nothing is kept twice while it is under way.
        drop(message);
        receipt.await
    }

    /// Puts a message into the buffer; the receipt waits until it is on disk. For one task that sends
    /// many: no task or channel for each message.
    ///
    /// Cancel safe: where the future is dropped before it is ready, nothing was sent.
    pub async fn enqueue(&self, message: Message) -> Result<Receipt> {
        let shared = &self.handle.shared;
        shared.admit(&message).await?;
        Ok(shared.push(&message))
    }

    /// Sends messages and waits for all. One result for each, in the order given; messages of one key
    /// are stored in that order. Not atomic: some may fail alone.
    pub async fn send_all(
        &self,
        messages: impl IntoIterator<Item = Message>,
    ) -> Vec<Result<MessageId>> {
        let mut receipts = Vec::new();
        for message in messages {
            receipts.push(self.enqueue(message).await);
        }
        let mut results = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            results.push(match receipt {
                Ok(receipt) => receipt.await,
                Err(error) => Err(error),
            });
        }
        results
    }

    /// Waits until everything that was sent before is on disk or has failed; the first failure is
    /// returned. Cancel safe.
    pub async fn flush(&self) -> Result<()> {
        let lanes = &self.handle.shared.lanes;
        // Twice, since a batch may go to another partition meanwhile, to one that was looked at before.
        let looks = lanes.iter().chain(lanes);
        let completions: Vec<_> = looks.flat_map(|lane| lane.completions()).collect();
        let mut outcome = Ok(());
        for completion in completions {
            outcome = outcome.and(completion.all().await);
        }
        outcome
    }

    /// Refuses new messages, and waits until all that were sent before are answered or the deadline is
    /// over; what is still under way then goes on in the background. Idempotent.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let shared = &self.handle.shared;
        shared.closed.store(true, Ordering::Release);
        shared.budget.close();
        let flushed = tokio::time::timeout(deadline, self.flush()).await;
        shared.maybe_end();
        flushed.unwrap_or_else(|_| {
            let what = format!("flush the producer of topic {}", shared.topology.topic);
            Err(Error::new(ErrorKind::Timeout, what))
        })
    }

    /// The topic's name.
    pub fn topic(&self) -> &TopicName {
        &self.handle.shared.topology.topic
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("topic", self.topic()).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.shared);
        shared.closed.store(true, Ordering::Release);
        shared.maybe_end();
    }
}

/// What a producer's clones and tasks share.
pub(crate) struct Shared {
    pub(crate) cluster: Cluster,
    pub(crate) topology: Topology,
    pub(crate) options: Options,
    pub(crate) lanes: Vec<Arc<Lane>>,
    writers: BTreeMap<NodeId, Arc<Writer>>,
    /// The lane of each key slot.
    slots: Vec<u16>,
    /// The lane that messages without a key fill now.
    current: AtomicUsize,
    budget: Semaphore,
    closed: AtomicBool,
    /// No message is left and none will come: the tasks end.
    pub(crate) ended: CancellationToken,
}

impl Shared {
    fn new(cluster: Cluster, topology: Topology, options: Options) -> Self {
        let connections = cluster.inner.nodes.connections();
        let writers: BTreeMap<NodeId, Arc<Writer>> = topology
            .by_node()
            .into_keys()
            .map(|node| (node, Arc::new(Writer::new(node, connections))))
            .collect();
        let lane = |(index, partition): (usize, &crate::id::PartitionId)| {
            let writer = Arc::clone(writers.get(&partition.node())?);
            Some(Arc::new(Lane::new(*partition, topology.generation, index, writer)))
        };
        let lanes: Vec<_> = topology.partitions.iter().enumerate().filter_map(lane).collect();
        // A random start, so that producers don't all begin with the same partition.
        let start = uuid::Uuid::new_v4().as_u128() as usize % lanes.len().max(1);
        Self {
            slots: topology.slot_table(),
            current: AtomicUsize::new(start),
            budget: Semaphore::new(options.buffer_bytes),
            closed: AtomicBool::new(false),
            ended: cluster.inner.shutdown.child_token(),
            cluster,
            topology,
            options,
            lanes,
            writers,
        }
    }

    /// What this machine's clock shows.
    pub(crate) fn now(&self) -> SystemTime {
        (self.options.clock.0)()
    }

    /// Today's date in UTC by this machine's clock.
    pub(crate) fn today(&self) -> Result<Day> {
        Day::of(self.now())
    }

    /// Checks a message, and takes room in the buffer for it.
    async fn admit(&self, message: &Message) -> Result<()> {
        message.check(self.options.max_payload)?;
        let cost = batch::cost(message).min(self.options.buffer_bytes);
        let cost = u32::try_from(cost).unwrap_or(u32::MAX);
        if let Ok(permit) = self.budget.try_acquire_many(cost) {
            permit.forget();
            return Ok(());
        }
        // Boxed, since it is rare: thousands of tasks that send are as large as their futures.
        Box::pin(self.wait_for_room(cost)).await
    }

    async fn wait_for_room(&self, cost: u32) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed("the producer"));
        }
        if self.options.when_full == WhenFull::Fail {
            let why =
                format!("the producer's buffer of {} bytes is full", self.options.buffer_bytes);
            return Err(Error::new(ErrorKind::Full, why));
        }
        let permit = self.budget.acquire_many(cost).await;
        permit.map(tokio::sync::SemaphorePermit::forget).map_err(|_| Error::closed("the producer"))
    }

    fn push(&self, message: &Message) -> Receipt {
        let lane = match &message.key {
            Some(key) => self.slots.get(usize::from(key_slot(key))).map_or(0, |i| usize::from(*i)),
            None => self.current.load(Ordering::Relaxed),
        };
        let mut lane = &self.lanes[lane];
        if message.key.is_none() && !self.is_open(lane) {
            lane = self.open_lane_after(lane.index).unwrap_or(lane);
            self.current.store(lane.index, Ordering::Relaxed);
        }
        let pushed = lane.push(message, self.options.send_timeout);
        if pushed.schedule {
            lane.writer.schedule(lane);
        }
        // After the push: the writer empties its lanes after the end, so one of the two sees it.
        if self.ended.is_cancelled() {
            self.abandon(lane);
        }
        if pushed.filled && message.key.is_none() {
            self.passed(lane);
        }
        pushed.receipt
    }

    /// A lane's batch has gone, or is full: messages without a key fill the next idle open lane, where
    /// there is one.
    pub(crate) fn passed(&self, lane: &Lane) {
        if self.current.load(Ordering::Relaxed) != lane.index {
            return;
        }
        let idle = self.lanes_after(lane.index).find(|lane| lane.is_idle() && self.is_open(lane));
        let next = idle.or_else(|| self.open_lane_after(lane.index));
        if let Some(next) = next {
            self.current.store(next.index, Ordering::Relaxed);
        }
    }

    /// The next lane that takes messages without a key, other than this one.
    pub(crate) fn open_lane_after(&self, index: usize) -> Option<&Arc<Lane>> {
        self.lanes_after(index).find(|lane| self.is_open(lane))
    }

    /// Whether messages without a key may go to this lane. A full one opens again at midnight UTC.
    fn is_open(&self, lane: &Lane) -> bool {
        lane.is_open(|| self.today().ok())
    }

    fn lanes_after(&self, index: usize) -> impl Iterator<Item = &Arc<Lane>> {
        let count = self.lanes.len();
        (1..count).map(move |step| &self.lanes[(index + step) % count])
    }

    /// Answers a batch's receipts and gives its room back.
    pub(crate) fn answer(&self, batch: &Batch, result: Result<MessageId>) {
        let count = u64::from(batch.len());
        match &result {
            Ok(_) => {
                ::metrics::counter!(names::SENT).increment(count);
                ::metrics::counter!(names::APPENDED).increment(1);
            }
            Err(_) => ::metrics::counter!(names::SEND_FAILED).increment(count),
        }
        batch.tickets.complete(result);
        self.budget.add_permits(batch.cost.min(self.options.buffer_bytes));
    }

    /// Nothing is sent any more: answers what waits in a lane.
    pub(crate) fn abandon(&self, lane: &Lane) {
        for batch in lane.abandon() {
            self.answer(&batch, Err(Error::closed("the producer or its cluster")));
        }
    }

    /// A lane's batch is answered: the next may go.
    pub(crate) fn finish(&self, lane: &Arc<Lane>) {
        if lane.finish() {
            lane.writer.schedule(lane);
        }
        self.maybe_end();
    }

    fn maybe_end(&self) {
        if self.closed.load(Ordering::Acquire) && self.lanes.iter().all(|lane| lane.is_idle()) {
            self.ended.cancel();
        }
    }
}
