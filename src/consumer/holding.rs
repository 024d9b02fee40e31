//! A partition that this consumer owns, from its acquisition to its end.

use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::consumer::acks::Tracker;
use crate::consumer::journal::{Acks, HoldingJournal};
use crate::consumer::parked::InHand;
use crate::consumer::{Delivery, Event, Order, Verdict, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, PartitionId};
use crate::name::GroupName;
use crate::store::fetch::{Batch, Identity};
use crate::store::group::{Acquired, Fence};

/// Shared by the reader, the stream, the deliveries and the member that flushes.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) partition: PartitionId,
    pub(crate) group: GroupName,
    pub(crate) fence: Fence,
    tracker: Mutex<Tracker>,
    pub(super) in_hand: Mutex<InHand>,
    bounds: Bounds,
    /// How many flushes of the consumer have begun, now and at the last acknowledgement.
    flushes: Arc<AtomicU64>,
    acked_since: AtomicU64,
    state: AtomicU8,
    void: AtomicBool,
    pub(super) order: Order,
    pub(super) failures: Option<mpsc::WeakUnboundedSender<(Delivery, Verdict)>>,
    /// Told where something parked may be due again.
    pub(super) wake_parked: Arc<Notify>,
    /// Why nothing is handed out for now: 0, or some of the bits below.
    pub(super) gate: AtomicU32,
    /// Told when the gate has opened, or the partition is no longer held.
    stream: mpsc::WeakUnboundedSender<Event>,
    /// Deliveries handed out and not answered.
    outstanding: AtomicUsize,
    /// Woken when `outstanding` falls to none.
    answered: Notify,
    /// Woken when there may be something to read.
    pub(crate) wake: Notify,
    /// Ends the reader.
    pub(crate) ended: CancellationToken,
    /// Cancelled when acknowledgements are refused from then on.
    pub(crate) revoked: CancellationToken,
    position: AtomicI64,
    day: AtomicU32,
    /// How often what was read and not handed out was dropped, to be read again.
    round: AtomicU32,
    rewind: Mutex<Option<Place>>,
    /// The last row of which everything was handed out.
    passed: Mutex<Option<(Day, Identity)>>,
    /// Another server has answered: what was read is to be compared there.
    compare: AtomicBool,
    /// The server on which the last row read was last seen: when that was started.
    incarnation: Mutex<SystemTime>,
    journal: Option<Written>,
}

/// Where acknowledgements are written to, and what a former process has written there.
type Written = (HoldingJournal, Arc<Acks>);

/// How much may be acknowledged out of order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Messages between the cursor and what was read last.
    pub(crate) messages: usize,
    /// Runs of acknowledged messages between them.
    pub(crate) runs: usize,
}

/// Where to read on from: behind this id, and the row that it is in or that was read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) position: i64,
    pub(crate) last: Option<(Day, Identity)>,
}

/// Whether a message may be handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hand {
    /// It is counted as handed out.
    Out,
    /// Not now: the stream is told when.
    Wait,
    /// Never.
    Gone,
}

const HELD: u8 = 0;
const DRAINING: u8 = 1;
const LOST: u8 = 2;
const RESET: u8 = 3;

/// The consumer asked to pause it.
const PAUSED: u32 = 1;
/// Too many runs are acknowledged above the cursor.
const PATCHY: u32 = 2;
/// Too much was read above the cursor.
const AHEAD: u32 = 4;
/// The lease has run out by the own clock: it may be another's by now.
const LAPSED: u32 = 8;
/// What was read of it was dropped, since others needed the room.
const CROWDED_OUT: u32 = 16;
/// A message has failed that comes before all others; the bits from here on count such.
pub(super) const FAILED: u32 = 1 << 8;
/// Any of these keeps messages from being handed out; `AHEAD` and `CROWDED_OUT` only keep them from being read.
const CLOSED: u32 = PAUSED | PATCHY | LAPSED | !(FAILED - 1);

impl Holding {
    pub(crate) fn new(
        acquired: Acquired,
        group: GroupName,
        bounds: Bounds,
        ended: CancellationToken,
        stream: mpsc::WeakUnboundedSender<Event>,
        flushes: Arc<AtomicU64>,
        journal: Option<Written>,
    ) -> Self {
        // What was acknowledged before does not count: what lies between is handed out first.
        let written = journal.as_ref().map_or(0, |(_, acks)| acks.len());
        let former = acquired.acked_ahead.len() + written;
        let runs = bounds.runs.saturating_add(former);
        let bounds = Bounds { runs, ..bounds };
        Self {
            partition: acquired.partition,
            group,
            fence: acquired.fence,
            incarnation: Mutex::new(acquired.incarnation),
            position: AtomicI64::new(acquired.acked_id),
            tracker: Mutex::new(Tracker::new(acquired.acked_id, acquired.acked_ahead)),
            in_hand: Mutex::default(),
            bounds,
            flushes,
            acked_since: AtomicU64::new(0),
            state: AtomicU8::new(HELD),
            void: AtomicBool::new(false),
            order: Order::Unordered,
            failures: None,
            wake_parked: Arc::default(),
            gate: AtomicU32::new(0),
            stream,
            outstanding: AtomicUsize::new(0),
            answered: Notify::new(),
            wake: Notify::new(),
            ended,
            revoked: CancellationToken::new(),
            day: AtomicU32::new(0),
            round: AtomicU32::new(0),
            rewind: Mutex::default(),
            passed: Mutex::default(),
            compare: AtomicBool::new(false),
            journal,
        }
    }

    /// Stands for this acquisition, in the stream.
    pub(crate) fn owner(&self) -> Uuid {
        self.fence.owner
    }

    pub(crate) fn tracker(&self) -> MutexGuard<'_, Tracker> {
        lock(&self.tracker)
    }

    /// Whether messages of it may still be handed out.
    pub(crate) fn is_held(&self) -> bool {
        self.state.load(Ordering::SeqCst) == HELD
    }

    /// Nothing more is read or handed out; what is in hand may still be acknowledged.
    pub(crate) fn drain(&self) {
        let _ = self.state.compare_exchange(HELD, DRAINING, Ordering::SeqCst, Ordering::SeqCst);
        self.ended.cancel();
        self.tell_stream();
    }

    /// It is another's, its position was moved, or it is given back: acknowledgements are refused from
    /// now on. Those that were accepted before are in the tracker.
    pub(crate) fn end(&self, why: ErrorKind) {
        let state = if why == ErrorKind::Reset { RESET } else { LOST };
        let tracker = self.tracker();
        self.state.store(state, Ordering::SeqCst);
        drop(tracker);
        self.ended.cancel();
        self.revoked.cancel();
        self.answered.notify_waiters();
        self.tell_stream();
    }

    /// The server lacks what was read under it: what is acknowledged and not committed is void.
    pub(crate) fn void(&self) {
        self.void.store(true, Ordering::Release);
        self.end(ErrorKind::LeaseLost);
    }

    pub(crate) fn is_void(&self) -> bool {
        self.void.load(Ordering::Acquire)
    }

    /// Records an acknowledgement of a message of this row.
    pub(crate) fn ack(&self, id: i64, row: &Batch) -> Result<()> {
        self.record(id)?;
        // After it was recorded: what is written before a commit is composed is in it then.
        if let Some((journal, _)) = &self.journal {
            journal.ack(id, row.uid_of(id));
        }
        Ok(())
    }

    /// A message that nobody wants, or that was put aside, is done, unless the partition is no longer this consumer's. The
    /// journal need not know: whoever reads it again does not want it either, or finds it acknowledged.
    pub(crate) fn skip(&self, id: i64) {
        let _ = self.record(id);
    }

    #[inline]
    fn record(&self, id: i64) -> Result<()> {
        // Under the lock, so that what is accepted here is seen by the flush that follows an end.
        let mut tracker = self.tracker();
        self.accepts()?;
        tracker.ack(id);
        self.note_acked();
        let gate = self.gate.load(Ordering::Acquire);
        if gate == 0 && tracker.runs() < self.bounds.runs {
            // As almost always.
        } else if gate & PATCHY == 0 && tracker.runs() >= self.bounds.runs {
            self.gate.fetch_or(PATCHY, Ordering::SeqCst);
        } else if gate & PATCHY != 0 && tracker.runs() <= self.bounds.runs / 2 {
            self.open(PATCHY);
        }
        if gate & AHEAD != 0 && tracker.span() <= self.bounds.messages / 2 {
            self.gate.fetch_and(!AHEAD, Ordering::SeqCst);
            self.wake.notify_one();
        }
        Ok(())
    }

    /// Something was acknowledged, and recorded before this: a flush that begins later commits it.
    #[inline]
    pub(super) fn note_acked(&self) {
        self.acked_since.store(self.flushes.load(Ordering::SeqCst), Ordering::Release);
    }

    /// A row was read, from an id on; says whether parts of it are acknowledged already. What a former
    /// process acknowledged counts where the message is still the same.
    pub(crate) fn read(&self, row: &Batch, from: i64) -> bool {
        let mut tracker = self.tracker();
        let mut patchy = tracker.read(from, row.last_id());
        let Some((journal, acks)) = &self.journal else { return patchy };
        for (id, uid) in acks.range(from..=row.last_id()) {
            if *uid == row.uid_of(*id) {
                patchy = true;
                tracker.ack(*id);
                journal.ack(*id, *uid);
            }
        }
        if acks.last_key_value().is_some_and(|(last, _)| *last <= row.last_id()) {
            journal.settled();
        }
        patchy
    }

    /// Refuses what `ack` would refuse.
    pub(crate) fn accepts(&self) -> Result<()> {
        match self.state.load(Ordering::SeqCst) {
            LOST => Err(self.refusal(ErrorKind::LeaseLost)),
            RESET => Err(self.refusal(ErrorKind::Reset)),
            _ => Ok(()),
        }
    }

    /// How many flushes had begun at the last acknowledgement.
    pub(crate) fn acked_since(&self) -> u64 {
        self.acked_since.load(Ordering::SeqCst)
    }

    pub(crate) fn refusal(&self, kind: ErrorKind) -> Error {
        let why = if kind == ErrorKind::Reset {
            "its position was moved by a seek"
        } else {
            "it belongs to another consumer now"
        };
        Error::new(kind, format!("partition {}: {why}", self.partition))
    }

    /// Hands nothing out from now on, nor reads.
    pub(crate) fn pause(&self) {
        self.gate.fetch_or(PAUSED, Ordering::SeqCst);
        self.tell_stream();
    }

    pub(crate) fn resume(&self) {
        self.open(PAUSED);
        self.wake.notify_one();
        self.wake_parked.notify_one();
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.gate.load(Ordering::SeqCst) & PAUSED != 0
    }

    /// The lease has run out by the own clock: nothing is handed out until it is renewed.
    pub(crate) fn lapse(&self) {
        self.gate.fetch_or(LAPSED, Ordering::SeqCst);
    }

    /// A renewal has shown that it is still this consumer's.
    pub(crate) fn renew(&self) {
        if self.is_lapsed() {
            self.open(LAPSED);
        }
    }

    pub(crate) fn is_lapsed(&self) -> bool {
        self.gate.load(Ordering::SeqCst) & LAPSED != 0
    }

    fn open(&self, why: u32) {
        self.gate.fetch_and(!why, Ordering::SeqCst);
        self.tell_stream();
        self.wake_what_is_parked();
    }

    pub(super) fn tell_stream(&self) {
        let turn = || Event::Turn(self.owner());
        self.stream.upgrade().map(|stream| stream.send(turn()));
    }

    /// Whether so much was read above the cursor, or others need the room so much, that the reader must wait;
    /// it is woken then.
    pub(crate) fn is_far_ahead(&self) -> bool {
        let tracker = self.tracker();
        let far = tracker.span() >= self.bounds.messages;
        if far {
            // Under the lock: the acknowledgement that ends it comes after.
            self.gate.fetch_or(AHEAD, Ordering::SeqCst);
        }
        far || self.gate.load(Ordering::SeqCst) & (AHEAD | CROWDED_OUT) != 0
    }

    /// Others need the room of what was read of it: no more is read until it is asked for.
    pub(crate) fn crowd_out(&self) {
        self.gate.fetch_or(CROWDED_OUT, Ordering::SeqCst);
    }

    pub(crate) fn is_crowded_out(&self) -> bool {
        self.gate.load(Ordering::SeqCst) & CROWDED_OUT != 0
    }

    /// What was read of it is handed out, or its turn has come.
    pub(crate) fn read_on(&self) {
        if self.is_crowded_out() {
            self.gate.fetch_and(!CROWDED_OUT, Ordering::SeqCst);
            self.wake.notify_one();
            self.wake_what_is_parked();
        }
    }

    /// Counts a delivery, unless the partition is no longer held or has to wait. Counted first: whoever
    /// ends it then either sees the delivery or is seen here.
    #[inline]
    pub(crate) fn hand_out(&self) -> Hand {
        self.hand_out_unless(CLOSED)
    }

    /// The same for a message that was passed over before, while others behind it were handed out. That
    /// there are many runs is no reason to wait: it lies between them, and with it they become fewer.
    pub(crate) fn hand_out_kept(&self) -> Hand {
        self.hand_out_unless(CLOSED & !PATCHY)
    }

    /// The same for one that has failed.
    pub(super) fn hand_out_again(&self) -> Hand {
        self.hand_out_unless(CLOSED & (FAILED - 1) & !PATCHY)
    }

    #[inline]
    fn hand_out_unless(&self, closed: u32) -> Hand {
        self.outstanding.fetch_add(1, Ordering::SeqCst);
        let hand = match self.state.load(Ordering::SeqCst) {
            HELD if self.gate.load(Ordering::Acquire) & closed == 0 => return Hand::Out,
            HELD => Hand::Wait,
            _ => Hand::Gone,
        };
        self.take_back();
        hand
    }

    /// Whether it is held and nothing keeps it from being handed out.
    pub(crate) fn may_go(&self) -> bool {
        self.is_held() && self.gate.load(Ordering::SeqCst) & CLOSED == 0
    }

    /// A delivery was answered, or dropped.
    pub(crate) fn take_back(&self) {
        // While it is held nobody waits for the last answer, which may be every one. Who drains it
        // changes the state first and counts then: one of the two sees the other.
        if self.outstanding.fetch_sub(1, Ordering::SeqCst) == 1 && !self.is_held() {
            self.answered.notify_waiters();
        }
    }

    /// Waits until every delivery was answered or dropped, or the partition was lost.
    pub(crate) async fn drained(&self) {
        loop {
            let answered = self.answered.notified();
            let lost = self.state.load(Ordering::SeqCst) >= LOST;
            if lost || self.outstanding.load(Ordering::SeqCst) == 0 {
                return;
            }
            answered.await;
        }
    }

    /// The server that everything read so far was last seen on.
    pub(crate) fn incarnation(&self) -> SystemTime {
        *lock(&self.incarnation)
    }

    /// The last row read was seen on this server.
    pub(crate) fn seen_on(&self, incarnation: SystemTime) {
        *lock(&self.incarnation) = incarnation;
        if let Some((journal, _)) = &self.journal {
            journal.seen_on(incarnation);
        }
    }

    /// Has its reader compare what it has read, also while it has nothing to read.
    pub(crate) fn compare(&self) {
        self.compare.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    pub(crate) fn is_to_be_compared(&self) -> bool {
        self.compare.swap(false, Ordering::SeqCst)
    }

    /// How far it was read, for looks.
    pub(crate) fn position(&self) -> (Option<Day>, i64) {
        let day = Day::from_yymmdd(self.day.load(Ordering::Relaxed)).ok();
        (day, self.position.load(Ordering::Relaxed))
    }

    pub(crate) fn set_position(&self, day: Option<Day>, position: i64) {
        self.day.store(day.map_or(0, Day::yymmdd), Ordering::Relaxed);
        self.position.store(position, Ordering::Relaxed);
    }

    /// The round that rows are read in now.
    pub(crate) fn round(&self) -> u32 {
        self.round.load(Ordering::SeqCst)
    }

    /// Everything of a row was handed out.
    pub(crate) fn pass(&self, row: Option<(Day, Identity)>) {
        *lock(&self.passed) = row;
    }

    pub(crate) fn passed(&self) -> Option<(Day, Identity)> {
        *lock(&self.passed)
    }

    /// What was read behind a place is dropped, and has to be read again. Rows of the round before are
    /// worth nothing from now on.
    pub(crate) fn rewind(&self, to: Place) {
        let mut rewind = lock(&self.rewind);
        self.round.fetch_add(1, Ordering::SeqCst);
        *rewind = Some(to);
        let mut tracker = self.tracker();
        tracker.rewind(to.position);
        if tracker.span() <= self.bounds.messages / 2 {
            self.gate.fetch_and(!AHEAD, Ordering::SeqCst);
        }
        drop((tracker, rewind));
        self.wake.notify_one();
    }

    /// Hands rows over under the lock, unless there is a place to go back to: that is returned.
    pub(crate) fn unless_rewound(&self, hand_over: impl FnOnce(u32)) -> Option<Place> {
        let mut rewind = lock(&self.rewind);
        if rewind.is_none() {
            hand_over(self.round());
        }
        rewind.take()
    }
}
