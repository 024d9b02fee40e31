//! The main process of a server, from its start to its readiness.

use std::ffi::OsString;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::TcpStream;

use super::account::{self, Account, Exit};
use super::binaries::Binaries;
use super::failed;
use super::folder::Folder;
use crate::{Error, ErrorKind, Result};

const READY_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(10);
const LAST_LINES: usize = 20;

/// A postmaster that we started.
#[derive(Debug, Clone)]
pub(super) struct Postmaster {
    pub(super) pid: u32,
    pub(super) exit: Exit,
    /// How long the log was before.
    log_start: u64,
}

impl Postmaster {
    pub(super) fn spawn(
        folder: &Folder,
        binaries: &Binaries,
        account: Account,
        variables: &[(OsString, OsString)],
    ) -> Result<Self> {
        let log_start = folder.log.len();
        let mut command = account.command(binaries.program("postgres"));
        command.arg("-D").arg(folder.data());
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.stdout(folder.log.stdio()?).stderr(folder.log.stdio()?);
        let started = account::spawn(command, false).and_then(|child| {
            let pid = child.id().ok_or_else(|| io::Error::other("the process has no id"))?;
            Ok(Self { pid, exit: Exit::of(child), log_start })
        });
        started.map_err(failed("start the embedded server"))
    }

    /// Waits until the server takes connections. If dropped, the server goes on starting.
    pub(super) async fn ready(&self, folder: &Folder, port: u16) -> Result<(), Failure> {
        let data = folder.data();
        let (kind, what) = tokio::select! {
            biased;
            status = self.exit.clone().wait() => {
                let status = status.map_or_else(|| "an unknown status".into(), |s| s.to_string());
                (ErrorKind::Unavailable, format!("it ended with {status}"))
            }
            looked = tokio::time::timeout(READY_WITHIN, self.looked_ready(&data, port)) => {
                match looked {
                    Ok(()) => return Ok(()),
                    Err(_) => (ErrorKind::Timeout, format!("not ready after {READY_WITHIN:?}")),
                }
            }
        };
        Err(Failure::new(kind, &what, folder.log.text(self.log_start)))
    }

    async fn looked_ready(&self, data: &Path, port: u16) {
        loop {
            // The file may still be that of a server before this one.
            let lock = LockFile::read(data).await.filter(|lock| lock.pid == self.pid);
            if lock.is_some_and(|lock| lock.ready)
                && TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Why a server did not get ready.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    log: String,
}

impl Failure {
    fn new(kind: ErrorKind, what: &str, log: String) -> Self {
        let lines: Vec<_> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        let cause = io::Error::other(format!("{what}; the last lines of its log:\n{last}"));
        let error = Error::with_source(kind, "start the embedded server", cause);
        Self { error, log }
    }

    /// Somebody else listens on the port.
    pub(super) fn port_is_taken(&self) -> bool {
        self.log.contains("could not bind")
    }

    /// Processes of a server that crashed have not all ended yet.
    pub(super) fn is_still_used(&self) -> bool {
        self.log.contains("is still in use")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, log: String::new() }
    }
}

/// What `postmaster.pid` says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LockFile {
    pub(super) pid: u32,
    pub(super) ready: bool,
}

impl LockFile {
    pub(super) async fn read(data: &Path) -> Option<Self> {
        let text = tokio::fs::read_to_string(Self::path(data)).await.ok()?;
        Self::parse(&text)
    }

    pub(super) fn read_now(data: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(Self::path(data)).ok()?)
    }

    /// Whether the process is a server in that folder, or can't be told to be none: a file that a
    /// crash left behind may name a process that has nothing to do with it. Only Linux can tell.
    pub(super) fn is_of_a_server_in(&self, data: &Path) -> bool {
        let identity = |path: &Path| path.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        if identity(Path::new("/proc/self/cwd")).is_none() {
            return true;
        }
        let cwd = identity(Path::new(&format!("/proc/{}/cwd", self.pid)));
        cwd.is_some() && cwd == identity(data)
    }

    fn path(data: &Path) -> PathBuf {
        data.join("postmaster.pid")
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

    #[test]
    fn a_failure_has_the_last_lines_of_the_log() {
        let log = (1..=30).map(|n| format!("line {n}")).collect::<Vec<_>>().join("\n");
        let what = "it ended with exit status: 1";
        let chain = Failure::new(ErrorKind::Unavailable, what, log).error.chain();
        assert!(chain.starts_with("start the embedded server: it ended with exit status: 1; "));
        assert!(chain.contains("\nline 11\n") && chain.ends_with("\nline 30"), "{chain}");
        assert!(!chain.contains("\nline 10\n"), "{chain}");
    }
}
