//! Sending messages.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::MessageId;
use crate::message::{DEFAULT_MAX_PAYLOAD_LEN, MAX_PAYLOAD_LEN, Message};
use crate::name::TopicName;

mod balancer;
pub(crate) mod batch;
mod desertion;
mod failover;
mod health;
mod lane;
mod line;
mod outbox;
mod settle;
mod shared;
mod status;
mod writer;

use balancer::Own;
pub use balancer::{Balancer, Outgoing};
pub use batch::Receipt;
pub use health::NodeState;
use line::Lines;
pub use outbox::MAX_DELAYED;
pub(crate) use shared::Shared;
pub use status::{NodeStatus, ProducerEvent, ProducerEvents, ProducerStatus};

/// The shortest that timeouts may be.
const LEAST: Duration = Duration::from_millis(10);
/// The longest that one attempt may take, beside the time for its bytes.
const LONGEST_APPEND: Duration = Duration::from_hours(1);

/// What a full buffer does to whoever sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// They wait until there is room.
    #[default]
    Wait,
    /// They get an error of the kind [`ErrorKind::Full`].
    Fail,
}

/// What a producer does with a message that has a key, or a [dedup key](Message::dedup_key), while
/// the node of its partition is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyFailover {
    /// It waits for the node, up to the [send timeout](ProducerBuilder::send_timeout): the order by
    /// key is kept.
    #[default]
    Wait,
    /// It fails at once, with an error of the kind [`ErrorKind::Unavailable`], or
    /// [`ErrorKind::Unknown`] where it was under way and the node does not say whether it was
    /// stored.
    Fail,
    /// It goes to a partition of another node, like a message without a key: the order by key is
    /// lost where that happens. One with a dedup key waits all the same, since it is known on its
    /// own node only.
    Divert,
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    max_payload: usize,
    buffer_bytes: usize,
    when_full: WhenFull,
    send_timeout: Duration,
    append_timeout: Duration,
    key_failover: KeyFailover,
    probe_interval: (Duration, Duration),
    balancer: Option<Own>,
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
            key_failover: KeyFailover::Wait,
            probe_interval: (Duration::from_secs(1), Duration::from_mins(1)),
            balancer: None,
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

    /// How long a message is tried before it fails: 30 s by default, 10 ms at least,
    /// [`Duration::MAX`] for as long as it takes. It waits for as long at most before, where the
    /// buffer is full. The last attempt may end an [append timeout](Self::append_timeout) later,
    /// and the question what became of it another one.
    pub fn send_timeout(mut self, timeout: Duration) -> Self {
        self.options.send_timeout = timeout.max(LEAST);
        self
    }

    /// How long one attempt may take before its connection is given up: 2 s by default, 10 ms to 1
    /// h. To wait for a free connection, and to make one, may take as long each; a second more is
    /// allowed for each MiB that is sent.
    pub fn append_timeout(mut self, timeout: Duration) -> Self {
        self.options.append_timeout = timeout.clamp(LEAST, LONGEST_APPEND);
        self
    }

    /// Takes partitions by a rule of the caller's own; see [`Balancer`].
    pub fn balancer(mut self, balancer: impl Balancer) -> Self {
        self.options.balancer = Some(Own::new(balancer));
        self
    }

    /// What to do with messages that have a key while the node of their partition is away: they
    /// wait by default. Those without a key go to other nodes in any case.
    pub fn key_failover(mut self, failover: KeyFailover) -> Self {
        self.options.key_failover = failover;
        self
    }

    /// How long after its failure a node is probed at the latest, and how long at most between two
    /// probes, which come less and less often: 1 s and 60 s by default, 10 ms at least. Each comes
    /// at a random time within that, so that not all processes probe at once. A message that waits
    /// for the node is tried each second besides.
    pub fn probe_interval(mut self, first: Duration, longest: Duration) -> Self {
        let first = first.max(LEAST);
        self.options.probe_interval = (first, longest.max(first));
        self
    }

    /// Takes another clock than this machine's, for tests.
    #[doc(hidden)]
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.options.clock = Clock(Arc::new(clock));
        self
    }

    /// Looks the topic up and makes the producer. Partitions are contacted when they are first
    /// written to. Cancel safe.
    pub async fn build(self) -> Result<Producer> {
        let topic = TopicName::new(&self.topic)?;
        let topology = self.cluster.topology(&topic).await?;
        if topology.partitions.is_empty() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("topic {topic} has no partitions"),
            ));
        }
        let tasks = self.cluster.inner.tasks.clone();
        self.cluster.keep_up();
        let shared = Arc::new(Shared::new(self.cluster, topology, self.options));
        let lines = Arc::new(Lines::new(shared));
        tasks.spawn(line::watch(Arc::downgrade(&lines)));
        Ok(Producer { handle: Arc::new(Handle { lines }) })
    }
}

/// Sends messages to a topic. Cheap to clone; clones share buffer and batches.
///
/// Messages that are sent while a batch is under way fill the next one, so that one flush of the
/// disk serves many: send from many tasks, [`enqueue`](Self::enqueue) from one, or
/// [`send_all`](Self::send_all).
///
/// Messages of one key that are sent one after the other are stored in that order.
///
/// Where a node fails, messages without a key go on through the others at once; those with one do
/// as [configured](ProducerBuilder::key_failover). A node that is back is used again by itself.
///
/// To drop the last clone without a [`shutdown`](Self::shutdown) drops what is not under way yet:
/// the receipts fail, and an error is logged that says how many messages these were.
#[derive(Clone)]
pub struct Producer {
    handle: Arc<Handle>,
}

/// Ends the producer's tasks with its last clone.
struct Handle {
    lines: Arc<Lines>,
}

impl Producer {
    /// Sends a message and waits until it is on disk. The id says where.
    ///
    /// Not cancel safe in the sense that a dropped future does not take the message back: once it
    /// is in the buffer it is sent.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the message is outside of a limit, [`ErrorKind::Full`] where
    /// the partition of its key is full until midnight UTC or the buffer is and was asked not to
    /// wait, [`ErrorKind::Timeout`] where it was certainly not stored in time,
    /// [`ErrorKind::Unknown`] where it may have been, [`ErrorKind::Closed`] where the producer or
    /// its cluster was shut down, or the runtime in which they were made has ended.
    pub async fn send(&self, message: Message) -> Result<MessageId> {
        let receipt = self.put(&message).await?;
        // Its batch has a copy: nothing is kept twice while it is under way.
        drop(message);
        receipt.await
    }

    /// Puts a message into the buffer; the receipt waits until it is on disk. For one task that
    /// sends many: no task or channel for each message.
    ///
    /// Cancel safe: where the future is dropped before it is ready, nothing was sent.
    pub async fn enqueue(&self, message: Message) -> Result<Receipt> {
        self.put(&message).await
    }

    /// Puts a message into the buffer of the topic as it is now.
    async fn put(&self, message: &Message) -> Result<Receipt> {
        loop {
            let shared = self.handle.lines.current();
            match shared.admit(message).await {
                Ok(()) => return shared.push(message),
                // It waited for room, and another topic has the name by now.
                Err(_) if shared.is_replaced() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends messages and waits for all. One result for each, in the order given; messages of one
    /// key are stored in that order. Not atomic: some may fail alone.
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
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] where the runtime in which the producer was made has ended.
    pub async fn flush(&self) -> Result<()> {
        if let Some(deserted) =
            self.handle.lines.all().iter().find(|line| line.deserted.load(Ordering::Acquire))
        {
            return Err(deserted.why_closed());
        }
        let of_line = |shared: &Arc<Shared>| -> Vec<_> {
            let _moving = shared.moving();
            // Twice, since a batch may go to another partition meanwhile, to one that was looked at
            // before.
            let looks = shared.lanes.iter().chain(&shared.lanes);
            looks.flat_map(|lane| lane.completions()).collect()
        };
        let completions: Vec<_> = self.handle.lines.all().iter().flat_map(of_line).collect();
        let mut outcome = Ok(());
        for completion in completions {
            outcome = outcome.and(completion.all().await);
        }
        outcome
    }

    /// Refuses new messages, and waits until all that were sent before are answered or the deadline
    /// is over; what is still under way then goes on in the background. Idempotent.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let shared = self.handle.lines.current();
        shared.closed.store(true, Ordering::Release);
        shared.budget.close();
        let flushed = tokio::time::timeout(deadline, self.flush()).await;
        shared.maybe_end();
        flushed.unwrap_or_else(|_| {
            let what = format!("flush the producer of topic {}", shared.topology.topic);
            Err(Error::new(ErrorKind::Timeout, what))
        })
    }

    /// How the producer and the nodes it writes to fare.
    pub fn status(&self) -> ProducerStatus {
        status::of(&self.handle.lines.current())
    }

    /// What happens to the producer from now on. Who does not read misses what is older than the
    /// last 256 events. Ends with the producer.
    pub fn events(&self) -> ProducerEvents {
        self.handle.lines.current().events.listen()
    }

    /// The topic's name.
    pub fn topic(&self) -> &TopicName {
        &self.handle.lines.topic
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("topic", self.topic()).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let shared = self.lines.current();
        if !shared.closed.swap(true, Ordering::AcqRel) {
            let dropped: u64 = shared.lanes.iter().map(|lane| shared.abandon(lane)).sum();
            if dropped > 0 {
                tracing::error!(
                    topic = %shared.topology.topic, dropped,
                    "a producer was dropped without a shutdown: messages were not sent"
                );
            }
        }
        shared.maybe_end();
    }
}
