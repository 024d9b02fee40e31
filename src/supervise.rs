//! Tasks that must go on: one that panics is told, and started again after a pause that grows.
//!
//! ```text
//! start ─> runs ─ ends ─────────────────────> done
//!   ^        │ panics
//!   │        v
//!   └─ pause: 100 ms, doubled up to 30 s; from the start again after a minute without a panic
//! ```

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind};
use crate::metrics as names;

/// Pauses before a task is started again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// How long after a panic a task counts as well again.
const WELL: Duration = Duration::from_mins(1);

/// How long to wait before what has failed is started again. Pure.
#[derive(Debug)]
pub(crate) struct Pauses {
    next: Duration,
    last: Option<Instant>,
}

impl Pauses {
    pub(crate) fn new() -> Self {
        Self { next: PAUSE.0, last: None }
    }

    /// It has failed: returns the pause.
    pub(crate) fn failed(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now - last > WELL + self.next) {
            self.next = PAUSE.0;
        }
        self.last = Some(now);
        let pause = self.next;
        self.next = (self.next * 2).min(PAUSE.1);
        pause
    }
}

/// Runs to the end, or to a panic, which is logged with an alert and counted.
pub(crate) async fn caught<T>(
    task: &'static str,
    run: impl Future<Output = T>,
) -> Result<T, Error> {
    let outcome = AssertUnwindSafe(run).catch_unwind().await;
    outcome.map_err(|panic| told(task, &*panic))
}

/// Runs what `start` makes, and starts it again each time that it panics, after `failed` was told of it.
/// `None`: it panicked after `stop`. During a pause `stop` has it start at once, so that it may end properly.
pub(crate) async fn supervised<F: Future>(
    task: &'static str,
    stop: CancellationToken,
    mut start: impl FnMut() -> F,
    mut failed: impl FnMut(&Error),
) -> Option<F::Output> {
    let mut pauses = Pauses::new();
    loop {
        // Boxed to keep the caller's future small.
        let error = match caught(task, Box::pin(start())).await {
            Ok(output) => return Some(output),
            Err(error) => error,
        };
        failed(&error);
        if stop.is_cancelled() {
            return None;
        }
        tokio::select! {
            () = sleep(pauses.failed(Instant::now())) => {}
            () = stop.cancelled() => {}
        }
    }
}

fn told(task: &'static str, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied();
    let why = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let why = why.unwrap_or("it says no more");
    ::metrics::counter!(names::TASK_FAILED, "task" => task).increment(1);
    tracing::error!(alert = "task", task, panic = why, "a task of the library panicked");
    Error::new(ErrorKind::Unavailable, format!("the {task} of this process panicked: {why}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_up_to_half_a_minute_and_begin_anew_after_a_while() {
        let (mut pauses, began) = (Pauses::new(), Instant::now());
        let doubled: Vec<u128> = (0..11).map(|_| pauses.failed(began).as_millis()).collect();
        assert_eq!(doubled[..4], [100, 200, 400, 800]);
        assert_eq!(doubled[8..], [25_600, 30_000, 30_000]);
        assert_eq!(pauses.failed(began + 60 * SECOND), 30 * SECOND);
        assert_eq!(pauses.failed(began + 300 * SECOND), PAUSE.0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_panics_is_started_again_until_it_ends() {
        let (runs, told) = (AtomicU32::new(0), AtomicU32::new(0));
        let run = || async {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            assert!(run == 3, "run {run}");
            run
        };
        let failed = |error: &Error| {
            let run = told.fetch_add(1, Ordering::Relaxed);
            assert_eq!(
                error.to_string(),
                format!("the tester of this process panicked: run {run}")
            );
        };
        let outcome = supervised("tester", CancellationToken::new(), run, failed).await;
        assert_eq!((outcome, told.into_inner()), (Some(3), 3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_the_pause_and_the_restarts() {
        let (stop, runs) = (CancellationToken::new(), AtomicU32::new(0));
        let run = || {
            if runs.fetch_add(1, Ordering::Relaxed) == 8 {
                stop.cancel();
            }
            async { panic!("always") }
        };
        let outcome: Option<()> = supervised("tester", stop.clone(), run, |_| {}).await;
        assert_eq!((outcome, runs.into_inner()), (None, 9));
    }
}
