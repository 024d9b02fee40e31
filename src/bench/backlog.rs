//! A small and a large backlog: neither speed nor memory may depend on which.

use std::future::Future;
use std::time::Duration;

use crate::bench::consume::{Consume, drain, fill};
use crate::bench::machine::resident_bytes;
use crate::bench::report::Drained;
use crate::bench::slices::Outcome;
use crate::bench::stage::Stage;
use crate::error::Result;

/// Messages of the small backlog.
const SMALL: u64 = 200_000;
/// How many times larger the large one is.
const TIMES: u64 = 10;
/// How often the memory is looked at.
const SAMPLE: Duration = Duration::from_millis(10);

/// What it was for the large backlog, and a short account for both.
pub(super) async fn measure(stage: &Stage) -> Result<(Outcome, Vec<Drained>)> {
    let small = stage.options.messages.unwrap_or(SMALL);
    let time = Duration::from_secs(stage.options.seconds) / 2;
    let first = fill(stage, small).await?;
    let (_, of_small) = one(stage, first, time).await?;
    let more = fill(stage, small * (TIMES - 1)).await?;
    let (outcome, of_large) = one(stage, first + more, time).await?;
    Ok((outcome, vec![of_small, of_large]))
}

async fn one(stage: &Stage, backlog: u64, time: Duration) -> Result<(Outcome, Drained)> {
    let before = resident_bytes();
    let mut consume = Consume::new(stage, backlog).await?;
    let (outcome, peak) = with_peak(drain(&mut consume, time)).await;
    let outcome = outcome?;
    let drained = Drained::new(backlog, &outcome, before, peak);
    Ok((outcome, drained))
}

/// The most memory that this process had while something was done.
async fn with_peak<T>(work: impl Future<Output = T>) -> (T, u64) {
    let mut peak = resident_bytes();
    let mut ticks = tokio::time::interval(SAMPLE);
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            _ = ticks.tick() => peak = peak.max(resident_bytes()),
            done = &mut work => return (done, peak.max(resident_bytes())),
        }
    }
}
