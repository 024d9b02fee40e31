//! Members that are processes, so that somebody can kill, suspend and restart them: the side of the
//! process that starts them. Theirs is [`member`](super::member).
//!
//! ```text
//! start ─ note its pid ─ record its lines until it ends ─┬─ the group leaves: done
//!   ^                                                    │
//!   └────────────── as another member ───────────────────┘ it was killed, or left by a signal
//! ```

use std::collections::BTreeMap;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shardmq::verify::Recorder;
use shardmq::{Error, ErrorKind};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Run;
use super::consuming::SHUTDOWN;
use super::seen::Seen;
use crate::failure::{Failure, UNFINISHED};
use crate::output::note;

/// Before a process that failed by itself is followed by another, which would fail too.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a member that is to leave may take before it is killed: it may be suspended.
const PATIENCE: Duration = SHUTDOWN.saturating_mul(2);

/// All members of the group. To drop it kills them.
pub(super) struct Processes {
    places: JoinSet<Result<(), Failure>>,
    leaving: CancellationToken,
    pids: Pids,
}

/// The processes that are members now, by their places.
#[derive(Clone, Default)]
pub(super) struct Pids(Arc<Mutex<BTreeMap<usize, u32>>>);

impl Pids {
    /// Sends a signal, by its name, to the member of a place. `Unavailable` where there is none just now.
    pub(super) async fn signal(&self, place: usize, name: &str) -> shardmq::Result<()> {
        // Locked until the signal is sent: as long as a process is in it, its pid is nobody else's.
        let pids = self.0.lock().await;
        let error = |what: String| Error::new(ErrorKind::Unavailable, what);
        let pid = pids.get(&place).ok_or_else(|| error(format!("no member at place {place}")))?;
        let mut kill = Command::new("kill");
        let sent = kill.args([format!("-{name}"), pid.to_string()]).status().await;
        match sent {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(error(format!("kill -{name} {pid}: {status}"))),
            Err(cause) => Err(error(format!("kill -{name} {pid}: {cause}"))),
        }
    }
}

impl Processes {
    pub(super) fn start(run: &Arc<Run>, count: u16) -> Self {
        let next = Arc::new(AtomicU32::new(1));
        let (leaving, pids) = (CancellationToken::new(), Pids::default());
        let place = |number| Place {
            number,
            run: Arc::clone(run),
            next: Arc::clone(&next),
            leaving: leaving.clone(),
            pids: pids.clone(),
        };
        let places = (0..usize::from(count)).map(|number| place(number).keep()).collect();
        Self { places, leaving, pids }
    }

    /// The processes as they come and go.
    pub(super) fn pids(&self) -> Pids {
        self.pids.clone()
    }

    pub(super) async fn leave(mut self) -> Result<(), Failure> {
        self.leaving.cancel();
        while let Some(ended) = self.places.join_next().await {
            ended.map_err(|e| Failure::new(UNFINISHED, format!("a consumer: {e}")))??;
        }
        Ok(())
    }
}

/// A place in the group, where one member follows another.
struct Place {
    number: usize,
    run: Arc<Run>,
    /// The number of the next member, of all places.
    next: Arc<AtomicU32>,
    leaving: CancellationToken,
    pids: Pids,
}

impl Place {
    /// Keeps a member there until the group leaves.
    async fn keep(self) -> Result<(), Failure> {
        while !self.leaving.is_cancelled() {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let child = start_process(&self.run)?;
            if let Some(pid) = child.id() {
                self.pids.0.lock().await.insert(self.number, pid);
                note(&format!("- member {number}: process {pid}"));
            }
            let status = self.follow(number, child).await?;
            // Neither by a signal nor because of one.
            if status.code().is_some_and(|code| code != 0) {
                let _ = timeout(AGAIN, self.leaving.cancelled()).await;
            }
        }
        Ok(())
    }

    /// Records what it sees until it ends.
    async fn follow(&self, number: u32, mut child: Child) -> Result<ExitStatus, Failure> {
        let missing = || Failure::new(UNFINISHED, "a consumer has no pipe");
        let mut stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let recorder = self.run.history.recorder()?;
        let reading = read_lines(stdout, number, recorder, || self.run.note_delivered());
        tokio::pin!(reading);
        tokio::select! {
            read = &mut reading => read?,
            () = self.leaving.cancelled() => {
                // It may have ended already.
                let _ = stdin.write_all(b"\n").await;
                if let Ok(read) = timeout(PATIENCE, &mut reading).await {
                    read?;
                } else {
                    child.start_kill()?;
                    reading.await?;
                }
            }
        }
        self.pids.0.lock().await.remove(&self.number);
        Ok(child.wait().await?)
    }
}

fn start_process(run: &Run) -> Result<Child, Failure> {
    let child = Command::new(std::env::current_exe()?)
        .args(["verify-member", "--topic", &run.topic, "--zero"])
        .arg(run.clock.zero().to_string())
        .env("SHARDMQ_URL", &run.url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        // Ctrl-C in a terminal is for the workload, which then tells its members to leave.
        .process_group(0)
        .spawn()?;
    Ok(child)
}

/// Records what a process writes, until it is dead and its pipe is empty.
async fn read_lines(
    stdout: impl AsyncRead + Unpin,
    member: u32,
    mut recorder: Recorder,
    delivered: impl Fn(),
) -> Result<(), Failure> {
    let (mut stdout, mut line) = (BufReader::new(stdout), Vec::new());
    loop {
        line.clear();
        stdout.read_until(b'\n', &mut line).await?;
        if !line.ends_with(b"\n") {
            // The end. It was killed in the middle of a line, if there is one, and so has not
            // acknowledged what that says.
            return Ok(recorder.close()?);
        }
        let seen: Seen = serde_json::from_slice(&line).map_err(|error| {
            Failure::new(UNFINISHED, format!("member {member} wrote what is no event: {error}"))
        })?;
        if seen.is_delivery() {
            delivered();
        }
        seen.record(member, &mut recorder)?;
    }
}

#[cfg(test)]
mod tests {
    use shardmq::verify::{CheckOptions, History, check};

    use super::*;

    const LINE: &str = r#"{"taken":{"at":{"secs":1,"nanos":0},"token":1,"id":"1010126112200000001","uid":"0191e0a8-5d1c-7000-8000-000000000001:1:0","value":1}}"#;

    async fn delivered(lines: &str) -> Result<u64, Failure> {
        let history = History::new(&std::env::temp_dir())?;
        read_lines(lines.as_bytes(), 1, history.recorder()?, || ()).await?;
        Ok(check(&history, &CheckOptions::default())?.delivered)
    }

    #[tokio::test]
    async fn a_line_without_its_end_is_none_and_other_damage_is_told() {
        let half = &LINE[..60];
        assert_eq!(delivered("").await.unwrap(), 0);
        assert_eq!(delivered(&format!("{LINE}\n{half}")).await.unwrap(), 1);
        assert_eq!(delivered(&format!("{LINE}\n{LINE}")).await.unwrap(), 1);
        assert!(delivered(&format!("{half}\n{LINE}\n")).await.is_err());
    }
}
