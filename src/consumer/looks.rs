//! When to look for messages without a hint: pure.
//!
//! ```text
//! hints arrive:     every poll interval, at the latest
//! they do not:      50 ms ─ nothing ─> 100 ms ─ nothing ─> ... ─> the poll interval
//!                     ^                                     │
//!                     └──────────── something ──────────────┘
//! ```
//!
//! Not less often where hints arrive, though a canary says so: it does not tell of a hint that its sender
//! could not send.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::deadline::jitter;
use crate::id::PartitionId;
use crate::notifier::HealthState;

/// Between looks where hints do not arrive and something was found.
const SHORTEST: Duration = Duration::from_millis(50);
/// Before another try, while somebody else of this process looks at the node: at first, and at most.
const BUSY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// After so long it looks all the same: others may be many, or hang.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Looks {
    longest: Duration,
    every: Duration,
    at: Instant,
    /// How hints arrive, as it was heard last; none before.
    state: Option<HealthState>,
    /// The look under way has found something that its reader goes for.
    found: bool,
    /// How far readers were that had something before them, at the last look.
    behind: HashMap<PartitionId, i64>,
    /// Since when somebody else is at it, and before which try.
    waiting: Option<(Instant, Duration)>,
}

impl Looks {
    /// At the latest so often, from now on.
    pub(super) fn new(longest: Duration, now: Instant) -> Self {
        Self {
            longest,
            every: longest,
            at: now + before(longest),
            state: None,
            found: false,
            behind: HashMap::new(),
            waiting: None,
        }
    }

    /// When the next one is due.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    /// Hints arrive so. True where that is news.
    pub(super) fn observe(&mut self, state: HealthState, now: Instant) -> bool {
        let before = self.state.replace(state);
        let arrive = |state| state == HealthState::Ok;
        if before.is_none_or(arrive) && !arrive(state) {
            self.every = SHORTEST.min(self.longest);
            self.at = self.at.min(now + self.every);
        }
        before != Some(state)
    }

    /// These have something before their readers, who are there. One that has not moved since the last look
    /// waits for something else, and looking more often does not help it.
    pub(super) fn found(&mut self, changed: HashMap<PartitionId, i64>) {
        let moves = |(partition, position): (&PartitionId, &i64)| {
            self.behind.get(partition) != Some(position)
        };
        self.found = changed.iter().any(moves);
        self.behind = changed;
    }

    /// One was made.
    pub(super) fn looked(&mut self, now: Instant) {
        self.every = match (self.state, std::mem::take(&mut self.found)) {
            (Some(HealthState::Ok), _) => self.longest,
            (_, true) => SHORTEST.min(self.longest),
            (_, false) => (self.every * 2).min(self.longest),
        };
        self.at = now + before(self.every);
        self.waiting = None;
    }

    /// Somebody else is at it. False where that has lasted too long to be waited for.
    pub(super) fn busy(&mut self, now: Instant) -> bool {
        let (since, pause) = self.waiting.unwrap_or((now, BUSY.0));
        self.waiting = Some((since, (pause * 2).min(BUSY.1)));
        self.at = now + jitter(pause);
        now - since < PATIENCE.min(self.longest / 5)
    }
}

/// Some time before this is over, so that there is time to wait for others.
fn before(longest: Duration) -> Duration {
    jitter(longest * 2 / 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn partition() -> PartitionId {
        PartitionId::new(1, 1).unwrap()
    }

    /// Waits until the next look and makes it, which finds something new or nothing; how long that was.
    fn look(looks: &mut Looks, now: &mut Instant, found: bool) -> Duration {
        let waited = looks.at() - *now;
        *now = looks.at();
        let position = looks.behind.values().max().unwrap_or(&0) + 1;
        looks.found(found.then_some((partition(), position)).into_iter().collect());
        looks.looked(*now);
        waited
    }

    #[test]
    fn it_looks_more_often_while_hints_do_not_arrive_and_some_come() {
        let mut now = Instant::now();
        let mut looks = Looks::new(5 * SECOND, now);
        assert!(looks.observe(HealthState::Ok, now));
        assert!(!looks.observe(HealthState::Ok, now));
        for found in [true, false] {
            let waited = look(&mut looks, &mut now, found);
            assert!((2 * SECOND..=4 * SECOND).contains(&waited), "{waited:?}");
        }
        assert!(looks.observe(HealthState::Reconnecting, now));
        assert!(look(&mut looks, &mut now, true) <= SHORTEST);
        assert!(look(&mut looks, &mut now, true) <= SHORTEST);
        // What changes between two ways of not arriving changes nothing.
        assert!(looks.observe(HealthState::Polling, now));
        let mut all = Duration::ZERO;
        let mut waits: Vec<Duration> = Vec::new();
        while waits.last().is_none_or(|last| *last < 2 * SECOND) {
            waits.push(look(&mut looks, &mut now, false));
            all += waits[waits.len() - 1];
        }
        assert!(waits.len() > 5 && all < 20 * SECOND, "{waits:?}");
        for _ in 0..100 {
            assert!(look(&mut looks, &mut now, false) <= 5 * SECOND);
        }
        look(&mut looks, &mut now, true);
        assert!(look(&mut looks, &mut now, false) <= SHORTEST);
    }

    #[test]
    fn a_shorter_poll_interval_is_kept() {
        let mut now = Instant::now();
        let mut looks = Looks::new(SECOND / 100, now);
        looks.observe(HealthState::Polling, now);
        for found in [true, false, false, false] {
            assert!(look(&mut looks, &mut now, found) <= SECOND / 100);
        }
    }

    #[test]
    fn a_reader_that_waits_for_something_else_is_not_looked_for_again_and_again() {
        let mut now = Instant::now();
        let mut looks = Looks::new(5 * SECOND, now);
        looks.observe(HealthState::Polling, now);
        let mut all = Duration::ZERO;
        for _ in 0..20 {
            all += looks.at() - now;
            now = looks.at();
            looks.found(HashMap::from([(partition(), 7)]));
            looks.looked(now);
        }
        assert!(all > 25 * SECOND, "{all:?}");
        looks.found(HashMap::from([(partition(), 8)]));
        looks.looked(now);
        assert!(look(&mut looks, &mut now, false) <= SHORTEST);
    }

    #[test]
    fn who_waits_for_others_tries_less_and_less_often_and_then_looks() {
        let mut now = Instant::now();
        let mut looks = Looks::new(5 * SECOND, now);
        let (began, mut tries) = (now, 0);
        while looks.busy(now) {
            now = looks.at();
            tries += 1;
        }
        assert!((PATIENCE..2 * PATIENCE).contains(&(now - began)), "{:?}", now - began);
        assert!(tries < 30, "{tries}");
        looks.looked(now);
        assert!(looks.busy(now));
    }
}
