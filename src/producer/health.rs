//! How a node fares, as one producer sees it.
//!
//! ```text
//!         attempts take long            refused, unreachable or silent
//!   up <────────────────────> slow ─────────────────────────────┐
//!   │ ^                                                          v
//!   │ └── an append worked ── tried <── a probe was answered ── down ─┐
//!   │                           └────── refused again ───────────^    │ probed within 1 s, 2 s, 4 s ..
//!   └──────────── refused, unreachable or silent ────────────────┘ <──┘
//! ```
//!
//! Messages without a key go to nodes that are up. A node whose probe was answered takes messages
//! again; only an append that works sets the interval of probes back to the shortest, so that a
//! server that answers and can't write (its disk is full, say) is tried less and less often.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::deadline::{after, spread};
use crate::error::Error;

/// An attempt that takes longer shows that its node is slow.
const LONG: Duration = Duration::from_millis(500);

/// How a node fares, as a producer sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// It takes messages.
    Up,
    /// An append takes longer than half a second: messages without a key go elsewhere meanwhile.
    Slow,
    /// It could not be reached, did not answer or refused to write. It is probed until it is back.
    Down,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Health {
    /// That of `detail`, to be read without a lock.
    state: AtomicU8,
    /// A probe was answered, and no append has worked since.
    on_trial: AtomicBool,
    detail: Mutex<Detail>,
}

#[derive(Debug)]
struct Detail {
    since: Instant,
    why: Option<Error>,
    /// The shortest and the longest time between two probes.
    bounds: (Duration, Duration),
    interval: Duration,
    /// None while a probe is under way.
    probe_at: Option<Instant>,
    /// When each attempt that is under way began.
    attempts: Vec<Instant>,
}

impl Detail {
    fn lengthen(&mut self) {
        self.interval = self.interval.saturating_mul(2).min(self.bounds.1);
    }

    /// At any time within the interval: others have seen the same failure in the same instant.
    fn schedule_probe(&mut self) {
        self.probe_at = Some(after(Instant::now(), spread(self.interval)));
    }
}

/// An attempt that is under way, until it is dropped.
pub(crate) struct Attempt<'a> {
    health: &'a Health,
    began: Instant,
}

impl Health {
    pub(crate) fn new(bounds: (Duration, Duration)) -> Self {
        let detail = Detail {
            since: Instant::now(),
            why: None,
            bounds,
            interval: bounds.0,
            probe_at: None,
            attempts: Vec::new(),
        };
        let state = AtomicU8::new(NodeState::Up as u8);
        Self { state, on_trial: AtomicBool::new(false), detail: Mutex::new(detail) }
    }

    pub(crate) fn state(&self) -> NodeState {
        match self.state.load(Ordering::Acquire) {
            0 => NodeState::Up,
            1 => NodeState::Slow,
            _ => NodeState::Down,
        }
    }

    /// Since when it is in its state, and why, where it is down.
    pub(crate) fn detail(&self) -> (Instant, Option<Error>) {
        let detail = self.lock();
        (detail.since, detail.why.clone())
    }

    /// Begins an attempt.
    pub(crate) fn attempt(&self) -> Attempt<'_> {
        let began = Instant::now();
        self.lock().attempts.push(began);
        Attempt { health: self, began }
    }

    /// It is in trouble. True: that is news.
    pub(crate) fn failed(&self, why: &Error) -> bool {
        let mut detail = self.lock();
        let news = self.state() != NodeState::Down;
        detail.why = Some(why.clone());
        if news {
            if self.on_trial.swap(false, Ordering::AcqRel) {
                detail.lengthen();
            }
            detail.schedule_probe();
            self.enter(&mut detail, NodeState::Down);
        }
        news
    }

    /// An append worked. How long the node was down, where it was.
    pub(crate) fn worked(&self) -> Option<Duration> {
        if self.state() != NodeState::Down && !self.on_trial.load(Ordering::Acquire) {
            return None;
        }
        let mut detail = self.lock();
        self.on_trial.store(false, Ordering::Release);
        detail.interval = detail.bounds.0;
        detail.why = None;
        let was_down = self.state() == NodeState::Down;
        let since = detail.since;
        if was_down {
            self.enter(&mut detail, NodeState::Up);
        }
        was_down.then(|| since.elapsed())
    }

    /// Whether it is time to probe it; the caller does, and says what came of it.
    pub(crate) fn is_probe_due(&self) -> bool {
        let mut detail = self.lock();
        let is_down = self.state() == NodeState::Down;
        is_down && detail.probe_at.take_if(|at| Instant::now() >= *at).is_some()
    }

    /// A probe had no connection to go by: the next one comes as soon.
    pub(crate) fn unasked(&self) {
        let mut detail = self.lock();
        if self.state() == NodeState::Down {
            detail.schedule_probe();
        }
    }

    /// A probe was not answered, or with an error: the next one comes later.
    pub(crate) fn unanswered(&self, why: &Error) {
        let mut detail = self.lock();
        if self.state() != NodeState::Down {
            // An append has worked meanwhile.
            return;
        }
        detail.why = Some(why.clone());
        detail.lengthen();
        detail.schedule_probe();
    }

    /// A probe was answered: it takes messages again, on trial. How long it was down.
    pub(crate) fn answered(&self) -> Option<Duration> {
        let mut detail = self.lock();
        if self.state() != NodeState::Down {
            return None;
        }
        let since = detail.since;
        self.on_trial.store(true, Ordering::Release);
        self.enter(&mut detail, NodeState::Up);
        Some(since.elapsed())
    }

    /// Compares the attempts under way with the clock. True: its state is another now.
    pub(crate) fn look(&self) -> bool {
        let mut detail = self.lock();
        let slow = detail.attempts.iter().any(|began| began.elapsed() > LONG);
        let next = match (self.state(), slow) {
            (NodeState::Up, true) => NodeState::Slow,
            (NodeState::Slow, false) => NodeState::Up,
            _ => return false,
        };
        self.enter(&mut detail, next);
        true
    }

    fn enter(&self, detail: &mut Detail, state: NodeState) {
        detail.since = Instant::now();
        self.state.store(state as u8, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Detail> {
        self.detail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut detail = self.health.lock();
        if let Some(index) = detail.attempts.iter().position(|began| *began == self.began) {
            detail.attempts.swap_remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const SECOND: Duration = Duration::from_secs(1);

    fn trouble() -> Error {
        Error::new(ErrorKind::Unavailable, "connection refused")
    }

    /// How long it takes until a probe is due.
    async fn until_probe(health: &Health) -> Duration {
        let began = Instant::now();
        while !health.is_probe_due() {
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let waited = began.elapsed();
        // No second one meanwhile.
        tokio::time::advance(Duration::from_mins(5)).await;
        assert!(!health.is_probe_due());
        waited
    }

    #[tokio::test(start_paused = true)]
    async fn probes_come_less_and_less_often_until_an_append_works() {
        let health = Health::new((SECOND, 5 * SECOND));
        assert!(health.failed(&trouble()) && !health.failed(&trouble()));
        for secs in [1, 2, 4, 5, 5] {
            assert!(until_probe(&health).await <= secs * SECOND);
            assert_eq!(health.lock().interval, secs * SECOND);
            health.unanswered(&trouble());
        }
        // It answers, but can't write.
        assert!(health.answered().is_some());
        assert_eq!(health.state(), NodeState::Up);
        assert!(health.failed(&trouble()));
        assert_eq!(health.lock().interval, 5 * SECOND);
        until_probe(&health).await;
        health.unanswered(&trouble());
        assert_eq!(health.lock().interval, 5 * SECOND);
        until_probe(&health).await;
        health.answered();
        assert_eq!(health.worked(), None);
        health.failed(&trouble());
        assert_eq!(health.lock().interval, SECOND);
        assert!(until_probe(&health).await <= SECOND);
        assert!(health.worked().is_some());
        assert_eq!((health.state(), health.detail().1.is_none()), (NodeState::Up, true));
    }

    #[tokio::test(start_paused = true)]
    async fn who_saw_the_same_failure_does_not_probe_in_the_same_instant() {
        let all: Vec<_> = (0..100).map(|_| Health::new((SECOND, SECOND))).collect();
        let now = Instant::now();
        for health in &all {
            assert!(health.failed(&trouble()));
        }
        let due = |from: u32, to: u32| {
            let within = now + SECOND / 4 * from..=now + SECOND / 4 * to;
            all.iter()
                .filter(|it| it.lock().probe_at.is_some_and(|at| within.contains(&at)))
                .count()
        };
        assert_eq!(due(0, 4), 100);
        assert!((0..4).all(|quarter| due(quarter, quarter + 1) >= 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_had_no_connection_makes_none_later() {
        let health = Health::new((SECOND, 60 * SECOND));
        health.failed(&trouble());
        for _ in 0..5 {
            until_probe(&health).await;
            health.unasked();
        }
        assert_eq!(health.lock().interval, SECOND);
        // However long the time between two probes is.
        let health = Health::new((Duration::MAX, Duration::MAX));
        health.failed(&trouble());
        health.unanswered(&trouble());
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_attempt_makes_it_slow_until_it_ends() {
        let health = Health::new((SECOND, 60 * SECOND));
        let attempt = health.attempt();
        drop(health.attempt());
        assert!(!health.look());
        tokio::time::advance(LONG * 2).await;
        assert!(health.look() && !health.look());
        assert_eq!(health.state(), NodeState::Slow);
        drop(attempt);
        assert!(health.look());
        assert_eq!(health.state(), NodeState::Up);
    }
}
