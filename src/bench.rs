//! Measures this library and, in the same run, the floor under it: the same statements in a bare loop.
//!
//! ```text
//! warm up │ library │ floor │ floor │ library │ library │ floor │ ..      slices of one second
//!         └────── pair ─────┴────── pair ─────┴────── pair ─────┘         ratio = median of the pairs
//! ```
//!
//! A shared machine's disk changes its speed fourfold within a minute, so that only neighbouring
//! slices can be compared. Everything happens on topics of its own, which are deleted at the end.

#![allow(clippy::cast_precision_loss, reason = "figures for people have fewer digits than an f64")]

mod backlog;
mod consume;
mod floor;
mod latency;
mod machine;
mod payloads;
mod produce;
mod report;
mod slices;
mod stage;

use std::future::Future;
use std::path::PathBuf;

use serde::Serialize;

pub use machine::{Flush, Machine};
pub use report::{Drained, Percentiles, Report, Spread};

use crate::error::{Error, Result};
use crate::notifier::NotifierKind;
use stage::Stage;

const MAX_SIZE: usize = 65_536;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bench {
    /// Sending, each message awaited until it is on disk. Floor: 4 connections, each appending prebuilt
    /// batches of 1,000 to a partition of its own, one commit each.
    Produce,
    /// Receiving and acknowledging a backlog. Floor: 4 connections, each fetching a partition of its
    /// own and touching the payloads, without a cursor.
    Consume,
    /// From when a message is due to when it was received, at a fixed rate. Floor: appends alone, on
    /// one connection.
    Latency,
    /// Consuming a small and a large backlog, and the memory that it takes. Floor as for `Consume`.
    Backlog,
}

/// How it is measured.
#[derive(Debug, Clone, Serialize)]
pub struct Options {
    /// Bytes of a payload, up to 65,536: the floor's batches have 1,000.
    pub size: usize,
    /// Partitions of the topic.
    pub partitions: usize,
    /// Messages for each `send_all`; none: each by a task of its own that awaits `send`.
    pub batch: Option<usize>,
    /// How long to measure, both sides together.
    pub seconds: u64,
    /// Messages a second, for [`Bench::Latency`].
    pub rate: u32,
    /// Messages of the backlog; none: chosen by the size of a payload and the time. For
    /// [`Bench::Backlog`] the small one, the large one being ten times that.
    pub messages: Option<u64>,
    /// How consumers hear of messages.
    pub notifier: NotifierKind,
    /// Where the Redis is; none: where the process or the cluster has it.
    #[serde(skip)]
    pub redis_url: Option<String>,
    /// Use so many of the cluster's nodes; none: all.
    pub nodes: Option<usize>,
    /// Consumers in the group.
    pub members: usize,
    /// Data connections to each node; none: the library's default.
    pub connections: Option<usize>,
    /// A folder on the disk of the database, to time a flush in; none: the flush is timed by a commit.
    #[serde(skip)]
    pub data_dir: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            size: 100,
            partitions: 4,
            batch: None,
            seconds: 40,
            rate: 1_000,
            messages: None,
            notifier: NotifierKind::default(),
            redis_url: None,
            nodes: None,
            members: 1,
            connections: None,
            data_dir: None,
        }
    }
}

impl Options {
    fn check(&self) -> Result<()> {
        let least = [
            ("size", self.size),
            ("partitions", self.partitions),
            ("batch", self.batch.unwrap_or(1)),
            ("seconds", usize::from(self.seconds > 0)),
            ("rate", self.rate as usize),
            ("messages", usize::from(self.messages != Some(0))),
            ("nodes", self.nodes.unwrap_or(1)),
            ("members", self.members),
        ];
        if self.size > MAX_SIZE {
            let what = format!("size must be at most {MAX_SIZE}");
            return Err(Error::invalid(what));
        }
        let zero = least.iter().find(|(_, value)| *value == 0);
        zero.map_or(Ok(()), |(name, _)| Err(Error::invalid(format!("{name} must be at least 1"))))
    }
}

/// Measures on the cluster of this control database, until it is done or `interrupted` is ready, which
/// gives no report. The topics are deleted in both cases; if dropped, they stay.
pub async fn run(
    bench: Bench,
    url: &str,
    options: Options,
    interrupted: impl Future<Output = ()>,
) -> Result<Option<Report>> {
    options.check()?;
    let stage = Stage::set(bench, url, options).await?;
    let outcome = tokio::select! {
        outcome = measure(bench, &stage) => outcome.map(Some),
        () = interrupted => Ok(None),
    };
    let cleared = stage.clear().await;
    outcome.and_then(|report| cleared.map(|()| report))
}

async fn measure(bench: Bench, stage: &Stage) -> Result<Report> {
    let machine = Machine::look();
    let flush = machine::flush(stage).await?;
    let mut to_one_member = None;
    let (outcome, backlogs) = match bench {
        Bench::Produce => (produce::measure(stage).await?, Vec::new()),
        Bench::Consume => {
            let (outcome, to_one) = consume::measure(stage).await?;
            to_one_member = to_one;
            (outcome, Vec::new())
        }
        Bench::Latency => (latency::measure(stage).await?, Vec::new()),
        Bench::Backlog => backlog::measure(stage).await?,
    };
    let report = Report::new(bench, stage, &outcome, backlogs, flush, machine);
    Ok(report.with_members(to_one_member.as_ref()))
}
