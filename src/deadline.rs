//! Limits to how long something may take.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::{Error, ErrorKind, Result};

/// Something that a server answers, within a time. Dropped when that is over. Boxed: whoever waits carries
/// it.
pub(crate) fn in_time<T>(
    limit: Duration,
    what: &str,
    doing: impl Future<Output = Result<T>>,
) -> impl Future<Output = Result<T>> {
    let doing = Box::pin(doing);
    async move {
        timeout(limit, doing).await.unwrap_or_else(|_| {
            let limit = limit.as_secs_f64();
            Err(Error::new(ErrorKind::Unavailable, format!("{what}: no answer within {limit} s")))
        })
    }
}

/// So long after an instant. One that no clock reaches is 30 years away, as for tokio.
pub(crate) fn after(start: Instant, duration: Duration) -> Instant {
    const FAR: Duration = Duration::from_hours(24 * 365 * 30);
    start.checked_add(duration).unwrap_or_else(|| start + FAR)
}

/// How long something may take that takes so long without any bytes to carry, with these.
pub(crate) fn with_bytes(limit: Duration, bytes: i32) -> Duration {
    limit.saturating_add(on_a_slow_line(bytes))
}

/// What a slow line takes for so many bytes: a second for each MiB.
pub(crate) fn on_a_slow_line(bytes: i32) -> Duration {
    Duration::from_secs(1).mul_f64(f64::from(bytes.max(0)) / f64::from(1 << 20))
}

/// A duration give or take a fifth, so that many don't act at once.
pub(crate) fn jitter(duration: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 401;
    duration.saturating_mul(u32::try_from(800 + random).unwrap_or(1000)) / 1000
}

/// A duration between none and this one: where many saw the same failure at once, they do not try again
/// together.
pub(crate) fn spread(duration: Duration) -> Duration {
    let random = u32::try_from(uuid::Uuid::new_v4().as_u128() % 1001).unwrap_or(1000);
    duration / 1000 * random
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_duration_is_too_long() {
        let now = Instant::now();
        assert_eq!(after(now, Duration::from_secs(7)), now + Duration::from_secs(7));
        assert_eq!(after(now, Duration::ZERO), now);
        assert!(after(now, Duration::MAX) > now + Duration::from_hours(24 * 365 * 29));
        assert_eq!(with_bytes(Duration::MAX, i32::MAX), Duration::MAX);
        assert_eq!(with_bytes(Duration::from_secs(2), 3 << 20), Duration::from_secs(5));
        assert!(jitter(Duration::MAX) > Duration::from_hours(24 * 365));
        assert!(spread(Duration::MAX) <= Duration::MAX && spread(Duration::ZERO).is_zero());
    }

    #[test]
    fn tries_are_spread_over_the_whole_time() {
        let second = Duration::from_secs(1);
        let all: Vec<_> = (0..400).map(|_| spread(second)).collect();
        assert!(all.iter().all(|duration| *duration <= second));
        for quarter in 0..4 {
            let (from, to) = (second / 4 * quarter, second / 4 * (quarter + 1));
            assert!(all.iter().filter(|it| (from..=to).contains(*it)).count() > 50);
        }
    }
}
