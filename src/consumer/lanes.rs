//! What was fetched and not handed out, by partition: each has a lane, and lanes take turns.
//!
//! ```text
//!           push                 next
//! reader ─────────> lane ready ───────> its first batch is handed out
//!                     ^   │
//!                     │   └── paused, or too patchy: parked until a turn is told
//!                     └────── something is left, and others had their turn
//! ```
//!
//! A lane that is parked, or whose messages in hand must be done first, keeps what was fetched for a while
//! only: where others need the room it is dropped, and read again from the last message that was handed out.
//! Not before its turn: read again at once it would only compete for the same room, and be dropped again. A row
//! of which a message is in hand is in memory with that; its rest stays, and takes no room.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::consumer::Read;
use crate::consumer::budget::Room;
use crate::consumer::delivery::{Delivery, Origin};
use crate::consumer::filter::Filter;
use crate::consumer::holding::{Hand, Holding, Place};
use crate::consumer::parked::Again;
use crate::failure::now;
use crate::name::TopicName;
use crate::store::fetch::Batch;

/// How long a lane that waits keeps what was fetched, where others need the room.
const PATIENCE: Duration = Duration::from_secs(1);

/// A batch of which something is left to be handed out.
pub(super) struct Unread {
    pub(super) origin: Arc<Origin>,
    next: i64,
    /// Whether parts of it were acknowledged in an earlier holding.
    patchy: bool,
    /// What is wanted of it.
    filter: Option<Arc<Filter>>,
    round: u32,
    /// None where it was given to others.
    room: Option<Room>,
}

impl Unread {
    pub(super) fn new(read: Read, topic: &TopicName, filter: Option<Arc<Filter>>) -> Self {
        let Read { holding, row, from, patchy, round, room } = read;
        let (topic, read_at) = (topic.clone(), now());
        let origin = Arc::new(Origin { holding, row, topic, read_at, parked: None });
        Self { origin, next: from, patchy, filter, round, room: Some(room) }
    }

    /// A message that was parked, in a row of its own.
    pub(super) fn parked(
        (holding, row): (Arc<Holding>, Arc<Batch>),
        parked: Again,
        topic: &TopicName,
        room: Room,
    ) -> Self {
        let (next, round) = (row.base_id, holding.round());
        let (topic, read_at) = (topic.clone(), now());
        let origin = Arc::new(Origin { holding, row, topic, read_at, parked: Some(parked) });
        Self { origin, next, patchy: false, filter: None, round, room: Some(room) }
    }

    fn is_parked(&self) -> bool {
        self.origin.parked.is_some()
    }

    /// The next message that is to be handed out. Those before it that are not wanted are done with that.
    #[inline]
    pub(super) fn peek(&mut self) -> Option<i64> {
        let Origin { holding, row, .. } = &*self.origin;
        while self.next <= row.last_id() {
            let id = self.next;
            if !self.patchy || !holding.tracker().is_acked(id) {
                match &self.filter {
                    Some(filter) if !filter.takes(row, id) => holding.skip(id),
                    _ => return Some(id),
                }
            }
            self.next += 1;
        }
        None
    }

    /// Hands out the next message, or says why not; none at the end.
    #[inline]
    pub(super) fn hand_out(&mut self) -> Option<Result<Delivery, Hand>> {
        let id = self.peek()?;
        Some(match self.origin.holding.hand_out() {
            Hand::Out => {
                self.next = id + 1;
                Ok(Delivery::kept(&self.origin, id))
            }
            other => Err(other),
        })
    }

    /// Passes the next message over: somebody else hands it out.
    pub(super) fn skip(&mut self) {
        self.next += 1;
    }

    pub(super) fn owner(&self) -> Uuid {
        self.origin.holding.owner()
    }

    /// The key of a message.
    pub(super) fn key(&self, id: i64) -> Option<Arc<str>> {
        let Origin { row, .. } = &*self.origin;
        let key = row.keys.as_ref()?.element(usize::try_from(id - row.base_id).ok()?)?;
        std::str::from_utf8(key).ok().map(Arc::from)
    }

    /// Everything of it was handed out.
    pub(super) fn finish(self) {
        if !self.is_parked() {
            self.origin.holding.pass(self.origin.row.place());
        }
    }

    /// Whether messages of it are in hand, and keep it in memory.
    fn is_in_hand(&self) -> bool {
        !self.is_parked() && Arc::strong_count(&self.origin) > 1
    }

    /// Whether it may be handed out: it is held, and was not dropped to be read again.
    fn is_current(&self) -> bool {
        let Origin { holding, .. } = &*self.origin;
        holding.is_held() && (self.is_parked() || holding.round() == self.round)
    }
}

/// The lanes of a consumer.
#[derive(Default)]
pub(super) struct Lanes {
    lanes: HashMap<Uuid, Lane>,
    ready: VecDeque<Uuid>,
}

struct Lane {
    holding: Arc<Holding>,
    batches: VecDeque<Unread>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the queue of those that take turns.
    Ready,
    /// Its batch is being handed out.
    Taken,
    /// What was handed out of it must be done first; since then.
    Busy(Instant),
    /// It waits since then.
    Parked(Instant),
}

impl Lanes {
    /// Adds what was read last of a partition.
    pub(super) fn push(&mut self, batch: Unread) {
        if !batch.is_current() {
            return;
        }
        let owner = batch.owner();
        let lane = self.lanes.entry(owner).or_insert_with(|| {
            self.ready.push_back(owner);
            let holding = Arc::clone(&batch.origin.holding);
            Lane { holding, batches: VecDeque::new(), state: State::Ready }
        });
        lane.batches.push_back(batch);
    }

    /// The first batch of the lane whose turn it is. It must be given back, or finished.
    pub(super) fn next(&mut self) -> Option<Unread> {
        while let Some(owner) = self.ready.pop_front() {
            let Some(lane) = self.lanes.get_mut(&owner) else { continue };
            if !lane.holding.is_held() {
                self.lanes.remove(&owner);
                continue;
            }
            let batch = lane.batches.pop_front();
            if lane.batches.is_empty() {
                lane.holding.read_on();
            }
            if let Some(batch) = batch {
                lane.state = State::Taken;
                return Some(batch);
            }
            self.lanes.remove(&owner);
        }
        None
    }

    /// The batch of the lane's turn is through: the next one's turn comes after the others.
    pub(super) fn finish(&mut self, batch: Unread) {
        let owner = batch.owner();
        batch.finish();
        self.queue(owner);
    }

    /// The same, but what was handed out must be done before the lane's next turn.
    pub(super) fn finish_busy(&mut self, batch: Unread) {
        let owner = batch.owner();
        batch.finish();
        self.set(owner, State::Busy(Instant::now()));
    }

    /// Something of the batch is left, and what was handed out must be done first.
    pub(super) fn keep_busy(&mut self, batch: Unread) {
        let owner = self.put_first(batch);
        self.set(owner, State::Busy(Instant::now()));
    }

    /// What was handed out of a lane is done.
    pub(super) fn free(&mut self, owner: Uuid) {
        if self.lanes.get(&owner).is_some_and(|lane| matches!(lane.state, State::Busy(_))) {
            self.queue(owner);
        }
    }

    fn set(&mut self, owner: Uuid, state: State) {
        if let Some(lane) = self.lanes.get_mut(&owner) {
            lane.state = state;
        }
    }

    /// Something of the batch is left, for the lane's next turn.
    pub(super) fn give_back(&mut self, batch: Unread) {
        let owner = self.put_first(batch);
        self.queue(owner);
    }

    /// The same, but the lane waits for a turn to be told.
    pub(super) fn park(&mut self, batch: Unread) {
        let owner = self.put_first(batch);
        if let Some(lane) = self.lanes.get_mut(&owner) {
            lane.state = State::Parked(Instant::now());
            if lane.holding.is_paused() {
                lane.drop_unread();
            }
        }
    }

    fn put_first(&mut self, batch: Unread) -> Uuid {
        let owner = batch.owner();
        if let Some(lane) = self.lanes.get_mut(&owner).filter(|_| batch.is_current()) {
            lane.batches.push_front(batch);
        }
        owner
    }

    fn queue(&mut self, owner: Uuid) {
        if let Some(lane) = self.lanes.get_mut(&owner) {
            lane.state = State::Ready;
            self.ready.push_back(owner);
        }
    }

    /// A lane has its turn again, if nothing keeps it from that: its partition was resumed or paused, or
    /// is no longer held, or less patchy.
    pub(super) fn turn(&mut self, owner: Uuid) {
        let Some(lane) = self.lanes.get_mut(&owner) else { return };
        if !lane.holding.is_held() {
            // What is being handed out finds out by itself.
            if lane.state != State::Taken {
                self.lanes.remove(&owner);
            }
        } else if lane.holding.is_paused() && lane.state != State::Taken {
            lane.drop_unread();
        } else if lane.holding.may_go() && matches!(lane.state, State::Parked(_)) {
            self.queue(owner);
        }
    }

    /// Drops what was fetched of lanes that wait, or are no longer held: others need the room.
    pub(super) fn make_room(&mut self) {
        self.lanes.retain(|_, lane| lane.state == State::Taken || lane.holding.is_held());
        for lane in self.lanes.values_mut() {
            if let State::Parked(since) | State::Busy(since) = lane.state
                && since.elapsed() >= PATIENCE
            {
                lane.make_room();
            }
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        (self.lanes, self.ready) = (HashMap::new(), VecDeque::new());
    }
}

impl Lane {
    /// Others need the room. No more is read until what stays is handed out, or the lane has its turn.
    fn make_room(&mut self) {
        self.holding.crowd_out();
        let Some(first) = self.batches.front_mut().filter(|first| first.is_in_hand()) else {
            return self.drop_unread();
        };
        first.room = None;
        if self.batches.len() > 1 {
            self.drop_behind_first();
        }
    }

    /// Drops what is behind the first batch; the reader goes back to its end.
    fn drop_behind_first(&mut self) {
        if let Some(first) = self.batches.front() {
            let row = &first.origin.row;
            self.holding.rewind(Place { position: row.last_id(), last: row.place() });
        }
        self.batches.truncate(1);
        for first in &mut self.batches {
            first.round = self.holding.round();
        }
    }

    /// Drops what was fetched; the reader goes back to the last message that was handed out.
    fn drop_unread(&mut self) {
        let Some(first) = self.batches.iter().find(|batch| !batch.is_parked()) else {
            // What is parked is fetched again as well.
            self.batches.clear();
            return;
        };
        let row = &first.origin.row;
        let is_begun = first.next > row.base_id;
        let last = if is_begun { row.place() } else { self.holding.passed() };
        self.holding.rewind(Place { position: first.next - 1, last });
        self.batches.clear();
    }
}
