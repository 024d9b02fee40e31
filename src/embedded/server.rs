//! A running server.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::{Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::account::{self, Account};
use super::binaries::Binaries;
use super::builder::{Files, ServerBuilder};
use super::folder::Folder;
use super::postmaster::{Failure, LockFile, Postmaster};
use super::watchdog::Watchdog;
use super::{database, failed, port};
use crate::{Error, ErrorKind, Result};

const PORTS_TO_TRY: u32 = 5;
const STOP_WITHIN: Duration = Duration::from_mins(1);
const RETRY_FOR: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Between the start of a server and its lock file.
const LOCKED_WITHIN: Duration = Duration::from_secs(5);

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopMode {
    /// Ends all connections, writes everything to disk, and ends.
    Fast,
    /// Ends at once, like a crash. The next start recovers what was committed.
    Immediate,
}

/// A private Postgres server. Its superuser is `shardmq`, without a password.
///
/// To drop it ends it, and removes its folder, some milliseconds later; the drop does not wait for
/// that. [`stop`](Self::stop) does. Both also end a server that somebody started again in the same
/// [folder](Self::data_dir) with `pg_ctl`. The same happens when this process ends, also by SIGKILL.
#[derive(Debug)]
#[must_use = "ends when dropped"]
pub struct Server {
    binaries: Binaries,
    account: Account,
    folder: Folder,
    port: u16,
    variables: Vec<(OsString, OsString)>,
    watchdog: Watchdog,
    postmaster: SyncMutex<Option<Postmaster>>,
    /// Held while starting or stopping.
    turn: Mutex<()>,
}

impl Server {
    /// The options of a new server.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The address of a database of this server, for clients on this machine:
    /// `postgresql://shardmq@127.0.0.1:PORT/DATABASE`. Does not check that there is such a database.
    pub fn url(&self, database: &str) -> String {
        database::url(self.port, database)
    }

    /// The port on `127.0.0.1`. Stays the same for as long as this value lives.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of the server's Unix socket, which only the user of the server, and root, may
    /// enter.
    pub fn socket_dir(&self) -> PathBuf {
        self.folder.run()
    }

    /// The folder of the cluster, with `postgresql.conf` and `postmaster.pid`. `pg_ctl -D` that
    /// folder stops and starts the server with the same port and the same settings.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.data()
    }

    /// The id of the server's main process, or `None` if it is down. Also that of a server which
    /// somebody else started in the same folder. Reads a small file.
    ///
    /// `None` as well between the end of a server and the time when
    /// [`start_server`](Self::start_server) has come to write that file. On other systems than Linux
    /// the id of a server that somebody else started stays after a crash.
    pub fn pid(&self) -> Option<u32> {
        let data = self.folder.data();
        let lock = LockFile::read_now(&data)?;
        let ended = self.current().is_some_and(|own| own.pid == lock.pid && own.exit.is_over());
        (!ended && lock.is_of_a_server_in(&data)).then_some(lock.pid)
    }

    /// All that the server has written to its log, as far as it was started here and not by others.
    /// Bytes that are not UTF-8 are replaced. Reads the whole file.
    pub fn log(&self) -> String {
        self.folder.log.text(0)
    }

    /// Returns when the server that was started last by this value has ended, for whatever reason;
    /// at once, if it has. To be called again after each start. `None` if its status is not known,
    /// since the runtime that started it was shut down. Cancel safe.
    pub async fn exited(&self) -> Option<ExitStatus> {
        self.current()?.exit.wait().await
    }

    /// Makes an empty database.
    ///
    /// [`ErrorKind::Invalid`] for a name that is empty, longer than 63 bytes, or has a NUL;
    /// [`ErrorKind::Conflict`] if there is one of that name; [`ErrorKind::Unavailable`] if the server
    /// is down; [`ErrorKind::Database`] otherwise. If dropped, the database may be made or not.
    pub async fn create_database(&self, name: &str) -> Result<()> {
        database::create(self.port, name).await
    }

    /// Stops the server and keeps its folder, for [`start_server`](Self::start_server). Does nothing
    /// if it is down. Also stops a server that somebody else started in the same folder.
    ///
    /// [`ErrorKind::Unavailable`] if it is not down after 60 seconds, as when it is suspended. If
    /// dropped, the server may be stopping.
    pub async fn stop_server(&self, mode: StopMode) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.halt(mode).await
    }

    /// Starts the server again, after [`stop_server`](Self::stop_server) or a crash, and waits until
    /// it takes connections, for at most 30 seconds.
    ///
    /// After a crash await [`exited`](Self::exited) first: [`ErrorKind::Conflict`] if the server that
    /// was started here has not ended. [`ErrorKind::Timeout`] if it was not ready in time, and was
    /// stopped for that; [`ErrorKind::Unavailable`] if it ended, with the last lines of its log in
    /// the cause. If dropped, the server may be down, or come up.
    pub async fn start_server(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.launch_again().await
    }

    /// [`stop_server`](Self::stop_server), then [`start_server`](Self::start_server), without another
    /// start or stop between them. If dropped, the server may be down, or come up.
    pub async fn restart(&self, mode: StopMode) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.halt(mode).await?;
        self.launch_again().await
    }

    /// Ends the server, without writing anything to disk, and returns when its processes and its
    /// folder are gone.
    ///
    /// [`ErrorKind::Unavailable`] if the folder could not be removed. If dropped, all that still
    /// happens.
    pub async fn stop(self) -> Result<()> {
        let exit = self.current().map(|own| own.exit);
        self.watchdog.release().await;
        if tokio::fs::try_exists(self.folder.path()).await.unwrap_or(true) {
            let text = format!("{} could not be removed", self.folder.path().display());
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        if let Some(exit) = exit {
            exit.wait().await;
        }
        Ok(())
    }

    /// The first start, in a folder that has nothing but a log.
    pub(super) async fn start(
        mut folder: Folder,
        binaries: Binaries,
        account: Account,
        variables: Vec<(OsString, OsString)>,
        files: Files,
    ) -> Result<Self> {
        // First of all: from here on nothing is left behind, whatever happens.
        let watchdog = Watchdog::start(&mut folder, &binaries, account)?;
        super::cluster::create(&folder, &binaries, account).await?;
        folder.configure(&files.settings).await?;
        for file in &files.others {
            folder.put(file).await?;
        }
        let (postmaster, turn) = (SyncMutex::new(None), Mutex::new(()));
        let port = 0;
        let mut server =
            Self { binaries, account, folder, port, variables, watchdog, postmaster, turn };
        server.launch_on_a_free_port().await?;
        Ok(server)
    }

    async fn launch_on_a_free_port(&mut self) -> Result<()> {
        let mut tries = 0;
        loop {
            tries += 1;
            self.port = port::free().map_err(failed("find a free port"))?;
            self.folder.configure(&format!("port = {}\n", self.port)).await?;
            match self.launch().await {
                Err(failure) if failure.port_is_taken() && tries < PORTS_TO_TRY => {}
                other => return other.map_err(|failure| failure.error),
            }
        }
    }

    /// On the same port. Remains of the server before this one may be in the way for a while.
    async fn launch_again(&self) -> Result<()> {
        if self.current().is_some_and(|own| !own.exit.is_over()) {
            let text = "start the embedded server, which has not ended yet";
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        let deadline = Instant::now() + RETRY_FOR;
        loop {
            let Err(failure) = self.launch().await else {
                return Ok(());
            };
            if failure.error.kind() == ErrorKind::Timeout {
                let _ = self.halt(StopMode::Immediate).await;
            }
            let temporary = failure.is_still_used() || failure.port_is_taken();
            if !temporary || Instant::now() >= deadline {
                return Err(failure.error);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn launch(&self) -> Result<(), Failure> {
        self.watchdog.starting()?;
        let postmaster =
            Postmaster::spawn(&self.folder, &self.binaries, self.account, &self.variables)?;
        *self.postmaster.lock().unwrap_or_else(PoisonError::into_inner) = Some(postmaster.clone());
        let ready = postmaster.ready(&self.folder, self.port).await;
        self.watchdog.settled()?;
        ready
    }

    async fn halt(&self, mode: StopMode) -> Result<()> {
        if !self.is_up().await {
            return Ok(());
        }
        let mode = match mode {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        };
        let mut command = self.account.command(self.binaries.program("pg_ctl"));
        command.arg("-D").arg(self.folder.data()).args(["stop", "-m", mode, "-t"]);
        command.arg(STOP_WITHIN.as_secs().to_string());
        let stopped = account::run(command, "", "stop the embedded server").await;
        // It may have ended by itself meanwhile.
        if stopped.is_err() && self.is_up().await {
            return stopped.map(drop);
        }
        if let Some(own) = self.current() {
            own.exit.wait().await;
        }
        Ok(())
    }

    /// Whether there is something to stop. A server of ours that has no lock file has either not
    /// written it yet, or is about to end.
    async fn is_up(&self) -> bool {
        let deadline = Instant::now() + LOCKED_WITHIN;
        loop {
            let lives = self.current().is_some_and(|own| !own.exit.is_over());
            if self.pid().is_some() {
                return true;
            }
            if !lives || Instant::now() >= deadline {
                return lives;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn current(&self) -> Option<Postmaster> {
        self.postmaster.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
