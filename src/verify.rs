//! Checks a workload: everything that producers and consumers saw is recorded in a [`History`], and
//! [`check`] compares it with what is stored in the end.
//!
//! ```text
//! producers   Sending .. Acknowledged | Refused | Unknown  ---+
//! consumers   Owned, Delivered, Acked, CursorCommitted, Lost -+--> History --> check --> Report
//! final read  Stored, all of it, by fresh clients          ---+
//! ```
//!
//! A workload
//! 1. gives each worker a [`Recorder`], and all of them one monotonic clock;
//! 2. sends [`Value`]s, each once and in a [`Payload`] that shows damage;
//! 3. records every [`Event`] as said there, above all whether before or after the call;
//! 4. lets the groups finish and records that they are [drained](Event::Drained);
//! 5. reads every partition from its beginning with fresh clients ([`Event::Stored`]);
//! 6. closes the recorders and calls [`check`].
//!
//! What is looked for is said at the counters of [`Report`]; those that break a promise are added up in
//! [`violations`](Report::violations). What went with the end of a server's log, as after the promotion of an
//! asynchronous standby, is [told apart](Report::lost_tails) where that was announced or noticed. The
//! check knows what a queue may do: repeat deliveries after a takeover, store a message whose send ended in
//! doubt, store a marked message twice. It takes no side where the order of two calls can't be known because
//! they overlap.
//!
//! It is no check where messages were dropped by retention before the final read, or where the group
//! began before the history did.
//!
//! Neither recording nor checking takes memory by the number of messages: histories are files, and what
//! has to be brought together is sorted on disk. State is kept for each partition, group, holding and
//! recorder, for gaps in what a group acknowledged, for holes beside what a server lost, and for sends that
//! are under way at a time.
//!
//! ```
//! use std::time::Duration;
//! use shardmq::verify::{CheckOptions, Event, History, Value, check};
//! # use shardmq::Uid;
//!
//! let history = History::new(&std::env::temp_dir())?;
//! let mut recorder = history.recorder()?;
//! let value = Value::new(1, 1)?;
//! let id = "1010126112200000001".parse()?;
//! recorder.record(Duration::from_millis(1), &Event::Sending { value, lane: None })?;
//! recorder.record(Duration::from_millis(2), &Event::Acknowledged { value, id })?;
//! recorder.close()?;
//!
//! let report = check(&history, &CheckOptions::default())?;
//! assert_eq!((report.acknowledged, report.lost), (1, 1));
//! println!("{}", report.anomalies[0].text);
//! # Ok::<(), shardmq::Error>(())
//! ```

use std::io;

use crate::error::{Error, ErrorKind, Result};

mod event;
mod faults;
mod findings;
mod history;
mod holding;
mod ids;
mod lanes;
mod losses;
mod moved;
mod overtaken;
mod payload;
mod ranges;
mod reading;
mod record;
mod report;
mod run;
mod sort;
mod stall;
mod step;
mod survey;
mod tails;
mod timeline;
mod values;

#[cfg(test)]
mod test_big;
#[cfg(test)]
mod test_good;
#[cfg(test)]
mod test_groups;
#[cfg(test)]
mod test_kit;
#[cfg(test)]
mod test_log;
#[cfg(test)]
mod test_members;
#[cfg(test)]
mod test_model;
#[cfg(test)]
mod test_mutations;
#[cfg(test)]
mod test_seeks;
#[cfg(test)]
mod test_tails;
#[cfg(test)]
mod test_victim;

pub use event::{Event, Holding, Value};
pub use faults::{Fault, FaultKind, FaultKinds, FaultOptions, FaultPlan};
pub use history::{History, Recorder};
pub use payload::Payload;
pub use report::{Anomaly, AnomalyKind, LostTail, Report, Work};

use findings::Findings;
use sort::Workspace;
use survey::Survey;

/// The least memory for sort buffers.
const LEAST_MEMORY: usize = 256 << 10;

/// How to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckOptions {
    /// Bytes for sort buffers, 256 KiB at least (less is taken as that); 64 MiB by default.
    pub memory_bytes: usize,
    /// How many examples of each kind of anomaly the report holds; 10 by default.
    pub examples: u32,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { memory_bytes: 64 << 20, examples: 10 }
    }
}

/// The key of a message as a lane: messages of one key claim the order in which one writer sent them.
pub fn lane_of(key: &str) -> u64 {
    key.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Checks a history whose recorders are all closed.
///
/// Blocks, for about a microsecond an event. Needs up to four times the size of the history on the disk
/// where the history is, and gives it back.
///
/// # Errors
/// [`ErrorKind::Conflict`] while a recorder is open, [`ErrorKind::Decode`] where a file is not one of a
/// history, [`ErrorKind::Unavailable`] where the disk fails.
pub fn check(history: &History, options: &CheckOptions) -> Result<Report> {
    let memory = options.memory_bytes.max(LEAST_MEMORY);
    let space = Workspace::new(history.folder(), memory);
    let mut findings = Findings::new(options.examples.into());
    let survey = Survey::of(history, &space, &mut findings)?;
    let moved = values::check(history, &survey, &space, &mut findings)?;
    let steps = ids::check(history, &survey, &moved, &space, &mut findings)?;
    timeline::check(steps, &survey, &mut findings)?;
    let mut report = findings.finish();
    let gauge = space.gauge();
    report.work.peak_buffer_bytes = gauge.peak.get();
    report.work.spilled_bytes = gauge.spilled.get();
    report.work.spilled_runs = gauge.runs.get();
    Ok(report)
}

/// For `map_err`: the disk failed while doing what the words say.
fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |cause| Error::with_source(ErrorKind::Unavailable, doing, cause)
}

fn damaged() -> Error {
    Error::new(ErrorKind::Decode, "sort the history: a row is damaged")
}

/// Words as they are on disk.
fn bytes_of<const N: usize>(words: &[u64; N]) -> [[u8; 8]; N] {
    words.map(u64::to_le_bytes)
}

fn words_of<const N: usize>(bytes: &[[u8; 8]; N]) -> [u64; N] {
    bytes.map(u64::from_le_bytes)
}
