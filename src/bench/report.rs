//! What came out, as people and programs read it.

use serde::Serialize;

use crate::bench::machine::{Flush, Machine, resident_bytes};
use crate::bench::slices::{Latency, Outcome, quantile};
use crate::bench::stage::Stage;
use crate::bench::{Bench, Options};

/// The figures of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was measured.
    pub bench: Bench,
    /// Messages a second through the library: the median of its slices.
    pub per_s: f64,
    /// Messages a second through the bare loop.
    pub floor_per_s: f64,
    /// The library by the floor, 1 being as good: the median over the pairs of slices. Of rates; for
    /// [`Bench::Latency`] of median times, the floor's by the library's.
    pub ratio: f64,
    /// How far apart the pairs were.
    pub ratio_spread: Spread,
    /// For [`Bench::Consume`] with several members: all of them by one alone, of rates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_one_member: Option<Spread>,
    /// Payload through the library, in millions of bytes a second.
    pub mb_per_s: f64,
    /// For [`Bench::Produce`] until a `send` or `send_all` was answered; for [`Bench::Latency`] from due
    /// to received; else until the next 1,000 messages were there.
    pub latency_ms: Percentiles,
    /// The same for the bare loop: until a batch, or the message, was on disk; or until the next 1,000
    /// messages were there.
    pub floor_latency_ms: Percentiles,
    /// How long the disk takes.
    #[serde(flatten)]
    pub flush: Flush,
    /// For [`Bench::Backlog`]: the small one and the large one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backlogs: Vec<Drained>,
    /// How long it took to make the topic, in seconds.
    pub topic_s: f64,
    /// The memory of this process at the end.
    pub rss_mib: f64,
    /// What was asked for.
    pub options: Options,
    /// Where it was measured.
    pub machine: Machine,
}

/// The ratios of the pairs of slices.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// How many there were.
    pub pairs: usize,
    /// The worst.
    pub min: f64,
    /// A quarter were not above this.
    pub q1: f64,
    /// Half were not above this.
    pub median: f64,
    /// Three quarters were not above this.
    pub q3: f64,
    /// The best.
    pub max: f64,
}

/// Times in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Percentiles {
    /// Half were not above this.
    pub p50: f64,
    /// 99 of 100 were not above this.
    pub p99: f64,
    /// 999 of 1,000 were not above this.
    pub p999: f64,
}

/// How one backlog was consumed.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Drained {
    /// How many messages it had.
    pub messages: u64,
    /// How many were consumed in a second.
    pub per_s: f64,
    /// Through the bare loop.
    pub floor_per_s: f64,
    /// The library by the floor.
    pub ratio: f64,
    /// The memory of this process before.
    pub rss_before_mib: f64,
    /// The most that it was meanwhile.
    pub peak_rss_mib: f64,
}

impl Report {
    pub(super) fn new(
        bench: Bench,
        stage: &Stage,
        outcome: &Outcome,
        backlogs: Vec<Drained>,
        flush: Flush,
        machine: Machine,
    ) -> Self {
        let ratio_spread = Spread::of(outcome);
        let options = &stage.options;
        Self {
            bench,
            per_s: rounded(outcome.per_s, 0),
            floor_per_s: rounded(outcome.floor_per_s, 0),
            ratio: ratio_spread.median,
            ratio_spread,
            to_one_member: None,
            mb_per_s: rounded(outcome.per_s * options.size as f64 / 1e6, 2),
            latency_ms: Percentiles::of(&outcome.latency),
            floor_latency_ms: Percentiles::of(&outcome.floor_latency),
            flush: Flush { flush_ms: rounded(flush.flush_ms, 3), ..flush },
            backlogs,
            topic_s: rounded(stage.topic_s, 2),
            rss_mib: mib(resident_bytes()),
            options: options.clone(),
            machine,
        }
    }
}

impl Report {
    pub(super) fn with_members(self, to_one: Option<&Outcome>) -> Self {
        Self { to_one_member: to_one.map(Spread::of), ..self }
    }
}

impl Spread {
    fn of(outcome: &Outcome) -> Self {
        let ratio = |part| rounded(quantile(&outcome.ratios, part), 3);
        Self {
            pairs: outcome.ratios.len(),
            min: ratio(0.0),
            q1: ratio(0.25),
            median: ratio(0.5),
            q3: ratio(0.75),
            max: ratio(1.0),
        }
    }
}

impl Percentiles {
    fn of(latency: &Latency) -> Self {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|part| rounded(latency.quantile(part), 3));
        Self { p50, p99, p999 }
    }
}

impl Drained {
    pub(super) fn new(messages: u64, outcome: &Outcome, before: u64, peak: u64) -> Self {
        Self {
            messages,
            per_s: rounded(outcome.per_s, 0),
            floor_per_s: rounded(outcome.floor_per_s, 0),
            ratio: rounded(quantile(&outcome.ratios, 0.5), 3),
            rss_before_mib: mib(before),
            peak_rss_mib: mib(peak),
        }
    }
}

/// Bytes in MiB.
fn mib(bytes: u64) -> f64 {
    rounded(bytes as f64 / f64::from(1 << 20), 1)
}

/// To so many decimals.
fn rounded(value: f64, decimals: i32) -> f64 {
    let unit = 10_f64.powi(decimals);
    (value * unit).round() / unit
}
