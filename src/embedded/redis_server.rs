//! A running Redis.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::account::{self, Account};
use super::folder::{DataFile, Folder};
use super::life::{Kind, Life, StopMode};
use super::process::Process;
use super::redis_builder::RedisBuilder;
use super::watchdog::Trace;
use crate::{Error, ErrorKind, Result};

pub(super) const CONFIG: &str = "redis.conf";
pub(super) const PID_FILE: &str = "redis.pid";

const STOP_WITHIN: Duration = Duration::from_mins(1);
/// Longer than any first line of an answer to `PING`.
const LONGEST_ANSWER: u64 = 1024;

/// A private Redis, or Valkey. It listens on `127.0.0.1` only, keeps nothing on disk, and lets
/// everybody in who can reach its port, unless its [builder](RedisBuilder) said otherwise.
///
/// To drop it ends it, and removes its folder, some milliseconds later; the drop does not wait for
/// that. [`stop`](Self::stop) does. The same happens when this process ends, also by SIGKILL.
#[derive(Debug)]
#[must_use = "ends when dropped"]
pub struct Redis {
    life: Life<Program>,
}

impl Redis {
    /// The options of a new server.
    pub fn builder() -> RedisBuilder {
        RedisBuilder::default()
    }

    /// The address for clients on this machine: `redis://127.0.0.1:PORT/`, with the user and the
    /// password, if they were set, and with `rediss:` in place of `redis:` for TLS.
    pub fn url(&self) -> String {
        self.life.kind.address.url(self.life.port)
    }

    /// The port on `127.0.0.1`. Stays the same for as long as this value lives.
    pub fn port(&self) -> u16 {
        self.life.port
    }

    /// The folder in which the server works, with `redis.conf` and the [files](RedisBuilder::file).
    /// Only the user of the server, and root, may enter it.
    pub fn data_dir(&self) -> PathBuf {
        self.life.folder.data()
    }

    /// The id of the server's process, or `None` if it is down.
    pub fn pid(&self) -> Option<u32> {
        self.life.running().map(|own| own.pid)
    }

    /// All that the server has written to its log. Bytes that are not UTF-8 are replaced. Reads the
    /// whole file.
    pub fn log(&self) -> String {
        self.life.folder.log.text(0)
    }

    /// Returns when the server that was started last has ended, for whatever reason; at once, if it
    /// has. To be called again after each start. `None` if its status is not known, since the runtime
    /// that started it was shut down. Cancel safe.
    pub async fn exited(&self) -> Option<ExitStatus> {
        self.life.current()?.exit.wait().await
    }

    /// Stops the server and keeps its folder, for [`start_server`](Self::start_server). Does nothing
    /// if it is down. What was stored is gone, unless settings say that it is kept on disk.
    /// [`StopMode::Immediate`] ends it by SIGKILL, also when it is suspended.
    ///
    /// [`ErrorKind::Unavailable`] if it is not down after 60 seconds, as when it is suspended and the
    /// mode is [`StopMode::Fast`]. If dropped, the server may be stopping.
    pub async fn stop_server(&self, mode: StopMode) -> Result<()> {
        self.life.stop_server(mode).await
    }

    /// Starts the server again on the same port, after [`stop_server`](Self::stop_server) or a crash,
    /// and waits until it answers, for at most 30 seconds. Waits up to 10 seconds for somebody else
    /// who has taken the port meanwhile.
    ///
    /// After a crash await [`exited`](Self::exited) first: [`ErrorKind::Conflict`] if the server has
    /// not ended. [`ErrorKind::Timeout`] if it was not ready in time, and was stopped for that;
    /// [`ErrorKind::Unavailable`] if it ended, with the last lines of its log in the cause. If
    /// dropped, the server may be down, or come up.
    pub async fn start_server(&self) -> Result<()> {
        self.life.start_server().await
    }

    /// [`stop_server`](Self::stop_server), then [`start_server`](Self::start_server), without another
    /// start or stop between them, and with the errors of both. If dropped, the server may be down,
    /// or come up.
    pub async fn restart(&self, mode: StopMode) -> Result<()> {
        self.life.restart(mode).await
    }

    /// Ends the server at once, and returns when its process and its folder are gone.
    ///
    /// [`ErrorKind::Unavailable`] if the folder could not be removed. If dropped, all that still
    /// happens.
    pub async fn stop(self) -> Result<()> {
        self.life.end().await
    }
}

/// The first start, in a folder that has nothing but a log.
pub(super) async fn start(
    folder: Folder,
    account: Account,
    program: PathBuf,
    address: Address,
    settings: &str,
    files: &[DataFile],
) -> Result<Redis> {
    let mut life = Life::begin(Program { path: program, address }, account, folder)?;
    let mkdir = account.shell("umask 077; mkdir \"$1\"", &[&life.folder.data()]);
    account::run(mkdir, "", "make the folder of the embedded server").await?;
    let config = DataFile { name: CONFIG.into(), text: settings.into() };
    for file in files.iter().chain([&config]) {
        life.folder.put(file).await?;
    }
    life.launch_on_a_free_port().await?;
    Ok(Redis { life })
}

/// How clients reach it, beside the port.
pub(super) struct Address {
    pub(super) tls: bool,
    /// `USER:PASSWORD@`, as a URL has them, or nothing.
    pub(super) credentials: String,
}

impl Address {
    fn url(&self, port: u16) -> String {
        let scheme = if self.tls { "rediss" } else { "redis" };
        format!("{scheme}://{}127.0.0.1:{port}/", self.credentials)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address").field("tls", &self.tls).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Program {
    path: PathBuf,
    address: Address,
}

impl Kind for Program {
    const CONFIG: &'static str = CONFIG;

    fn trace(&self) -> Trace<'_> {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or("redis-server");
        Trace { pid_file: PID_FILE, name, signal: "KILL" }
    }

    fn port_lines(&self, port: u16) -> String {
        if self.address.tls {
            format!("port 0\ntls-port {port}\n")
        } else {
            format!("port {port}\n")
        }
    }

    fn command(&self, folder: &Folder, account: Account) -> Command {
        let mut command = account.command(&self.path);
        command.arg(folder.data().join(CONFIG));
        command
    }

    async fn is_ready(&self, process: &Process, folder: &Folder, port: u16) -> bool {
        // Who answers could be somebody else who has the port. Only the log tells that it is ours.
        process.said(&folder.log).contains("Ready to accept connections")
            && if self.address.tls { connects(port).await } else { answers(port).await }
    }

    async fn halt(life: &Life<Self>, mode: StopMode) -> Result<()> {
        let Some(own) = life.running() else {
            return Ok(());
        };
        let signal = match mode {
            StopMode::Fast => "TERM",
            StopMode::Immediate => "KILL",
        };
        let doing = "stop the embedded server";
        let pid = own.pid.to_string();
        let words = [signal, &pid].map(Path::new);
        let kill = life.account.shell("kill -\"$1\" \"$2\"", &words);
        let signalled = account::run(kill, "", doing).await;
        // It may have ended by itself meanwhile.
        if signalled.is_err() && !own.exit.is_over() {
            return signalled.map(drop);
        }
        if tokio::time::timeout(STOP_WITHIN, own.exit.wait()).await.is_err() {
            let text = format!("{doing}, which has not ended after {STOP_WITHIN:?}");
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        Ok(())
    }
}

async fn connects(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok()
}

/// Whether it answers `PING`, be it with a refusal, as to those who give no password.
async fn answers(port: u16) -> bool {
    let ping = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut answer = String::new();
        BufReader::new(stream.take(LONGEST_ANSWER)).read_line(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    ping.await.is_ok_and(|answer| answer.starts_with(['+', '-']) && !answer.starts_with("-LOADING"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_say_what_clients_need() {
        let url = |tls, credentials: &str| Address { tls, credentials: credentials.into() }.url(5);
        assert_eq!(url(false, ""), "redis://127.0.0.1:5/");
        assert_eq!(url(true, ":a%2Fb@"), "rediss://:a%2Fb@127.0.0.1:5/");
    }
}
