//! One writer for each node: one commit carries what is ready for several of its partitions.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::error::Result;
use crate::id::{Day, NodeId, PartitionId};
use crate::metrics as names;
use crate::producer::Shared;
use crate::producer::batch::{Batch, Kind};
use crate::producer::desertion::spawn;
use crate::producer::failover::is_of_node;
use crate::producer::health::{Health, NodeState};
use crate::producer::lane::Lane;
use crate::producer::settle::settle;
use crate::store::append::{self, Append, Culprit, Failure, Inserted, MAX_PARTITIONS, Rolled};
use crate::store::node::Connection;

/// How often the runtime's other tasks have their turn, at most, before what is ready is taken. In
/// a turn some 60 of them run, so that these are enough for a batch of 1,000 messages.
const FILL_TURNS: u32 = 32;

/// What waits to be written to a node.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) node: NodeId,
    ready: Mutex<VecDeque<Arc<Lane>>>,
    wake: Notify,
    /// How many transactions may be under way.
    slots: Arc<Semaphore>,
    /// How many batches may be asked for at once after their first attempt: one less than there are
    /// connections, so that a partition that is locked for long does not hold up the others.
    patience: Semaphore,
    /// The same for the first attempts of batches that go apart: they do not wait for those of
    /// partitions that are locked.
    apart: Semaphore,
    pub(crate) health: Health,
}

impl Writer {
    /// `probes`: the shortest and the longest time between two probes of a node that is down.
    pub(crate) fn new(node: NodeId, connections: usize, probes: (Duration, Duration)) -> Self {
        let slots = Arc::new(Semaphore::new(connections));
        Self {
            node,
            ready: Mutex::default(),
            wake: Notify::new(),
            slots,
            patience: Semaphore::new(connections.saturating_sub(1).max(1)),
            apart: Semaphore::new(connections.saturating_sub(1).max(1)),
            health: Health::new(probes),
        }
    }

    /// Waits for the turn of a batch that goes apart: its first attempt of all, or one after it.
    pub(crate) async fn turn(&self, is_first: bool) -> Option<SemaphorePermit<'_>> {
        let turns = if is_first { &self.apart } else { &self.patience };
        turns.acquire().await.ok()
    }

    /// Something waits in this lane.
    pub(crate) fn schedule(&self, lane: &Arc<Lane>) {
        self.lock().push_back(Arc::clone(lane));
        self.wake.notify_one();
    }

    /// A batch was put back into this lane: it waits for the lock first in the next transaction.
    pub(super) fn schedule_first(&self, lane: &Arc<Lane>) {
        self.lock().push_front(Arc::clone(lane));
        self.wake.notify_one();
    }

    /// The lanes for the next transaction: an even part of what is ready, so that all connections
    /// have something to do.
    fn next_lanes(&self) -> Vec<Arc<Lane>> {
        let mut ready = self.lock();
        let parts = self.slots.available_permits() + 1;
        let count = ready.len().div_ceil(parts).min(MAX_PARTITIONS);
        ready.drain(..count).collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Lane>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A batch on its way, with the lane that it is of.
struct Departure {
    lane: Arc<Lane>,
    batch: Batch,
}

/// Writes what is ready, until the producer has ended.
pub(crate) async fn run(shared: Arc<Shared>, writer: Arc<Writer>) {
    loop {
        let Ok(slot) = Arc::clone(&writer.slots).acquire_owned().await else {
            return;
        };
        let lanes = loop {
            let lanes = writer.next_lanes();
            if !lanes.is_empty() {
                break lanes;
            }
            tokio::select! {
                () = writer.wake.notified() => {}
                () = shared.ended.cancelled() => return abandon_all(&shared, &writer),
            }
        };
        let shared = Arc::clone(&shared);
        // Whoever waits for a receipt may go away: what was begun is finished here.
        spawn(&shared.clone(), async move {
            fill(&lanes).await;
            write(&shared, lanes).await;
            drop(slot);
        });
    }
}

/// Lets the tasks run that are ready to, for as long as they send more into these lanes: an
/// answered batch wakes a thousand senders at once, and the first of them would leave alone. No
/// time is waited for: where nobody is about to send, this ends at once.
async fn fill(lanes: &[Arc<Lane>]) {
    let waiting = || lanes.iter().map(|lane| lane.waiting()).sum::<u32>();
    let mut before = waiting();
    for _ in 0..FILL_TURNS {
        tokio::task::yield_now().await;
        let now = waiting();
        if now == before {
            return;
        }
        before = now;
    }
}

/// After the end: whoever still waits is told.
fn abandon_all(shared: &Shared, writer: &Arc<Writer>) {
    let ours = shared.lanes.iter().filter(|lane| Arc::ptr_eq(&lane.writer, writer));
    for lane in ours {
        shared.abandon(lane);
    }
}

async fn write(shared: &Arc<Shared>, lanes: Vec<Arc<Lane>>) {
    let mut departures = Vec::with_capacity(lanes.len());
    for lane in lanes {
        let Some(batch) = lane.take() else {
            continue;
        };
        shared.passed(&lane);
        let is_late = Instant::now() >= batch.deadline;
        let is_down = lane.writer.health.state() == NodeState::Down;
        if batch.kind == Kind::Once || is_down || is_late {
            begin_to_settle(shared, &lane, batch);
        } else {
            departures.push(Departure { lane, batch });
        }
    }
    if departures.is_empty() {
        return;
    }
    let outcomes = attempt(shared, &mut departures).await;
    arrive(shared, departures, outcomes);
}

/// Moves a partition to the server's date.
pub(crate) async fn roll(shared: &Shared, partition: PartitionId) -> Result<Rolled> {
    let node = shared.cluster.inner.nodes.node(partition.node()).await?;
    append::roll(node.get().await?, partition, shared.now()).await
}

/// The first attempt of all departures, in one transaction. Where it failed, what became of each is
/// to be found out: no insert counts as done.
#[tracing::instrument(level = "debug", name = "append", skip_all, fields(batches = departures.len()))]
async fn attempt(shared: &Shared, departures: &mut [Departure]) -> Vec<Inserted> {
    let Some(writer) = departures.first().map(|first| Arc::clone(&first.lane.writer)) else {
        return Vec::new();
    };
    let outcome = append_all(shared, &writer, departures).await;
    let error = match outcome {
        Ok(Ok(outcomes)) => {
            shared.node_worked(&writer);
            return outcomes;
        }
        Ok(Err(failure)) => failure,
        Err(error) => {
            tracing::debug!(error = %error.chain(), "no connection to append with");
            if error.is_own_pool() {
                // It says nothing about the node: the batches wait, until their deadline.
                return vec![Inserted::NotHeld; departures.len()];
            }
            if is_of_node(&error) {
                shared.node_failed(&writer, &error);
            }
            return vec![Inserted::No; departures.len()];
        }
    };
    ::metrics::counter!(names::APPEND_FAILED).increment(1);
    let mut outcomes = vec![Inserted::No; departures.len()];
    match error {
        Failure::Unknown(_) => departures.iter_mut().for_each(|d| d.batch.unknown = true),
        // Only the one that waited in vain goes alone from now on.
        Failure::Locked(_, Culprit::Batch(culprit)) => {
            for (nth, outcome) in outcomes.iter_mut().enumerate() {
                if nth != culprit {
                    *outcome = Inserted::NotHeld;
                }
            }
        }
        _ => {}
    }
    // A connection that broke says little about its node: the next attempt does.
    let is_silent = matches!(error, Failure::Unknown(None) | Failure::Silent);
    let error = error.into_error("append");
    tracing::debug!(error = %error.chain(), "append transaction failed");
    if is_silent {
        shared.node_failed(&writer, &error);
    }
    outcomes
}

async fn append_all(
    shared: &Shared,
    writer: &Writer,
    departures: &mut [Departure],
) -> Result<Result<Vec<Inserted>, Failure>> {
    let limit = shared.options.append_timeout;
    let node = shared.cluster.inner.nodes.node(writer.node).await?;
    // To wait for what this process itself does says nothing about the node.
    let connecting = (!node.is_in_use()).then(|| writer.health.attempt());
    let connection = node.get_within(limit).await?;
    drop(connecting);
    let _under_way = writer.health.attempt();
    let lanes: Vec<&Lane> = departures.iter().map(|departure| &*departure.lane).collect();
    let connection = match find_days(connection, &lanes, limit).await {
        Ok(connection) => connection,
        Err(failure) => return Ok(Err(failure)),
    };
    let mut days = Vec::with_capacity(departures.len());
    for departure in &mut *departures {
        let day = departure.lane.day().map_or_else(|| shared.today(), Ok)?;
        departure.batch.attempted_on(day);
        days.push(day);
    }
    let named = departures.iter().zip(days);
    let batches: Vec<Append<'_>> =
        named.map(|(d, day)| d.lane.append(shared, &d.batch, day)).collect();
    Ok(append::append(connection, &batches, limit).await)
}

/// Asks for the days of partitions that this producer has not written to. This machine's date would
/// not do in their place: an attempt that hangs must name no day that its partition comes to later,
/// when the batch is stored on an earlier day, or was said not to be.
pub(super) async fn find_days(
    connection: Connection,
    lanes: &[&Lane],
    limit: Duration,
) -> Result<Connection, Failure> {
    let unknown = lanes.iter().filter(|lane| lane.day().is_none());
    let unknown: Vec<PartitionId> = unknown.map(|lane| lane.partition).collect();
    if unknown.is_empty() {
        return Ok(connection);
    }
    let (connection, days) = append::days(connection, &unknown, limit).await?;
    for lane in lanes {
        if let Some(day) = days.get(&lane.partition) {
            lane.set_day(*day);
        }
    }
    Ok(connection)
}

impl Lane {
    /// A batch with what is believed of its partition.
    pub(crate) fn append<'a>(&self, shared: &'a Shared, batch: &'a Batch, day: Day) -> Append<'a> {
        let (first_day, latest_day) = batch.named.unwrap_or((day, day));
        Append {
            partition: self.partition,
            topic_id: shared.topology.id,
            generation: self.generation,
            day,
            first_day,
            latest_day,
            producer: self.producer,
            sequence: batch.sequence.unwrap_or_default(),
            arrays: &batch.arrays,
        }
    }
}

fn arrive(shared: &Arc<Shared>, departures: Vec<Departure>, outcomes: Vec<Inserted>) {
    let mut appended = Vec::with_capacity(departures.len());
    for (departure, inserted) in departures.into_iter().zip(outcomes) {
        let Departure { lane, batch } = departure;
        match inserted {
            Inserted::At(id) => {
                appended.push(lane.partition);
                lane.set_day(id.day());
                shared.stored(&lane, &batch, id);
                shared.finish(&lane);
            }
            Inserted::NotHeld => shared.put_back(&lane, batch),
            Inserted::No => begin_to_settle(shared, &lane, batch),
        }
    }
    shared.cluster.inner.notifier.publish(&appended);
}

fn begin_to_settle(shared: &Arc<Shared>, lane: &Arc<Lane>, batch: Batch) {
    let (ours, lane) = (Arc::clone(shared), Arc::clone(lane));
    spawn(shared, async move { settle(&ours, &lane, batch).await });
}
