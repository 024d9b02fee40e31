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
    /// Whether the last one left something behind its end.
    has_more: bool,
    /// Whether somebody waits for that.
    is_wanted: bool,
    next: Option<Instant>,
}

/// Before everything.
const START: (SystemTime, i64) = (UNIX_EPOCH, 0);

impl Due {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            place: START,
            full_at: now,
            is_full: false,
            has_more: false,
            is_wanted: false,
            next: None,
        }
    }

    /// The place behind which the next look reads.
    pub(super) fn after(&mut self, now: Instant) -> (SystemTime, i64) {
        // What waits is not looked at a second time before everything was at once.
        self.is_full = now >= self.full_at && !self.has_more;
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
        self.has_more = more;
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

    /// The same at once, since what waits may go now, and before what is behind it.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        self.has_more = false;
        self.look_from_the_start(now);
    }

    /// When there is something to look at.
    pub(super) fn next(&self) -> Option<Instant> {
        let wanted = self.is_wanted.then_some(self.full_at);
        self.next.into_iter().chain(wanted).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_not_looked_at_again_before_all_was_looked_at() {
        let now = Instant::now();
        let mut due = Due::new(now);
        let place = |secs| (UNIX_EPOCH + Duration::from_secs(secs), 1);
        assert_eq!(due.after(now), START);
        due.looked(Some(place(1)), true, None, now);
        due.look_from_the_start(now);
        assert_eq!(due.after(now), place(1));
        due.looked(Some(place(2)), true, None, now);
        assert_eq!(due.after(now), place(2));
        due.looked(Some(place(3)), false, None, now);
        assert_eq!(due.after(now), START);
        // Something that they waited for is there.
        due.looked(Some(place(1)), true, None, now);
        due.begin_anew(now);
        assert_eq!(due.after(now), START);
    }
}
