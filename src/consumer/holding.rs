//! A partition that this consumer owns, from its acquisition to its end.

use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::consumer::acks::Tracker;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, PartitionId};
use crate::store::group::{Acquired, Fence};

/// Shared by the reader, the stream, the deliveries and the member that flushes.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    pub(crate) tracker: Mutex<Tracker>,
    state: AtomicU8,
    /// Deliveries handed out and not answered.
    outstanding: AtomicUsize,
    /// Woken when `outstanding` falls to none.
    pub(crate) answered: Notify,
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
    pub(crate) fn new(acquired: Acquired, ended: CancellationToken) -> Self {
        Self {
            partition: acquired.partition,
            fence: acquired.fence,
            incarnation: Mutex::new(acquired.incarnation),
            position: AtomicI64::new(acquired.acked_id),
            tracker: Mutex::new(Tracker::new(acquired.acked_id, acquired.acked_ahead)),
            state: AtomicU8::new(HELD),
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
        self.state.load(Ordering::Acquire) == HELD
    }

    /// Nothing more is read or handed out; what is in hand may still be acknowledged.
    pub(crate) fn drain(&self) {
        let _ = self
            .state
            .compare_exchange(HELD, DRAINING, Ordering::AcqRel, Ordering::Acquire);
        self.ended.cancel();
    }

    /// It is another's, or its position was moved: acknowledgements are refused from now on.
    pub(crate) fn end(&self, why: ErrorKind) {
        let state = if why == ErrorKind::Reset { RESET } else { LOST };
        self.state.store(state, Ordering::Release);
        self.ended.cancel();
        self.answered.notify_waiters();
    }

    /// Records an acknowledgement.
    pub(crate) fn ack(&self, id: i64) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            LOST => Err(self.refusal(ErrorKind::LeaseLost)),
            RESET => Err(self.refusal(ErrorKind::Reset)),
            _ => {
                self.tracker().ack(id);
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

    pub(crate) fn hand_out(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn take_back(&self) {
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.answered.notify_waiters();
        }
    }

    /// Waits until every delivery was answered or dropped, or the partition was lost.
    pub(crate) async fn drained(&self) {
        loop {
            let answered = self.answered.notified();
            let lost = self.state.load(Ordering::Acquire) >= LOST;
            if lost || self.outstanding.load(Ordering::Acquire) == 0 {
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
        self.day
            .store(day.map_or(0, Day::yymmdd), Ordering::Relaxed);
        self.position.store(position, Ordering::Relaxed);
    }
}
