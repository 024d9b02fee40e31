//! Library and floor in turns, and what comes of it.

use std::future::Future;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::error::{Error, Result};

/// How long one side has its turn.
pub(super) const SLICE: Duration = Duration::from_secs(1);

/// What one side did in one slice.
pub(super) struct Tally {
    pub(super) messages: u64,
    pub(super) elapsed: Duration,
    pub(super) latency: Latency,
}

impl Tally {
    pub(super) fn per_s(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Times in microseconds, to three digits.
#[derive(Debug, Clone)]
pub(super) struct Latency(Histogram<u64>);

impl Latency {
    pub(super) fn new() -> Self {
        let made = Histogram::new_with_bounds(1, 600_000_000, 3);
        Self(made.unwrap_or_else(|_| unreachable!("these bounds are good")))
    }

    pub(super) fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    pub(super) fn add(&mut self, other: &Self) {
        // Both have the same bounds, so that nothing can be out of range.
        let _ = self.0.add(&other.0);
    }

    /// The time, in milliseconds, that this part of all is not above.
    pub(super) fn quantile(&self, part: f64) -> f64 {
        self.0.value_at_quantile(part) as f64 / 1e3
    }
}

/// Two sides that take turns.
pub(super) trait Contest {
    fn library(&mut self, slice: Duration) -> impl Future<Output = Result<Tally>>;
    fn floor(&mut self, slice: Duration) -> impl Future<Output = Result<Tally>>;

    /// How good the library was, measured by the floor: 1 is as good.
    fn ratio(library: &Tally, floor: &Tally) -> f64 {
        library.per_s() / floor.per_s().max(1e-9)
    }
}

/// What all slices came to.
pub(super) struct Outcome {
    /// The median of the slices, as the floor's.
    pub(super) per_s: f64,
    pub(super) floor_per_s: f64,
    /// One for each pair, in rising order.
    pub(super) ratios: Vec<f64>,
    pub(super) latency: Latency,
    pub(super) floor_latency: Latency,
}

/// How many pairs of slices fit into so many seconds.
pub(super) fn pairs_in(seconds: u64) -> usize {
    usize::try_from(seconds / 2).unwrap_or(usize::MAX).max(1)
}

/// Lets both warm up, then has them take turns. Who begins a pair changes from pair to pair, so that a
/// machine that gets slower or faster does no harm to one side alone.
pub(super) async fn alternate<C: Contest>(mut contest: C, pairs: usize) -> Result<Outcome> {
    contest.library(SLICE / 2).await?;
    contest.floor(SLICE / 2).await?;
    let mut all = Vec::with_capacity(pairs);
    for pair in 0..pairs {
        all.push(if pair % 2 == 0 {
            let library = contest.library(SLICE).await?;
            (library, contest.floor(SLICE).await?)
        } else {
            let floor = contest.floor(SLICE).await?;
            (contest.library(SLICE).await?, floor)
        });
    }
    Outcome::of::<C>(&all)
}

impl Outcome {
    pub(super) fn of<C: Contest>(pairs: &[(Tally, Tally)]) -> Result<Self> {
        if pairs.iter().any(|(library, floor)| library.messages == 0 || floor.messages == 0) {
            return Err(Error::invalid("a slice ended without a message: measure for longer"));
        }
        let sorted = |of: &dyn Fn(&(Tally, Tally)) -> f64| {
            let mut all: Vec<f64> = pairs.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (mut latency, mut floor_latency) = (Latency::new(), Latency::new());
        for (library, floor) in pairs {
            latency.add(&library.latency);
            floor_latency.add(&floor.latency);
        }
        Ok(Self {
            per_s: quantile(&sorted(&|(library, _)| library.per_s()), 0.5),
            floor_per_s: quantile(&sorted(&|(_, floor)| floor.per_s()), 0.5),
            ratios: sorted(&|(library, floor)| C::ratio(library, floor)),
            latency,
            floor_latency,
        })
    }
}

/// Between the two nearest where it falls between them. 0 of nothing.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a place in a list, which is not below 0"
)]
pub(super) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = part * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_the_nearest() {
        assert!((quantile(&[1.0, 2.0, 3.0, 10.0], 0.5) - 2.5).abs() < 1e-9);
        assert!((quantile(&[1.0, 2.0, 3.0], 0.25) - 1.5).abs() < 1e-9);
        assert!((quantile(&[4.0], 0.99) - 4.0).abs() < 1e-9);
        assert!(quantile(&[], 0.5).abs() < 1e-9);
    }

    #[test]
    fn an_even_number_of_seconds_is_half_as_many_pairs_and_never_none() {
        assert_eq!([1, 2, 5, 40].map(pairs_in), [1, 1, 2, 20]);
    }
}
