//! How well hints arrive, as a state.
//!
//! ```text
//!            canary heard                       10 s
//! Reconnecting ─────────> Ok          Reconnecting ─────> Polling
//!            <───────────                                   │
//!             interrupted <──────────── canary heard: Ok <──┘
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// After how long an interruption is more than a reconnection.
const PATIENCE: Duration = Duration::from_secs(10);

/// See [`Health`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// Hints arrive: the last canary was heard.
    Ok,
    /// They do not arrive, for 10 s at most so far: the notifier is connecting, for the first time or again.
    Reconnecting,
    /// They have not arrived for longer, or can't at all. Consumers find messages by looking.
    Polling,
}

impl HealthState {
    /// 0, 1 and 2, for a gauge.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Reconnecting => 1,
            Self::Polling => 2,
        }
    }
}

/// How hints arrive, and since when. Messages come in any case, only later while they do not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// How.
    pub state: HealthState,
    /// Since when, by this machine's clock.
    pub since: SystemTime,
    /// How long the last canary took from its sending to its arrival here; none before the first.
    pub round_trip: Option<Duration>,
    /// Why hints do not arrive, and what to do about it where that is known; none where they do, unless it is by
    /// one of [`Both`](crate::notifier::Both) only.
    pub error: Option<String>,
}

impl Health {
    /// Whether hints arrive.
    pub fn is_ok(&self) -> bool {
        self.state == HealthState::Ok
    }
}

/// Keeps a [`Health`], for implementations of [`Notifier`](crate::notifier::Notifier).
#[derive(Debug)]
pub struct HealthCell(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    health: Health,
    /// Since when they do not arrive; none where they do, or can't at all.
    interrupted: Option<Instant>,
    /// Nobody listens.
    idle: bool,
}

impl HealthCell {
    /// Hints do not arrive yet.
    pub fn new() -> Self {
        let (state, since) = (HealthState::Reconnecting, SystemTime::now());
        let health = Health { state, since, round_trip: None, error: None };
        Self(Mutex::new(Kept { health, interrupted: Some(Instant::now()), idle: true }))
    }

    /// Somebody begins to listen, or tries again. Where hints did not arrive since nobody did, that counts
    /// from now on.
    pub fn begin(&self) {
        let mut kept = self.lock();
        if !kept.health.is_ok() && std::mem::replace(&mut kept.idle, false) {
            (kept.health.state, kept.health.since) = (HealthState::Reconnecting, SystemTime::now());
            (kept.interrupted, kept.health.error) = (Some(Instant::now()), None);
        }
    }

    /// Nobody listens any more, so that hints do not arrive.
    pub fn rest(&self) {
        let mut kept = self.lock();
        let error = Some("nobody listened until now".to_owned());
        (kept.health.state, kept.health.since) = (HealthState::Reconnecting, SystemTime::now());
        (kept.interrupted, kept.health.error, kept.idle) = (Some(Instant::now()), error, true);
    }

    /// Hints arrive. Returns for how long they did not; none where they did.
    pub fn arrive(&self) -> Option<Duration> {
        let mut kept = self.lock();
        (kept.health.error, kept.idle) = (None, false);
        if kept.health.is_ok() {
            return None;
        }
        (kept.health.state, kept.health.since) = (HealthState::Ok, SystemTime::now());
        Some(kept.interrupted.take().map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// A canary was heard after so long.
    pub fn measured(&self, round_trip: Duration) {
        self.lock().health.round_trip = Some(round_trip);
    }

    /// Hints do not arrive, and why. True where they did.
    pub fn interrupt(&self, error: &str) -> bool {
        let mut kept = self.lock();
        (kept.health.error, kept.idle) = (Some(error.to_owned()), false);
        if kept.interrupted.is_some() {
            return false;
        }
        let arrived = kept.health.is_ok();
        (kept.health.state, kept.health.since) = (HealthState::Reconnecting, SystemTime::now());
        kept.interrupted = Some(Instant::now());
        arrived
    }

    /// Hints can't arrive, as things are set, and why.
    pub fn give_up(&self, error: &str) {
        let mut kept = self.lock();
        (kept.health.error, kept.idle) = (Some(error.to_owned()), false);
        if kept.health.state != HealthState::Polling {
            (kept.health.state, kept.health.since) = (HealthState::Polling, SystemTime::now());
        }
        kept.interrupted = None;
    }

    /// Whether hints arrive.
    pub fn is_ok(&self) -> bool {
        self.lock().health.is_ok()
    }

    /// What is kept.
    pub fn get(&self) -> Health {
        let kept = self.lock();
        let mut health = kept.health.clone();
        if !kept.idle && kept.interrupted.is_some_and(|since| since.elapsed() >= PATIENCE) {
            health.state = HealthState::Polling;
            health.since += PATIENCE;
        }
        health
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for HealthCell {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_reconnects_for_a_while_and_then_polls() {
        let cell = HealthCell::new();
        assert_eq!(cell.get().state, HealthState::Reconnecting);
        assert!(cell.arrive().is_some());
        assert!(cell.arrive().is_none());
        let ok = cell.get();
        assert!(ok.is_ok() && ok.error.is_none());

        assert!(cell.interrupt("gone"));
        assert!(!cell.interrupt("still gone"));
        let began = cell.get();
        assert_eq!(began.state, HealthState::Reconnecting);
        assert_eq!(began.error.as_deref(), Some("still gone"));
        tokio::time::advance(PATIENCE).await;
        let later = cell.get();
        assert_eq!(later.state, HealthState::Polling);
        assert_eq!(later.since, began.since + PATIENCE);
        assert_eq!(cell.arrive(), Some(PATIENCE));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_in_which_nobody_listens_does_not_count() {
        let cell = HealthCell::new();
        tokio::time::advance(2 * PATIENCE).await;
        cell.begin();
        assert_eq!(cell.get().state, HealthState::Reconnecting);
        tokio::time::advance(PATIENCE).await;
        // Another attempt of the same interruption.
        cell.begin();
        assert_eq!(cell.get().state, HealthState::Polling);
        cell.arrive();
        cell.rest();
        assert!(cell.get().error.is_some());
        tokio::time::advance(2 * PATIENCE).await;
        cell.begin();
        assert_eq!(cell.get().state, HealthState::Reconnecting);
        assert_eq!(cell.get().error, None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_arrive_is_polled_for_at_once() {
        let cell = HealthCell::new();
        cell.give_up("a pooler");
        let health = cell.get();
        assert_eq!(health.state, HealthState::Polling);
        cell.give_up("a pooler");
        assert_eq!(cell.get().since, health.since);
        // The address is another now, which has to be connected to.
        assert!(!cell.interrupt("refused"));
        assert_eq!(cell.get().state, HealthState::Reconnecting);
        cell.measured(Duration::from_millis(1));
        assert_eq!(cell.arrive(), Some(Duration::ZERO));
        assert_eq!(cell.get().round_trip, Some(Duration::from_millis(1)));
    }
}
