//! What a producer's clones and tasks share: its lanes, its buffer, and which lane a message goes
//! to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::events::Teller;
use crate::id::{Day, MessageId, NodeId};
use crate::message::Message;
use crate::metrics as names;
use crate::producer::balancer::Own;
use crate::producer::batch::{self, Batch, Receipt};
use crate::producer::health::NodeState;
use crate::producer::lane::Lane;
use crate::producer::status::{ProducerEvent, Waiting};
use crate::producer::writer::Writer;
use crate::producer::{Options, WhenFull};
use crate::store::append::Each;
use crate::topology::{Topology, key_slot};

/// How many open lanes are looked at for an idle one: where thousands are all busy, the search
/// would cost more than it finds.
const LOOK_AT: usize = 256;

/// What a producer's clones and tasks share.
pub(crate) struct Shared {
    pub(crate) cluster: Cluster,
    pub(crate) topology: Topology,
    pub(crate) options: Options,
    pub(crate) lanes: Vec<Arc<Lane>>,
    pub(super) writers: BTreeMap<NodeId, Arc<Writer>>,
    /// The lane of each key slot.
    slots: Vec<u16>,
    /// The lane that messages without a key fill now.
    current: AtomicUsize,
    pub(super) budget: Semaphore,
    /// How many senders wait for room in the buffer.
    pub(super) waiting: AtomicUsize,
    pub(super) closed: AtomicBool,
    moving: Mutex<()>,
    /// Some node's state is another now.
    pub(super) changed: Notify,
    pub(super) events: Arc<Teller<ProducerEvent>>,
    /// Why nothing goes here any more: another topic has the name.
    replaced: OnceLock<Error>,
    /// No message is left and none will come: the tasks end.
    pub(crate) ended: CancellationToken,
    /// A task was dropped before its end.
    pub(super) deserted: AtomicBool,
}

impl Shared {
    pub(super) fn new(cluster: Cluster, topology: Topology, options: Options) -> Self {
        let connections = cluster.inner.nodes.connections();
        let writers: BTreeMap<NodeId, Arc<Writer>> = topology
            .by_node()
            .into_keys()
            .map(|node| (node, Arc::new(Writer::new(node, connections, options.probe_interval))))
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
            waiting: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            moving: Mutex::default(),
            changed: Notify::new(),
            events: Arc::new(Teller::new()),
            replaced: OnceLock::new(),
            ended: cluster.inner.shutdown.child_token(),
            deserted: AtomicBool::new(false),
            cluster,
            topology,
            options,
            lanes,
            writers,
        }
    }

    /// The same for another topic of the same name.
    pub(super) fn for_another(&self, topology: Topology) -> Self {
        let balancer = self.options.balancer.as_ref().map(Own::anew);
        let options = Options { balancer, ..self.options.clone() };
        let events = Arc::clone(&self.events);
        Self { events, ..Self::new(self.cluster.clone(), topology, options) }
    }

    /// Another topic has the name: answers what is left, and ends then.
    pub(super) fn end_with(&self, why: Error) {
        let _ = self.replaced.set(why);
        self.closed.store(true, Ordering::Release);
        self.budget.close();
        self.maybe_end();
    }

    pub(super) fn is_replaced(&self) -> bool {
        self.replaced.get().is_some()
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
    pub(super) async fn admit(&self, message: &Message) -> Result<()> {
        message.check(self.options.max_payload)?;
        let cost = u32::try_from(self.cost(message)).unwrap_or(u32::MAX);
        if let Ok(permit) = self.budget.try_acquire_many(cost) {
            permit.forget();
            return Ok(());
        }
        // Boxed, since it is rare: thousands of tasks that send are as large as their futures.
        Box::pin(self.wait_for_room(cost)).await
    }

    /// The room that a message takes in the buffer.
    fn cost(&self, message: &Message) -> usize {
        batch::cost(message).min(self.options.buffer_bytes)
    }

    /// Waits for no longer than a message is tried.
    async fn wait_for_room(&self, cost: u32) -> Result<()> {
        if self.budget.is_closed() {
            return Err(self.why_closed());
        }
        if self.options.when_full == WhenFull::Fail {
            let why =
                format!("the producer's buffer of {} bytes is full", self.options.buffer_bytes);
            return Err(Error::new(ErrorKind::Full, why));
        }
        let waiting = Waiting::new(self);
        let limit = self.options.send_timeout;
        let permit = timeout(limit, self.budget.acquire_many(cost)).await;
        drop(waiting);
        if let Ok(permit) = permit {
            return permit.map(SemaphorePermit::forget).map_err(|_| self.why_closed());
        }
        let (bytes, seconds) = (self.options.buffer_bytes, limit.as_secs_f32());
        let why = format!("the producer's buffer of {bytes} bytes had no room within {seconds} s");
        Err(Error::new(ErrorKind::Timeout, why))
    }

    /// Puts a message that has room into the batch of its lane. Refused where its balancer chose
    /// what there is not.
    pub(super) fn push(&self, message: &Message) -> Result<Receipt> {
        let own = self.options.balancer.as_ref().map_or(Ok(None), |own| own.choose(self, message));
        let own = own.inspect_err(|_| self.budget.add_permits(self.cost(message)))?;
        let key = message.key.as_deref().or(message.dedup_key.as_deref());
        let lane = match (own, key) {
            (Some(lane), _) => &self.lanes[lane],
            (None, Some(key)) => self.lane_of(key),
            (None, None) => self.lane_in_turn(),
        };
        let pushed = lane.push(message, self.options.send_timeout);
        if pushed.schedule {
            lane.writer.schedule(lane);
        }
        // After the push: the writer empties its lanes after the end, so one of the two sees it.
        if self.ended.is_cancelled() {
            self.abandon(lane);
        }
        if pushed.filled && key.is_none() {
            self.passed(lane);
        }
        Ok(pushed.receipt)
    }

    /// The lane of a key.
    pub(super) fn lane_of(&self, key: &str) -> &Arc<Lane> {
        &self.lanes[self.slots.get(usize::from(key_slot(key))).map_or(0, |i| usize::from(*i))]
    }

    /// The nodes, those that fare best first, and among these a random one.
    pub(super) fn nodes_by_health(&self) -> Vec<NodeId> {
        let mut nodes: Vec<_> = self
            .writers
            .values()
            .map(|writer| (writer.health.state(), uuid::Uuid::new_v4(), writer.node))
            .collect();
        nodes.sort_unstable();
        nodes.into_iter().map(|(_, _, node)| node).collect()
    }

    /// The lane that messages without a key fill now.
    fn lane_in_turn(&self) -> &Arc<Lane> {
        let lane = &self.lanes[self.current.load(Ordering::Relaxed)];
        if self.is_open(lane) {
            return lane;
        }
        let lane = self.open_lane_after(lane.index).unwrap_or(lane);
        self.current.store(lane.index, Ordering::Relaxed);
        lane
    }

    /// A lane's batch has gone, or is full: messages without a key fill the next idle open lane,
    /// where there is one.
    pub(crate) fn passed(&self, lane: &Lane) {
        if self.current.load(Ordering::Relaxed) != lane.index {
            return;
        }
        let open = self.lanes_after(lane.index).filter(|lane| self.is_open(lane));
        let idle = open.take(LOOK_AT).find(|lane| lane.is_idle());
        let next = idle.or_else(|| self.open_lane_after(lane.index));
        if let Some(next) = next {
            self.current.store(next.index, Ordering::Relaxed);
        }
    }

    /// The next lane that takes messages without a key, other than this one: of a node that is up,
    /// or else of a slow one.
    pub(crate) fn open_lane_after(&self, index: usize) -> Option<&Arc<Lane>> {
        let up = self.lanes_after(index).find(|lane| self.is_open(lane));
        up.or_else(|| self.lanes_after(index).find(|lane| self.takes(lane, NodeState::Slow)))
    }

    /// The next lane of another node that fares better than this lane's.
    pub(super) fn better_lane(&self, lane: &Lane) -> Option<&Arc<Lane>> {
        let (node, state) = (lane.partition.node(), lane.writer.health.state());
        let all = || self.writers.values().filter(|writer| writer.node != node);
        let others = || self.lanes_after(lane.index).filter(|other| other.partition.node() != node);
        // Nodes first: where all are down, thousands of lanes would be looked at for each of them.
        let is_there = |better: &NodeState| {
            *better < state && all().any(|writer| writer.health.state() == *better)
        };
        [NodeState::Up, NodeState::Slow].into_iter().filter(is_there).find_map(|better| {
            let takes = |other: &&Arc<Lane>| self.takes(other, better);
            let idle = others().filter(takes).take(LOOK_AT).find(|other| other.is_idle());
            idle.or_else(|| others().find(takes))
        })
    }

    /// Whether messages without a key may go to this lane. A full one opens again at midnight UTC.
    fn is_open(&self, lane: &Lane) -> bool {
        self.takes(lane, NodeState::Up)
    }

    fn takes(&self, lane: &Lane, state: NodeState) -> bool {
        lane.writer.health.state() == state && lane.is_open(|| self.today().ok())
    }

    fn lanes_after(&self, index: usize) -> impl Iterator<Item = &Arc<Lane>> {
        let count = self.lanes.len();
        (1..count).map(move |step| &self.lanes[(index + step) % count])
    }

    /// Answers a batch's receipts and gives its room back.
    pub(crate) fn answer(&self, batch: &Batch, result: Result<MessageId>) {
        self.account(batch, result.is_ok());
        batch.tickets.complete(result);
    }

    /// Before the receipts are answered, so that whoever hears of it finds the room.
    fn account(&self, batch: &Batch, is_stored: bool) {
        let count = u64::from(batch.len());
        if is_stored {
            ::metrics::counter!(names::SENT).increment(count);
            ::metrics::counter!(names::APPENDED).increment(1);
        } else {
            ::metrics::counter!(names::SEND_FAILED).increment(count);
        }
        self.budget.add_permits(batch.cost.min(self.options.buffer_bytes));
    }

    /// Puts a batch that was another lane's into this one.
    pub(super) fn hand(&self, lane: &Arc<Lane>, batch: Batch) {
        if lane.push_batch(batch) {
            lane.writer.schedule(lane);
        }
        // As for a message: after the push.
        if self.ended.is_cancelled() {
            self.abandon(lane);
        }
    }

    /// Puts a batch back that certainly was not stored: it goes first in its lane's next attempt.
    pub(super) fn put_back(&self, lane: &Arc<Lane>, batch: Batch) {
        lane.put_back(batch);
        lane.writer.schedule_first(lane);
        // As for a message: after the push.
        if self.ended.is_cancelled() {
            self.abandon(lane);
        }
    }

    /// A batch was stored, and its first message has this id.
    pub(super) fn stored(&self, lane: &Lane, batch: &Batch, first: MessageId) {
        self.look_for_a_lost_tail(lane, (first, batch.len()));
        self.answer(batch, Ok(first));
    }

    /// A batch with dedup keys was stored, as far as it was not before.
    pub(super) fn stored_each(&self, lane: &Lane, batch: &Batch, each: &Each) {
        if let Some(given) = each.new_ids() {
            self.look_for_a_lost_tail(lane, given);
        }
        self.account(batch, true);
        batch.tickets.complete_each(&each.ids);
    }

    /// So many ids were given now, from this one on: tells where they had been given before.
    fn look_for_a_lost_tail(&self, lane: &Lane, (first, count): (MessageId, u32)) {
        if let Some(last) = lane.acknowledge(first, count) {
            let partition = lane.partition;
            tracing::error!(
                %partition, topic = %self.topology.topic, alert = "lost_tail", %first, %last,
                "the server has lost messages that this producer had stored, and gives their ids again"
            );
            self.tell(ProducerEvent::LostTail { partition, first, last });
        }
    }

    /// A node's state is another now, or a lane's.
    pub(super) fn note_change(&self) {
        self.look_anew();
        self.changed.notify_waiters();
    }

    /// Which partitions are open is found out again, for the sender's own balancer.
    pub(super) fn look_anew(&self) {
        if let Some(own) = &self.options.balancer {
            own.forget();
        }
    }

    /// While this is held no batch is between two lanes: whoever asks all lanes sees every batch.
    pub(super) fn moving(&self) -> MutexGuard<'_, ()> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is sent any more: answers what waits in a lane. How many messages that were.
    pub(crate) fn abandon(&self, lane: &Lane) -> u64 {
        let abandoned = lane.abandon();
        for batch in &abandoned {
            let why = self.replaced.get().cloned().unwrap_or_else(|| self.why_closed());
            self.answer(batch, Err(why));
        }
        abandoned.iter().map(|batch| u64::from(batch.len())).sum()
    }

    /// A lane's batch is answered: the next may go.
    pub(crate) fn finish(&self, lane: &Arc<Lane>) {
        if lane.finish() {
            lane.writer.schedule(lane);
        }
        self.maybe_end();
    }

    pub(super) fn maybe_end(&self) {
        if !self.closed.load(Ordering::Acquire) {
            return;
        }
        let _moving = self.moving();
        if self.lanes.iter().all(|lane| lane.is_idle()) {
            self.ended.cancel();
        }
    }
}
