//! The one clock of a history, for this process and for those that it starts.
//!
//! Members that are processes stamp their events themselves, as they happen. Were they stamped where they
//! are read, a member's acknowledgement could seem later than what another did after it, since two pipes
//! are read in any order: the check would see a skip where there was none. So the processes share a clock.
//!
//! Each goes by its own monotonic clock, which on one machine are the same one, but for where it began:
//! the time when the history's clock showed zero, by the wall clock. It is told when a process is started
//! and not kept from the beginning, so that a wall clock that is set meanwhile does no harm. What is left
//! is the time between two readings of clocks, microseconds: less than any way through a server, and the
//! check accuses nobody where calls overlap.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// The wall and the monotonic clock are read so often, and the pair that was read fastest is taken: a
/// process may be held up between the two.
const READINGS: usize = 8;

/// Monotonic. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    since: Instant,
    /// What it showed then.
    shown: Duration,
}

impl Clock {
    /// Shows zero now.
    pub(super) fn start() -> Self {
        Self { since: Instant::now(), shown: Duration::ZERO }
    }

    /// The clock of another process of this machine, by its [`zero`](Self::zero) of a moment ago.
    pub(super) fn of(zero: u64) -> Self {
        let (wall, since) = both();
        Self { since, shown: wall.saturating_sub(Duration::from_nanos(zero)) }
    }

    /// When it showed zero, in nanoseconds of the wall clock as that goes now.
    pub(super) fn zero(&self) -> u64 {
        let (wall, now) = both();
        let zero = wall.saturating_sub(self.shown + (now - self.since));
        u64::try_from(zero.as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn now(&self) -> Duration {
        self.shown + self.since.elapsed()
    }
}

/// The time of the wall clock since 1970, and of the monotonic one at that moment.
fn both() -> (Duration, Instant) {
    let read = || {
        let before = Instant::now();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (before.elapsed(), wall, before)
    };
    let mut fastest = read();
    for _ in 1..READINGS {
        let next = read();
        if next.0 < fastest.0 {
            fastest = next;
        }
    }
    (fastest.1, fastest.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_has_the_same_time() {
        let clock = Clock { since: Instant::now(), shown: Duration::from_hours(1) };
        let other = Clock::of(clock.zero());
        let times = [clock.now(), other.now(), clock.now()];
        let apart = Duration::from_millis(1);
        assert!(times[0] < times[1] + apart && times[1] < times[2] + apart, "{times:?}");
    }
}
