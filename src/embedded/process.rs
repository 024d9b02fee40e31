//! The process of a server, from its start to its readiness.

use std::io;
use std::process::Command;
use std::time::Duration;

use super::account::{self, Exit};
use super::failed;
use super::folder::Log;
use crate::{Error, ErrorKind, Result};

const READY_WITHIN: Duration = Duration::from_secs(30);
const LAST_LINES: usize = 20;

/// A process that we started.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) exit: Exit,
    /// How long the log was before.
    log_start: u64,
}

impl Process {
    pub(super) fn spawn(mut command: Command, log: &Log) -> Result<Self> {
        let log_start = log.len();
        command.stdout(log.stdio()?).stderr(log.stdio()?);
        let started = account::spawn(command, false).and_then(|child| {
            let pid = child.id().ok_or_else(|| io::Error::other("the process has no id"))?;
            Ok(Self { pid, exit: Exit::of(child), log_start })
        });
        started.map_err(failed("start the embedded server"))
    }

    /// What it has written to the log.
    pub(super) fn said(&self, log: &Log) -> String {
        log.text(self.log_start)
    }

    /// Waits until this look, which goes on until the server is ready, is over. If dropped, the
    /// server goes on starting.
    pub(super) async fn ready(
        &self,
        log: &Log,
        look: impl Future<Output = ()>,
    ) -> Result<(), Failure> {
        let (kind, what) = tokio::select! {
            biased;
            status = self.exit.clone().wait() => {
                let status = status.map_or_else(|| "an unknown status".into(), |s| s.to_string());
                (ErrorKind::Unavailable, format!("it ended with {status}"))
            }
            looked = tokio::time::timeout(READY_WITHIN, look) => {
                match looked {
                    Ok(()) => return Ok(()),
                    Err(_) => (ErrorKind::Timeout, format!("not ready after {READY_WITHIN:?}")),
                }
            }
        };
        Err(Failure::new(kind, &what, self.said(log)))
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
        let lines: Vec<_> = log.lines().map(without_values).collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        let cause = io::Error::other(format!("{what}; the last lines of its log:\n{last}"));
        let error = Error::with_source(kind, "start the embedded server", cause);
        Self { error, log }
    }

    /// Somebody else listens on the port.
    pub(super) fn port_is_taken(&self) -> bool {
        ["could not bind", "Address already in use"].iter().any(|words| self.log.contains(words))
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

/// Redis quotes the line of its settings that it does not take. There may be a password in it.
fn without_values(line: &str) -> &str {
    if line.starts_with(">>> '") {
        let end = line.match_indices(' ').nth(1).map_or(line.len(), |(end, _)| end);
        return &line[..end];
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_setting_that_redis_refuses_but_not_its_value() {
        let log = "at line 3\n>>> 'requirepass \"a b\"'\nBad directive\n>>> 'port'".to_owned();
        let chain = Failure::new(ErrorKind::Unavailable, "it ended", log).error.chain();
        assert!(chain.ends_with("at line 3\n>>> 'requirepass\nBad directive\n>>> 'port'"));
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
