//! What it was measured on: figures without it say nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::bench::floor::Bare;
use crate::bench::payloads::arrays;
use crate::bench::stage::Stage;
use crate::error::{Error, ErrorKind, Result};

/// How often a flush is timed.
const FLUSHES: usize = 100;

/// The machine that ran the library.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// What the processor calls itself.
    pub cpu: String,
    /// Threads that can run at once.
    pub cpus: usize,
    /// Memory in all.
    pub memory_mib: u64,
    /// Threads that ran or waited to, on average over the minute before.
    pub load_1m: f64,
}

impl Machine {
    /// This one, now. What can't be found out is empty or 0.
    pub(super) fn look() -> Self {
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
        Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib(&memory) / 1024,
            load_1m: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// How long the database's disk takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Flush {
    /// The median of 100.
    pub flush_ms: f64,
    /// What was timed.
    pub flush_is: &'static str,
}

/// Times a flush where the data is, or else a commit, which has one in it.
pub(super) async fn flush(stage: &Stage) -> Result<Flush> {
    let (flush_is, mut times) = match stage.options.data_dir.clone() {
        Some(folder) => {
            let timed = tokio::task::spawn_blocking(move || fdatasyncs(&folder)).await;
            let timed = timed.map_err(|_| Error::closed("the bench"))?;
            let what = "time a flush in the data's folder";
            let timed = timed.map_err(|e| Error::with_source(ErrorKind::Unavailable, what, e))?;
            ("fdatasync after a write of 8 kB", timed)
        }
        None => ("commit of an appended message", commits(stage).await?),
    };
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    Ok(Flush { flush_ms: median.as_secs_f64() * 1e3, flush_is })
}

/// Over a file that has its size already, as Postgres writes its log.
fn fdatasyncs(folder: &Path) -> io::Result<Vec<Duration>> {
    let path = folder.join(format!("shardmq-flush-{}", std::process::id()));
    let timed = File::create_new(&path).and_then(|file| {
        let page = [0x5A; 8192];
        file.write_all_at(&vec![0; page.len() * FLUSHES], 0)?;
        file.sync_all()?;
        let flush = |n: usize| {
            let begun = Instant::now();
            file.write_all_at(&page, (n * page.len()) as u64)?;
            file.sync_data()?;
            Ok(begun.elapsed())
        };
        (0..FLUSHES).map(flush).collect()
    });
    fs::remove_file(&path)?;
    timed
}

async fn commits(stage: &Stage) -> Result<Vec<Duration>> {
    let message = arrays(&[stage.payloads.nth(0)]);
    let mut times = Vec::with_capacity(FLUSHES);
    for bare in &mut Bare::each(&stage.producing, &stage.floor, 1).await? {
        for _ in 0..FLUSHES {
            let begun = Instant::now();
            bare.append(&message).await?;
            times.push(begun.elapsed());
        }
    }
    Ok(times)
}

/// The memory that this process has now, without what is swapped out. 0 where that is not to be seen.
pub(super) fn resident_bytes() -> u64 {
    kib(&field("/proc/self/status", "VmRSS").unwrap_or_default()) * 1024
}

/// The value of the first line `name: value` of a file.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = |line: &str| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim().to_owned())
    };
    text.lines().find_map(value)
}

/// The number in `123 kB`.
fn kib(value: &str) -> u64 {
    value.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushes_are_timed_and_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(fdatasyncs(folder.path()).unwrap().len(), FLUSHES);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn this_process_has_memory() {
        assert!(resident_bytes() > 1 << 20);
    }
}
