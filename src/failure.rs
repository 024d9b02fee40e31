//! What was tried with a message before. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// How many attempts are told of a message: of more, the first half and the last.
const TOLD: usize = 16;
/// The most bytes of an error that is kept.
const ERROR_BYTES: usize = 2_000;

/// An attempt at a message that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailedAttempt {
    /// Which one, from 1. A dead letter that is given to its group again is counted anew.
    pub attempt: u32,
    /// When it failed, by the clock of the consumer's machine.
    #[serde(with = "epoch_secs")]
    pub at: SystemTime,
    /// The error and its causes, up to 2,000 bytes.
    pub error: String,
}

impl FailedAttempt {
    pub(crate) fn new(attempt: u32, error: &str) -> Self {
        let mut end = error.len().min(ERROR_BYTES);
        while !error.is_char_boundary(end) {
            end -= 1;
        }
        // Postgres can't store NUL in text.
        let error = error[..end].replace('\0', "\u{fffd}");
        Self { attempt, at: now(), error }
    }
}

/// The time, to the microsecond: as Postgres keeps it.
pub(crate) fn now() -> SystemTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_micros(u64::try_from(since.as_micros()).unwrap_or(0))
}

/// What was tried with a message before, all in all.
#[derive(Debug, Clone)]
pub(crate) struct Past {
    /// Since it was sent, or given to the group again.
    pub(crate) attempts: u32,
    pub(crate) first_seen: SystemTime,
    pub(crate) failures: Vec<FailedAttempt>,
}

impl Past {
    /// With one failure more.
    pub(crate) fn failed(&self, error: &str) -> Self {
        let attempts = self.attempts.saturating_add(1);
        let mut failures = self.failures.clone();
        failures.push(FailedAttempt::new(attempts, error));
        if failures.len() > TOLD {
            failures.remove(TOLD / 2);
        }
        Self { attempts, first_seen: self.first_seen, failures }
    }
}

/// Times as seconds since 1970, as Postgres' `to_timestamp` takes them.
mod epoch_secs {
    use super::{Deserialize, Duration, SystemTime, UNIX_EPOCH};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        to.serialize_f64((since.as_secs_f64() * 1e6).round() / 1e6)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let secs = f64::deserialize(from)?;
        let since = Duration::try_from_secs_f64(secs.max(0.0)).unwrap_or_default();
        Ok(UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_failures_the_first_and_the_last_are_told() {
        let mut past = Past { attempts: 0, first_seen: UNIX_EPOCH, failures: Vec::new() };
        for n in 1..=40 {
            past = past.failed(&format!("error {n}"));
        }
        let told: Vec<u32> = past.failures.iter().map(|failure| failure.attempt).collect();
        assert_eq!(told, (1..=8).chain(33..=40).collect::<Vec<_>>());
        assert_eq!(past.attempts, 40);
    }

    #[test]
    fn an_error_is_cut_at_a_character_and_has_no_nul() {
        let failure = FailedAttempt::new(1, &format!("a\0{}", "ü".repeat(2_000)));
        assert!(failure.error.len() <= ERROR_BYTES + 2);
        assert!(failure.error.starts_with("a\u{fffd}ü") && !failure.error.contains('\0'));
        let text = serde_json::to_string(&failure).unwrap();
        let back: FailedAttempt = serde_json::from_str(&text).unwrap();
        let apart = failure.at.duration_since(back.at).unwrap_or_else(|late| late.duration());
        assert!(apart < Duration::from_millis(1) && back.error == failure.error);
    }
}
