//! When a message that failed is tried again, and when it is given up. Pure.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::deadline::jitter;

/// The longest delay of a retry.
const LONGEST: Duration = Duration::from_hours(24 * 365);

type Rule = Arc<dyn Fn(&(dyn StdError + Send + Sync + 'static)) -> bool + Send + Sync>;

/// When a message that a handler failed at is tried again, and after how many attempts it is given up: it
/// goes to the [dead letters](crate::Cluster::dead_letters) of its group then, with its errors.
///
/// ```
/// use std::time::Duration;
/// use shardmq::RetryPolicy;
///
/// let second = Duration::from_secs(1);
/// // After 1 s, 2 s, 4 s, .. 60 s; 10 attempts.
/// let _ = RetryPolicy::exponential(second, 60 * second).attempts(10);
/// // Four attempts.
/// let _ = RetryPolicy::delays([second, 10 * second, 60 * second]);
/// // For ever, but for what will never succeed.
/// let _ = RetryPolicy::fixed(5 * second).for_ever().dead_letter_if(|error| {
///     error.downcast_ref::<serde_json::Error>().is_some()
/// });
/// ```
#[derive(Clone)]
pub struct RetryPolicy {
    delays: Delays,
    attempts: Option<u32>,
    dead: Option<Rule>,
}

#[derive(Debug, Clone)]
enum Delays {
    Fixed(Duration),
    Exponential(Duration, Duration),
    List(Arc<[Duration]>),
}

/// What becomes of a message that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is tried again after this time.
    Again(Duration),
    /// It is given up.
    Dead,
}

impl RetryPolicy {
    /// The same delay each time, and up to 50 attempts. At most a year.
    pub fn fixed(delay: Duration) -> Self {
        Self::new(Delays::Fixed(delay.min(LONGEST)))
    }

    /// This delay at first, then twice as long each time up to the longest, each give or take a fifth; and up
    /// to 50 attempts. At most a year.
    pub fn exponential(first: Duration, longest: Duration) -> Self {
        let longest = longest.min(LONGEST);
        Self::new(Delays::Exponential(first.min(longest), longest))
    }

    /// These delays one after the other: one attempt more than delays. With more
    /// [`attempts`](Self::attempts) the last delay goes on. Without any delay a message is given up after its
    /// first attempt. At most a year each.
    pub fn delays(delays: impl IntoIterator<Item = Duration>) -> Self {
        let delays: Arc<[Duration]> = delays.into_iter().map(|delay| delay.min(LONGEST)).collect();
        let attempts = u32::try_from(delays.len()).unwrap_or(u32::MAX).saturating_add(1);
        Self { attempts: Some(attempts), ..Self::new(Delays::List(delays)) }
    }

    fn new(delays: Delays) -> Self {
        Self { delays, attempts: Some(50), dead: None }
    }

    /// How often a message is tried at most, the first time included; at least once.
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = Some(attempts.max(1));
        self
    }

    /// Tries until it succeeds: what never does stops its partition, or its key, in the ordered modes.
    pub fn for_ever(mut self) -> Self {
        self.attempts = None;
        self
    }

    /// Gives a message up at once where its handler fails with such an error. Asked with the error that
    /// the handler returned, converted into a box.
    pub fn dead_letter_if(
        mut self,
        rule: impl Fn(&(dyn StdError + Send + Sync + 'static)) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.dead = Some(Arc::new(rule));
        self
    }

    /// Whether such an error is final.
    pub(crate) fn is_final(&self, error: &(dyn StdError + Send + Sync + 'static)) -> bool {
        self.dead.as_ref().is_some_and(|rule| rule(error))
    }

    /// What follows after so many attempts, the one that failed included.
    pub(crate) fn after(&self, attempts: u32) -> Decision {
        if self.attempts.is_some_and(|most| attempts >= most) {
            return Decision::Dead;
        }
        let before = attempts.saturating_sub(1);
        Decision::Again(match &self.delays {
            Delays::Fixed(delay) => *delay,
            Delays::Exponential(first, longest) => {
                let doubled = first.saturating_mul(1 << before.min(31));
                jitter(doubled.min(*longest))
            }
            Delays::List(delays) => {
                let last = delays.len().saturating_sub(1);
                delays.get(last.min(before as usize)).copied().unwrap_or_default()
            }
        })
    }
}

impl Default for RetryPolicy {
    /// After 100 ms, then twice as long each time up to 30 s; 50 attempts, which take some 20 minutes.
    fn default() -> Self {
        Self::exponential(Duration::from_millis(100), Duration::from_secs(30))
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("delays", &self.delays)
            .field("attempts", &self.attempts)
            .field("has_rule", &self.dead.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn delays(policy: &RetryPolicy, count: u32) -> Vec<Decision> {
        (1..=count).map(|attempts| policy.after(attempts)).collect()
    }

    #[test]
    fn a_list_is_one_attempt_longer_and_its_last_delay_goes_on_where_more_are_asked_for() {
        use Decision::{Again, Dead};
        let list = RetryPolicy::delays([SECOND, 3 * SECOND]);
        assert_eq!(delays(&list, 3), [Again(SECOND), Again(3 * SECOND), Dead]);
        let longer = list.attempts(4);
        assert_eq!(delays(&longer, 4)[2..], [Again(3 * SECOND), Dead]);
        assert_eq!(RetryPolicy::delays([]).after(1), Dead);
        assert_eq!(RetryPolicy::fixed(SECOND).attempts(0).after(1), Dead);
        assert_eq!(RetryPolicy::fixed(SECOND).for_ever().after(u32::MAX), Again(SECOND));
    }

    #[test]
    fn exponential_doubles_up_to_the_longest_and_never_overflows() {
        let policy = RetryPolicy::exponential(SECOND, 60 * SECOND).for_ever();
        for (attempts, wanted) in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (u32::MAX, 60)] {
            let Decision::Again(delay) = policy.after(attempts) else { panic!("given up") };
            let wanted = wanted * SECOND;
            assert!(delay >= wanted * 4 / 5 && delay <= wanted * 6 / 5, "{attempts}: {delay:?}");
        }
        let endless = RetryPolicy::exponential(Duration::MAX, Duration::MAX);
        assert!(matches!(endless.after(3), Decision::Again(_)));
    }
}
