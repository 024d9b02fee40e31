//! Settings of a consumer, and how it joins its group.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::consumer::aside::Aside;
use crate::consumer::budget::Budget;
use crate::consumer::ending::Life;
use crate::consumer::filter::Filter;
use crate::consumer::holding::Bounds;
use crate::consumer::journal::Journal;
use crate::consumer::wanted::{Reach, Wanted};
use crate::consumer::{
    ConsumerHandle, Messages, Order, RetryPolicy, Shared, Start, Unreadable, check_known, start,
};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::events::Teller;
use crate::id::PartitionId;
use crate::name::{GroupName, TopicName};
use crate::topology::Topology;

#[derive(Clone)]
pub(crate) struct Options {
    pub(super) start: Start,
    pub(super) broadcast: bool,
    pub(super) order: Order,
    pub(super) retry_policy: RetryPolicy,
    pub(super) prefetch_messages: usize,
    pub(super) prefetch_bytes: usize,
    pub(super) lease: Duration,
    pub(super) poll_interval: Duration,
    pub(super) flush_interval: Duration,
    pub(super) drain_timeout: Duration,
    pub(super) bounds: Bounds,
    pub(super) journal: Option<PathBuf>,
    pub(super) only: Option<Vec<PartitionId>>,
    pub(super) filter: Option<Arc<Filter>>,
    pub(super) unreadable: Unreadable,
    pub(super) failpoint: Option<Failpoint>,
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
            broadcast: false,
            order: Order::ByPartition,
            retry_policy: RetryPolicy::default(),
            prefetch_messages: 100_000,
            prefetch_bytes: 16 << 20,
            lease: Duration::from_secs(10),
            poll_interval: Duration::from_secs(5),
            flush_interval: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(10),
            bounds: Bounds { messages: 100_000, runs: 10_000 },
            journal: None,
            only: None,
            filter: None,
            unreadable: Unreadable::default(),
            failpoint: None,
        };
        Self { cluster, topic: topic.to_owned(), group: group.to_owned(), options }
    }

    /// A group of this consumer alone, which goes when it has gone: it begins with what is sent
    /// from now on.
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

    /// When a message that failed is tried again, and when it goes to the dead letters of the
    /// group: by default after 100 ms, then twice as long each time up to 30 s, and after 50
    /// attempts.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.options.retry_policy = policy;
        self
    }

    /// How many messages may be fetched and not yet handed out: 100,000 by default, at least 1.
    /// Whole batches are fetched, so that a batch may exceed it.
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

    /// How long after its last sign of life a consumer's partitions go to others: 10 s by default,
    /// 1 s to 10 min. Renewed three times in that time.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(Duration::from_secs(1), Duration::from_mins(10));
        self
    }

    /// How often to look for messages without a hint, at the latest: every 5 s by default, 10 ms to
    /// 1 h. While hints do not arrive
    /// ([`ConsumerStatus::notifier`](crate::ConsumerStatus::notifier)), every 50 ms where some came
    /// lately, and less often up to this where none did.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.options.poll_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_hours(1));
        self
    }

    /// How often acknowledgements are committed where there are some: every second by default, 10
    /// ms to 1 min. Less often where a commit takes longer than a tenth of that, up to every 10 s.
    pub fn flush_interval(mut self, interval: Duration) -> Self {
        self.options.flush_interval =
            interval.clamp(Duration::from_millis(10), Duration::from_mins(1));
        self
    }

    /// How long deliveries may be in hand of a partition that goes to another member: 10 s by
    /// default, 0 to 10 min. Then it goes without them, and they are delivered there again.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.options.drain_timeout = timeout.min(Duration::from_mins(10));
        self
    }

    /// How many messages of a partition may lie between the first that is not acknowledged and the
    /// last that was read: 100,000 by default, at least 1. Where one is stuck, its partition waits
    /// at that. Whole batches are read, so that one batch may exceed it.
    pub fn max_unacked(mut self, messages: usize) -> Self {
        self.options.bounds.messages = messages.max(1);
        self
    }

    /// How many separate runs of acknowledged messages may lie behind the first that is not
    /// acknowledged, in a partition: 10,000 by default, at least 1. They are stored with the
    /// cursor; no more are handed out until there are half as many.
    pub fn max_acked_runs(mut self, runs: usize) -> Self {
        self.options.bounds.runs = runs.max(1);
        self
    }

    /// Keeps acknowledgements in this directory until they are committed, so that they survive when
    /// the process is killed: of what was acknowledged nothing is delivered again, if a consumer of
    /// the same cluster, topic, group and directory is started before others take its partitions,
    /// and the node's server was not started again meanwhile. Not when the machine dies. The
    /// directory is made if it is missing, and may be shared by consumers of other groups and
    /// topics. An acknowledgement costs a write then, of some microseconds. Messages that were
    /// parked, after they had failed, are not in it.
    pub fn journal(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.journal = Some(directory.into());
        self
    }

    /// Takes these partitions and no others, instead of an even share of all. Members without a
    /// list leave them alone while this one lives. Where two lists have the same one, who has it
    /// keeps it.
    pub fn partitions(mut self, partitions: impl IntoIterator<Item = PartitionId>) -> Self {
        self.options.only = Some(partitions.into_iter().collect());
        self
    }

    /// Hands out the messages that this chooses and no others: those are done as soon as they are
    /// passed over, for the whole group. So all its members should have the same filter, and a new
    /// one is for what the group has not consumed yet. Payloads are not looked at.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.options.filter = Some(Arc::new(filter));
        self
    }

    /// What becomes of messages that are stored and can't be read: by default they become dead
    /// letters without key, headers and payload, and the partition goes on.
    pub fn unreadable(mut self, unreadable: Unreadable) -> Self {
        self.options.unreadable = unreadable;
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
    /// control database can't be reached and the topic is known neither here nor from a [topology
    /// file](crate::ClusterBuilder::topology_file), or the group on no node. Nodes that can't be
    /// reached are no error: their messages come when they are back. [`ErrorKind::Conflict`] where
    /// another consumer has the [journal](Self::journal), [`ErrorKind::Invalid`] where it can't be
    /// used, or where the [filter](Self::filter) asks for a header that is reserved.
    pub async fn stream(self) -> Result<Messages> {
        let topic = TopicName::new(&self.topic)?;
        let group = GroupName::new(&self.group)?;
        self.options.filter.as_ref().map_or(Ok(()), |filter| filter.check())?;
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
        let (failures, failed) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            told: Teller::new(),
            budget: Budget::new(self.options.prefetch_bytes),
            failures: Mutex::new(Some(failures)),
            aside: Aside::default(),
            parked_wakers: Mutex::default(),
            drop_said: AtomicBool::new(false),
            member,
            journal,
            wanted: Mutex::new(Wanted::These(BTreeSet::new())),
            dead: Mutex::default(),
            reach: Reach::default(),
            holdings: Mutex::default(),
            paused: Mutex::default(),
            failed_readers: Mutex::default(),
            turns: AtomicI64::default(),
            flushes: Arc::default(),
            uncommitted: Mutex::default(),
            pressed: AtomicBool::new(false),
            events: Mutex::new(Some(events)),
            ended_by: OnceLock::new(),
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
        let (launched, life) = (Arc::clone(&shared), Life::new(&shared));
        let tasks = &shared.cluster.inner.tasks;
        tasks.spawn(Arc::clone(&shared).keep_watching_failures(failed));
        let _ = tasks.spawn(async move { launched.launch(life).await }).await;
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
