//! A partition that this consumer owns, from its acquisition to its end.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::consumer::acks::Tracker;
use crate::consumer::seat::Seat;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, PartitionId};
use crate::store::group::{Acquired, Fence};

/// Shared by the reader, the stream, the deliveries and the member that flushes.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    tracker: Mutex<Tracker>,
    /// Its place in the consumer's share, for as long as it is held.
    seat: Mutex<Option<Seat>>,
    state: AtomicU8,
    void: AtomicBool,
    /// Deliveries handed out and not answered.
    outstanding: AtomicUsize,
    /// Woken when `outstanding` falls to none.
    answered: Notify,
    /// Woken when there may be something to read.
    pub(crate) wake: Notify,
    /// Ends the reader.
    pub(crate) ended: CancellationToken,
    position: AtomicI64,
    day: AtomicU32,
    /// The server on which the last row read was last seen: when that was started.
    incarnation: Mutex<SystemTime>,
}

const HELD: u8 = 0;
const DRAINING: u8 = 1;
const LOST: u8 = 2;
const RESET: u8 = 3;

impl Holding {
    pub(crate) fn new(acquired: Acquired, mut seat: Seat, ended: CancellationToken) -> Self {
        seat.occupy();
        Self {
            seat: Mutex::new(Some(seat)),
            partition: acquired.partition,
            fence: acquired.fence,
            incarnation: Mutex::new(acquired.incarnation),
            position: AtomicI64::new(acquired.acked_id),
            tracker: Mutex::new(Tracker::new(acquired.acked_id, acquired.acked_ahead)),
            state: AtomicU8::new(HELD),
            void: AtomicBool::new(false),
            outstanding: AtomicUsize::new(0),
            answered: Notify::new(),
            wake: Notify::new(),
            ended,
            day: AtomicU32::new(0),
        }
    }

    pub(crate) fn tracker(&self) -> MutexGuard<'_, Tracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether messages of it may still be handed out.
    pub(crate) fn is_held(&self) -> bool {
        self.state.load(Ordering::SeqCst) == HELD
    }

    /// Nothing more is read or handed out; what is in hand may still be acknowledged.
    pub(crate) fn drain(&self) {
        let _ = self.state.compare_exchange(HELD, DRAINING, Ordering::SeqCst, Ordering::SeqCst);
        self.ended.cancel();
        self.leave_seat();
    }

    /// The same, if the consumer holds more than its share.
    pub(crate) fn drain_above(&self, share: usize) -> bool {
        let mut seat = self.seat.lock().unwrap_or_else(PoisonError::into_inner);
        let surplus = seat.as_mut().is_some_and(|seat| seat.free_above(share));
        drop(seat);
        if surplus {
            self.drain();
        }
        surplus
    }

    /// It is another's, its position was moved, or it is given back: acknowledgements are refused from
    /// now on. Those that were accepted before are in the tracker.
    pub(crate) fn end(&self, why: ErrorKind) {
        let state = if why == ErrorKind::Reset { RESET } else { LOST };
        let tracker = self.tracker();
        self.state.store(state, Ordering::SeqCst);
        drop(tracker);
        self.ended.cancel();
        self.leave_seat();
        self.answered.notify_waiters();
    }

    /// The server lacks what was read under it: what is acknowledged and not committed is void.
    pub(crate) fn void(&self) {
        self.void.store(true, Ordering::Release);
        self.end(ErrorKind::LeaseLost);
    }

    pub(crate) fn is_void(&self) -> bool {
        self.void.load(Ordering::Acquire)
    }

    fn leave_seat(&self) {
        drop(self.seat.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Records an acknowledgement.
    pub(crate) fn ack(&self, id: i64) -> Result<()> {
        // Under the lock, so that what is accepted here is seen by the flush that follows an end.
        let mut tracker = self.tracker();
        match self.state.load(Ordering::SeqCst) {
            LOST => Err(self.refusal(ErrorKind::LeaseLost)),
            RESET => Err(self.refusal(ErrorKind::Reset)),
            _ => {
                tracker.ack(id);
                Ok(())
            }
        }
    }

    pub(crate) fn refusal(&self, kind: ErrorKind) -> Error {
        let why = if kind == ErrorKind::Reset {
            "its position was moved by a seek"
        } else {
            "it belongs to another consumer now"
        };
        Error::new(kind, format!("partition {}: {why}", self.partition))
    }

    /// Counts a delivery, unless the partition is no longer held. Counted first: whoever ends it then
    /// either sees the delivery or is seen here.
    pub(crate) fn hand_out(&self) -> bool {
        self.outstanding.fetch_add(1, Ordering::SeqCst);
        let held = self.is_held();
        if !held {
            self.take_back();
        }
        held
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
        *self.incarnation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last row read was seen on this server.
    pub(crate) fn seen_on(&self, incarnation: SystemTime) {
        *self.incarnation.lock().unwrap_or_else(PoisonError::into_inner) = incarnation;
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
}
