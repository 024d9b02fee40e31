//! Who the server runs as, and how its children are started.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::sync::watch;

use super::failed;
use crate::{Error, ErrorKind, Result};

/// The user that all children run as: our own, or an unprivileged one when we are root, since
/// Postgres refuses to run as root, and Redis has no need to.
///
/// Root itself never writes into a folder of that user (who could lead it elsewhere through a
/// symbolic link): the children do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    pub(super) uid: u32,
    /// The group to change to, if we have to change the user at all.
    pub(super) group: Option<u32>,
}

impl Account {
    pub(super) async fn find() -> Result<Self> {
        let uid = id(&["-u"]).await?;
        if uid != 0 {
            return Ok(Self { uid, group: None });
        }
        for name in ["postgres", "nobody"] {
            if let (Ok(uid), Ok(gid)) = (id(&["-u", name]).await, id(&["-g", name]).await) {
                return Ok(Self { uid, group: Some(gid) });
            }
        }
        let text = "found no user to run the server as: it does not run as root, and there is \
            neither a user `postgres` nor `nobody`";
        Err(Error::new(ErrorKind::NotFound, text))
    }

    /// A child in a process group of its own, so that the terminal's Ctrl-C does not reach it. Its
    /// standard streams lead nowhere.
    pub(super) fn command(self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Our own folder may be one that the user of the child may not enter.
        command.current_dir("/").process_group(0);
        let variables = std::env::vars_os().map(|(name, _)| name);
        for name in variables.filter(|name| name.as_encoded_bytes().starts_with(b"PG")) {
            command.env_remove(name);
        }
        // The words of some errors are looked at.
        command.env("LC_ALL", "C");
        if let Some(gid) = self.group {
            command.gid(gid).uid(self.uid);
        }
        command
    }

    /// A child that runs this shell script, with these as `$1` and so on.
    pub(super) fn shell(self, script: &str, arguments: &[&Path]) -> Command {
        let mut command = self.command("/bin/sh");
        command.arg("-c").arg(script).arg("sh").args(arguments);
        command
    }
}

/// Runs a child to its end and returns what it said on standard output. An error has what it said on
/// standard error as its cause. If dropped, the child is killed.
pub(super) async fn run(mut command: Command, input: &str, doing: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = async {
        let mut child = spawn(command, true)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = output.await.map_err(failed(doing))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(doing)(io::Error::other(format!("{}: {words}", output.status))))
}

/// One at a time. Where a pipe can't be made close-on-exec at once (macOS), a child that is started
/// meanwhile would inherit it. A server that holds the pipe of another one's watchdog would let that
/// one live for as long as itself.
pub(super) fn spawn(command: Command, kill_on_drop: bool) -> io::Result<Child> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    tokio::process::Command::from(command).kill_on_drop(kill_on_drop).spawn()
}

/// The end of a child, which a task waits for, so that it does not stay a zombie.
#[derive(Debug, Clone)]
pub(super) struct Exit(watch::Receiver<Option<ExitStatus>>);

impl Exit {
    pub(super) fn of(mut child: Child) -> Self {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                sender.send_replace(Some(status));
            }
        });
        Self(receiver)
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.has_changed().is_err() || self.0.borrow().is_some()
    }

    /// `None` when nobody can tell, since the runtime that waited for the child was shut down.
    pub(super) async fn wait(mut self) -> Option<ExitStatus> {
        self.0.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }
}

async fn id(arguments: &[&str]) -> Result<u32> {
    let doing = "look up a user with `id`";
    let mut command = Command::new("id");
    command.args(arguments);
    let text = run(command, "", doing).await?;
    text.trim().parse().map_err(|cause| Error::with_source(ErrorKind::Unavailable, doing, cause))
}
