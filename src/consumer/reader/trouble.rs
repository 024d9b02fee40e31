//! Telling of errors that last: whoever consumes hears of each partition that stands still.

use std::time::Duration;

use tokio::time::Instant;

use crate::consumer::Event;
use crate::consumer::reader::Reader;
use crate::error::{Error, ErrorKind};
use crate::metrics as names;
use crate::trouble::Trouble;

/// Between attempts after an error.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long trouble lasts that passes by itself, at most: a restart, a lock for a moment.
const PASSES: Duration = Duration::from_secs(5);
/// How often to say that there is still trouble.
const REMIND: Duration = Duration::from_mins(1);

/// A series of errors without success in between. Pure.
pub(super) struct Lasting {
    since: Option<Instant>,
    backoff: Duration,
    logged: Trouble,
    told: Trouble,
}

impl Lasting {
    pub(super) fn new() -> Self {
        let (logged, told) = (Trouble::new(REMIND), Trouble::new(REMIND));
        Self { since: None, backoff: BACKOFF.0, logged, told }
    }

    /// All is well.
    pub(super) fn end(&mut self) {
        *self = Self::new();
    }

    /// How long to wait before the next attempt.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        pause
    }

    /// There is an error. Whether that is to be logged, and to be told in the stream. The members tell of
    /// a node that is away; an error that no time cures is told as soon as it comes a second time.
    fn meet(&mut self, now: Instant, passes: bool, node_is_away: bool) -> (bool, bool) {
        let again = self.since.is_some();
        let since = *self.since.get_or_insert(now);
        let lasts = if passes { now - since >= PASSES && !node_is_away } else { again };
        (self.logged.meet(now), lasts && self.told.meet(now))
    }
}

impl Reader {
    /// Says in the log, and in the stream where it lasts, that this partition stands still.
    pub(super) fn tell_of(&self, lasting: &mut Lasting, error: &Error) {
        let partition = self.holding.partition;
        let passes = matches!(
            error.kind(),
            ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::Unknown
        );
        let node_is_away = self.shared.reach.is_failing(partition.node());
        let (logs, tells) = lasting.meet(Instant::now(), passes, node_is_away);
        if logs {
            tracing::warn!(%partition, error = %error.chain(), "reading failed, going on");
        }
        if tells {
            ::metrics::counter!(names::STALLED).increment(1);
            let group = &self.shared.group;
            let error = error.chain();
            tracing::error!(%partition, %group, error, alert = "partition", "a partition stands still");
            let what = format!("partition {partition} stands still for group {group}: {error}");
            self.shared.send(Event::Error(Error::new(ErrorKind::Unavailable, what)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The seconds at which it is told in the stream, of an error that is met each second.
    fn told(passes: bool, node_is_away: bool) -> Vec<u32> {
        let (mut lasting, began) = (Lasting::new(), Instant::now());
        let tells = |second: &u32| lasting.meet(began + *second * SECOND, passes, node_is_away).1;
        (0..130).filter(tells).collect()
    }

    #[test]
    fn what_lasts_is_told_once_and_again_each_minute() {
        assert_eq!(told(false, false), [1, 61, 121]);
        assert_eq!(told(true, false), [5, 65, 125]);
        assert!(told(true, true).is_empty());
    }

    #[test]
    fn pauses_grow_until_all_is_well() {
        let mut lasting = Lasting::new();
        let pauses: Vec<u128> = (0..8).map(|_| lasting.pause().as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        lasting.end();
        assert_eq!(lasting.pause(), BACKOFF.0);
    }
}
