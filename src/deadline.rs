//! Limits to how long something may take.

use std::time::Duration;

use tokio::time::timeout;

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

/// What a slow line takes for so many bytes: a second for each MiB.
pub(crate) fn on_a_slow_line(bytes: i32) -> Duration {
    Duration::from_secs(1).mul_f64(f64::from(bytes.max(0)) / f64::from(1 << 20))
}

/// A duration give or take a fifth, so that many don't act at once.
pub(crate) fn jitter(duration: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 401;
    duration * u32::try_from(800 + random).unwrap_or(1000) / 1000
}
