//! Postgres as one kind of server: how it is started, looked after and stopped.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use super::account::{self, Account};
use super::binaries::Binaries;
use super::folder::Folder;
use super::life::{Kind, LOOK_EVERY, Life, StopMode};
use super::password::Password;
use super::process::Process;
use super::watchdog::Trace;
use crate::Result;

const STOP_WITHIN: Duration = Duration::from_mins(1);
/// Between the start of a server and its lock file.
const LOCKED_WITHIN: Duration = Duration::from_secs(5);
const LOCK_FILE: &str = "postmaster.pid";

/// The programs, and the variables for their environment.
#[derive(Debug)]
pub(super) struct Postgres {
    pub(super) binaries: Binaries,
    pub(super) variables: Vec<(OsString, OsString)>,
    /// That of the superuser; none where a file of the user's says who gets in, or everybody does.
    pub(super) password: Option<Password>,
}

impl Kind for Postgres {
    const CONFIG: &'static str = "postgresql.conf";

    fn trace(&self) -> Trace<'_> {
        // That is an immediate shutdown.
        Trace { pid_file: LOCK_FILE, name: "postgres", signal: "QUIT" }
    }

    fn port_lines(&self, port: u16) -> String {
        format!("port = {port}\n")
    }

    fn command(&self, folder: &Folder, account: Account) -> Command {
        let mut command = account.command(self.binaries.program("postgres"));
        command.arg("-D").arg(folder.data());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    async fn is_ready(&self, process: &Process, folder: &Folder, port: u16) -> bool {
        // The file may still be that of a server before this one.
        let lock = LockFile::read(&folder.data()).await.filter(|lock| lock.pid == process.pid);
        lock.is_some_and(|lock| lock.ready)
            && TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok()
    }

    async fn halt(life: &Life<Self>, mode: StopMode) -> Result<()> {
        if !is_up(life).await {
            return Ok(());
        }
        let mode = match mode {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        };
        let mut command = life.account.command(life.kind.binaries.program("pg_ctl"));
        command.arg("-D").arg(life.folder.data()).args(["stop", "-m", mode, "-t"]);
        command.arg(STOP_WITHIN.as_secs().to_string());
        let stopped = account::run(command, "", "stop the embedded server").await;
        // It may have ended by itself meanwhile.
        if stopped.is_err() && is_up(life).await {
            return stopped.map(drop);
        }
        if let Some(own) = life.current() {
            own.exit.wait().await;
        }
        Ok(())
    }
}

/// The id of the process that runs in the folder, whoever started it.
pub(super) fn pid(life: &Life<Postgres>) -> Option<u32> {
    let data = life.folder.data();
    let lock = LockFile::read_now(&data)?;
    let ended = life.current().is_some_and(|own| own.pid == lock.pid && own.exit.is_over());
    (!ended && lock.is_of_a_server_in(&data)).then_some(lock.pid)
}

/// Whether there is something to stop. A server of ours that has no lock file has either not written
/// it yet, or is about to end.
async fn is_up(life: &Life<Postgres>) -> bool {
    let deadline = Instant::now() + LOCKED_WITHIN;
    loop {
        let lives = life.running().is_some();
        if pid(life).is_some() {
            return true;
        }
        if !lives || Instant::now() >= deadline {
            return lives;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What `postmaster.pid` says.
#[derive(Debug, PartialEq, Eq)]
struct LockFile {
    pid: u32,
    ready: bool,
}

impl LockFile {
    async fn read(data: &Path) -> Option<Self> {
        let text = tokio::fs::read_to_string(Self::path(data)).await.ok()?;
        Self::parse(&text)
    }

    fn read_now(data: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(Self::path(data)).ok()?)
    }

    /// Whether the process is a server in that folder, or can't be told to be none: a file that a
    /// crash left behind may name a process that has nothing to do with it. Only Linux can tell.
    fn is_of_a_server_in(&self, data: &Path) -> bool {
        let identity = |path: &Path| path.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        if identity(Path::new("/proc/self/cwd")).is_none() {
            return true;
        }
        let cwd = identity(Path::new(&format!("/proc/{}/cwd", self.pid)));
        cwd.is_some() && cwd == identity(data)
    }

    fn path(data: &Path) -> PathBuf {
        data.join(LOCK_FILE)
    }

    /// The first line is the pid, the eighth the status.
    fn parse(text: &str) -> Option<Self> {
        let pid = text.lines().next()?.trim().parse().ok()?;
        let ready = text.lines().nth(7).is_some_and(|status| status.starts_with("ready"));
        Some(Self { pid, ready })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_is_ready_when_its_eighth_line_says_so() {
        let text = "4711\n/data\n1700000000\n24321\n/run\n127.0.0.1\n  123 4\n";
        let of = |status: &str| LockFile::parse(&format!("{text}{status}\n"));
        assert_eq!(of("ready   "), Some(LockFile { pid: 4711, ready: true }));
        assert_eq!(of("starting"), Some(LockFile { pid: 4711, ready: false }));
        assert_eq!(LockFile::parse("4711\n"), Some(LockFile { pid: 4711, ready: false }));
        assert_eq!(LockFile::parse(""), None);
    }
}
