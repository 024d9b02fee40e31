//! Up to where delayed messages were looked at: pure.
//!
//! What was taken leaves dead entries at the left edge of the index, and while an old snapshot is held these
//! stay. So a look begins where the last one ended. A message may come to lie before that place, if its
//! transaction was committed after it was due, or the clock was set back: about each second one look begins
//! at the start, less often where that takes long.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// How often a look begins at the start, and what part of the time such looks may take.
const FULL_EVERY: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Due {
    /// Where the next look begins.
    place: (SystemTime, i64),
    /// When one begins at the start.
    full_at: Instant,
    /// Whether the one under way does.
    is_full: bool,
    /// Whether somebody waits for that.
    is_wanted: bool,
    next: Option<Instant>,
}

/// Before everything.
const START: (SystemTime, i64) = (UNIX_EPOCH, 0);

impl Due {
    pub(super) fn new(now: Instant) -> Self {
        Self { place: START, full_at: now, is_full: false, is_wanted: false, next: None }
    }

    /// The place behind which the next look reads.
    pub(super) fn after(&mut self, now: Instant) -> (SystemTime, i64) {
        self.is_full = now >= self.full_at;
        if self.is_full { START } else { self.place }
    }

    /// A look was made, which began at this time: the last that it saw, whether there may be more behind it,
    /// and how long until the next is due.
    pub(super) fn looked(
        &mut self,
        last: Option<(SystemTime, i64)>,
        more: bool,
        next: Option<Duration>,
        began: Instant,
    ) {
        let now = Instant::now();
        if self.is_full {
            self.full_at = now + FULL_EVERY.max((now - began) * SHARE);
            self.is_wanted = false;
        }
        match last {
            // A page of what is old: behind it is what was not looked at yet.
            Some(last) if self.is_full && more => self.place = last,
            Some(last) => self.place = self.place.max(last),
            None => {}
        }
        self.next = next.map(|next| now + next);
    }

    /// Something is left where it was: a look begins at the start, at this time at the latest.
    pub(super) fn look_from_the_start(&mut self, at: Instant) {
        self.full_at = self.full_at.min(at);
        self.is_wanted = true;
    }

    /// When there is something to look at.
    pub(super) fn next(&self) -> Option<Instant> {
        let wanted = self.is_wanted.then_some(self.full_at);
        self.next.into_iter().chain(wanted).min()
    }
}
