//! How often a member answers news of its group at once: often when there is little, and seldom
//! when there is much, so that neither two members that disagree nor a thousand that join keep the
//! control database busy.

use std::time::Duration;

use tokio::time::Instant;

/// So many pieces of news are answered at once.
const BURST: u32 = 10;
/// And then one in so long a time.
const EACH: Duration = Duration::from_millis(500);

/// A bucket that is full at the start.
#[derive(Debug)]
pub(super) struct NewsPace {
    /// When it will be full again, if nothing is taken.
    full_at: Instant,
}

impl NewsPace {
    pub(super) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes one turn, now or as soon as there is one; returns when.
    pub(super) fn turn(&mut self, now: Instant) -> Instant {
        let at = now.max(self.next(now));
        self.full_at = self.full_at.max(at) + EACH;
        at
    }

    /// When the next turn is.
    fn next(&self, now: Instant) -> Instant {
        self.full_at.checked_sub(EACH * (BURST - 1)).unwrap_or(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_answered_at_once_and_many_twice_a_second() {
        let begun = Instant::now();
        let mut pace = NewsPace::new(begun);
        for _ in 0..BURST {
            assert_eq!(pace.turn(begun), begun);
        }
        let mut now = begun;
        for turn in 1..=20 {
            now = pace.turn(now);
            assert_eq!(now, begun + turn * EACH);
        }
        let later = now + BURST * EACH;
        for _ in 0..BURST {
            assert_eq!(pace.turn(later), later);
        }
        assert!(pace.turn(later) > later);
    }
}
