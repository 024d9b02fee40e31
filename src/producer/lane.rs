//! One lane for each partition that a producer writes to: what waits, and the one batch under way.
//!
//! ```text
//! push ─> [ filling ] ─take─> under way ─finish─> receipts answered
//!              ^                  │
//!              └──── put_back ────┘  (the lock was another's)
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::deadline::after;
use crate::id::{Day, MessageId, PartitionId};
use crate::message::Message;
use crate::producer::batch::{Batch, Completion, Kind, Receipt};
use crate::producer::writer::Writer;

/// The way of one producer into one partition.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) partition: PartitionId,
    pub(crate) generation: i32,
    /// The place among the producer's lanes.
    pub(crate) index: usize,
    /// The producer's uuid for this partition.
    pub(crate) producer: Uuid,
    pub(crate) writer: Arc<Writer>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Batch>,
    /// The batch under way.
    in_flight: Option<Arc<Completion>>,
    /// Whether the writer has been told that something waits.
    scheduled: bool,
    next_sequence: i64,
    /// The partition's day, once known.
    day: Option<Day>,
    /// The last id that was acknowledged.
    acknowledged: Option<MessageId>,
    closed: Option<Closed>,
}

/// Why a lane takes no messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It holds 99,999,999 messages of this day.
    Full(Day),
    /// It takes no messages any more.
    Sealed,
}

/// What a push did.
pub(crate) struct Pushed {
    pub(crate) receipt: Receipt,
    /// The lane must be handed to its writer.
    pub(crate) schedule: bool,
    /// The batch that it joined is full now.
    pub(crate) filled: bool,
}

impl Lane {
    pub(crate) fn new(
        partition: PartitionId,
        generation: i32,
        index: usize,
        writer: Arc<Writer>,
    ) -> Self {
        let state = Mutex::new(State { next_sequence: 1, ..State::default() });
        Self { partition, generation, index, producer: Uuid::new_v4(), writer, state }
    }

    /// Adds a message to the batch of its kind that is filling: those with keys, those without and those
    /// with dedup keys go in batches of their own, since they fare differently where a node fails. None
    /// that has a key goes before a batch of another kind that may have the same key.
    pub(crate) fn push(&self, message: &Message, timeout: Duration) -> Pushed {
        let size = message.size();
        let mut state = self.lock();
        // One that has waited for long is left as it is: each message is tried for most of its time.
        let latest = after(Instant::now(), timeout / 4 * 3);
        let (kind, has_key) = (Kind::of(message), message.key.is_some());
        let joins = |b: &Batch| {
            let waits = b.sequence.is_none() && b.deadline >= latest;
            b.kind == kind && waits && b.has_room(size)
        };
        let last = |b: &Batch| b.kind == kind || (has_key && b.arrays.keys.is_some());
        let filling = state.queue.iter().rposition(last);
        let index = filling.filter(|index| joins(&state.queue[*index])).unwrap_or_else(|| {
            state.queue.push_back(Batch::new(timeout, kind));
            state.queue.len() - 1
        });
        let batch = &mut state.queue[index];
        let receipt = batch.push(message);
        let filled = !batch.has_room(size);
        Pushed { receipt, schedule: state.schedule(), filled }
    }

    /// Adds a batch that another lane could not take. True: hand the lane to its writer.
    pub(crate) fn push_batch(&self, batch: Batch) -> bool {
        let mut state = self.lock();
        state.queue.push_back(batch);
        state.schedule()
    }

    /// Takes the next batch for its first attempt, with its sequence drawn.
    pub(crate) fn take(&self) -> Option<Batch> {
        let mut state = self.lock();
        state.scheduled = false;
        if state.in_flight.is_some() {
            return None;
        }
        let mut batch = state.queue.pop_front()?;
        state.in_flight = Some(Arc::clone(&batch.tickets.completion));
        if batch.sequence.is_none() {
            batch.sequence = Some(state.draw());
        }
        Some(batch)
    }

    /// How many messages the next batch has.
    pub(crate) fn waiting(&self) -> u32 {
        self.lock().queue.front().map_or(0, Batch::len)
    }

    /// Takes what waits out of the lane, to be answered without having been sent.
    pub(crate) fn abandon(&self) -> VecDeque<Batch> {
        std::mem::take(&mut self.lock().queue)
    }

    /// Takes the batches out that wait and may go elsewhere.
    pub(crate) fn take_free(&self, is_free: impl Fn(&Batch) -> bool) -> VecDeque<Batch> {
        let mut state = self.lock();
        if !state.queue.iter().any(&is_free) {
            return VecDeque::new();
        }
        let queue = std::mem::take(&mut state.queue);
        let (free, bound) = queue.into_iter().partition(is_free);
        state.queue = bound;
        free
    }

    /// Puts a batch back that certainly was not stored, before all others. The caller hands the lane to
    /// its writer again.
    pub(crate) fn put_back(&self, batch: Batch) {
        let mut state = self.lock();
        state.in_flight = None;
        state.queue.push_front(batch);
        state.scheduled = true;
    }

    /// The batch under way was answered, wholly: the next may go. True: hand the lane to its writer.
    pub(crate) fn finish(&self) -> bool {
        let mut state = self.lock();
        state.in_flight = None;
        state.schedule()
    }

    /// What is under way.
    pub(crate) fn in_flight(&self) -> Option<Arc<Completion>> {
        self.lock().in_flight.clone()
    }

    /// Notes the first id of a batch that was stored. Returns the last id that was acknowledged before,
    /// where the new one is not beyond it: the server has lost what was acknowledged, and gives these ids
    /// again.
    pub(crate) fn acknowledge(&self, first: MessageId, count: u32) -> Option<MessageId> {
        let last = first.offset(count.saturating_sub(1) as usize);
        let before = self.lock().acknowledged.replace(last);
        before.filter(|before| first <= *before)
    }

    /// A sequence for a part of the batch under way.
    pub(crate) fn draw(&self) -> i64 {
        self.lock().draw()
    }

    pub(crate) fn day(&self) -> Option<Day> {
        self.lock().day
    }

    pub(crate) fn set_day(&self, day: Day) {
        self.lock().day = Some(day);
    }

    pub(crate) fn close(&self, why: Closed) {
        self.lock().closed = Some(why);
    }

    /// Whether messages without a key may come here. A full lane opens again when its day is over.
    pub(crate) fn is_open(&self, today: impl Fn() -> Option<Day>) -> bool {
        match self.lock().closed {
            None => true,
            Some(Closed::Sealed) => false,
            Some(Closed::Full(day)) => today().is_some_and(|today| today > day),
        }
    }

    /// Whether nothing waits and nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.lock();
        state.in_flight.is_none() && state.queue.is_empty()
    }

    /// What all messages in this lane wait for.
    pub(crate) fn completions(&self) -> Vec<Arc<Completion>> {
        let state = self.lock();
        let waiting = state.queue.iter().map(|batch| Arc::clone(&batch.tickets.completion));
        state.in_flight.iter().map(Arc::clone).chain(waiting).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn schedule(&mut self) -> bool {
        let due = !self.scheduled && self.in_flight.is_none() && !self.queue.is_empty();
        self.scheduled |= due;
        due
    }

    fn draw(&mut self) -> i64 {
        self.next_sequence += 1;
        self.next_sequence - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;

    fn lane(timeout: Duration) -> Lane {
        let writer = Arc::new(Writer::new(NodeId::new(1).unwrap(), 1, (timeout, timeout)));
        Lane::new(PartitionId::new(1, 1).unwrap(), 1, 0, writer)
    }

    #[test]
    fn a_message_with_a_key_goes_before_none_that_may_have_the_same() {
        let (free, once) = (Message::new("x"), Message::new("x").dedup_key("d"));
        let (keyed, both) = (free.clone().key("k"), once.clone().key("k"));
        let cases: [(&[&Message], &[u32]); 5] = [
            (&[&free, &keyed, &once, &free, &keyed, &once], &[2, 2, 2]),
            (&[&keyed, &both, &keyed, &both], &[1, 1, 1, 1]),
            (&[&keyed, &both, &both, &free, &free, &both], &[1, 3, 2]),
            (&[&once, &keyed, &both, &once, &keyed], &[1, 1, 2, 1]),
            (&[&once, &keyed, &once, &keyed, &free], &[2, 2, 1]),
        ];
        for (messages, sizes) in cases {
            let lane = lane(Duration::from_secs(30));
            for message in messages {
                drop(lane.push(message, Duration::from_secs(30)).receipt);
            }
            let found: Vec<u32> = lane.abandon().iter().map(Batch::len).collect();
            assert_eq!(found, sizes);
        }
    }

    #[test]
    fn an_id_that_is_not_beyond_the_last_shows_that_others_are_gone() {
        let lane = lane(Duration::from_secs(30));
        let id = |n: usize| MessageId::try_from(1_010_126_120_100_000_001_i64).unwrap().offset(n);
        assert_eq!(lane.acknowledge(id(0), 10), None);
        assert_eq!(lane.acknowledge(id(10), 1), None);
        // Others may have appended in between.
        assert_eq!(lane.acknowledge(id(50), 5), None);
        assert_eq!(lane.acknowledge(id(7), 2), Some(id(54)));
        // It is said once.
        assert_eq!(lane.acknowledge(id(9), 1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_joins_a_batch_that_is_tried_for_most_of_its_time_only() {
        let timeout = Duration::from_secs(30);
        let lane = lane(timeout);
        let mut receipts = Vec::new();
        for _ in 0..4 {
            receipts.push(lane.push(&Message::new("x"), timeout).receipt);
            tokio::time::advance(Duration::from_secs(5)).await;
        }
        let sizes: Vec<u32> = lane.abandon().iter().map(Batch::len).collect();
        assert_eq!(sizes, [2, 2]);
    }
}
