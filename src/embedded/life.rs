//! What the servers of all kinds have in common, from their first start to their end.
//!
//! ```text
//! begin -> [files are written] -> launch_on_a_free_port -> up
//! up -> stop_server, or a crash -> down -> start_server -> up
//! up or down -> end, drop, or the end of this process -> nothing is left
//! ```

use std::process::Command;
use std::sync::{Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::account::Account;
use super::folder::Folder;
use super::process::{Failure, Process};
use super::watchdog::{Trace, Watchdog};
use super::{failed, port};
use crate::{Error, ErrorKind, Result};

const PORTS_TO_TRY: u32 = 5;
const RETRY_FOR: Duration = Duration::from_secs(10);
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopMode {
    /// Ends all connections, writes everything to disk, and ends.
    Fast,
    /// Ends at once, like a crash. The next start recovers what was committed.
    Immediate,
}

/// What differs between Postgres and Redis.
pub(super) trait Kind: Sized + Send + Sync {
    /// The file in the folder `data` that has the settings. The last line for a name counts.
    const CONFIG: &'static str;

    /// By what the watchdog knows a server in the folder.
    fn trace(&self) -> Trace<'_>;

    /// Sets the port in the file of the settings.
    fn port_lines(&self, port: u16) -> String;

    /// What starts a server in the folder.
    fn command(&self, folder: &Folder, account: Account) -> Command;

    /// Whether this process, and not another one, takes connections on the port.
    fn is_ready(
        &self,
        process: &Process,
        folder: &Folder,
        port: u16,
    ) -> impl Future<Output = bool> + Send;

    /// Stops what runs in the folder, if anything does, and returns when it has ended.
    fn halt(life: &Life<Self>, mode: StopMode) -> impl Future<Output = Result<()>> + Send;
}

/// The folder, the port and the process of a server. To drop it ends the server.
#[derive(Debug)]
pub(super) struct Life<K> {
    pub(super) kind: K,
    pub(super) account: Account,
    pub(super) folder: Folder,
    /// Zero before the first start.
    pub(super) port: u16,
    watchdog: Watchdog,
    process: SyncMutex<Option<Process>>,
    /// Held while starting or stopping.
    turn: Mutex<()>,
}

impl<K: Kind> Life<K> {
    /// To be called before anything is done in the folder: from here on nothing is left behind,
    /// whatever happens.
    pub(super) fn begin(kind: K, account: Account, mut folder: Folder) -> Result<Self> {
        let watchdog = Watchdog::start(&mut folder, account, kind.trace())?;
        let (process, turn) = (SyncMutex::new(None), Mutex::new(()));
        Ok(Self { kind, account, folder, port: 0, watchdog, process, turn })
    }

    /// Adds to the settings.
    pub(super) async fn configure(&self, lines: &str) -> Result<()> {
        self.folder.append(&self.folder.data().join(K::CONFIG), lines).await
    }

    /// The first start.
    pub(super) async fn launch_on_a_free_port(&mut self) -> Result<()> {
        let mut tries = 0;
        loop {
            tries += 1;
            self.port = port::free().map_err(failed("find a free port"))?;
            self.configure(&self.kind.port_lines(self.port)).await?;
            match self.launch().await {
                Err(failure) if failure.port_is_taken() && tries < PORTS_TO_TRY => {}
                other => return other.map_err(|failure| failure.error),
            }
        }
    }

    pub(super) async fn stop_server(&self, mode: StopMode) -> Result<()> {
        let _turn = self.turn.lock().await;
        K::halt(self, mode).await
    }

    pub(super) async fn start_server(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.launch_again().await
    }

    pub(super) async fn restart(&self, mode: StopMode) -> Result<()> {
        let _turn = self.turn.lock().await;
        K::halt(self, mode).await?;
        self.launch_again().await
    }

    /// Returns when the processes and the folder are gone.
    pub(super) async fn end(self) -> Result<()> {
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

    /// The process that was started last. It may have ended.
    pub(super) fn current(&self) -> Option<Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The process that was started last, if it has not ended.
    pub(super) fn running(&self) -> Option<Process> {
        self.current().filter(|own| !own.exit.is_over())
    }

    /// On the same port. Remains of the server before this one may be in the way for a while.
    async fn launch_again(&self) -> Result<()> {
        if self.running().is_some() {
            let text = "start the embedded server, which has not ended yet";
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        let deadline = Instant::now() + RETRY_FOR;
        loop {
            let Err(failure) = self.launch().await else {
                return Ok(());
            };
            if failure.error.kind() == ErrorKind::Timeout {
                let _ = K::halt(self, StopMode::Immediate).await;
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
        let command = self.kind.command(&self.folder, self.account);
        let process = Process::spawn(command, &self.folder.log)?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process.clone());
        let look = async {
            while !self.kind.is_ready(&process, &self.folder, self.port).await {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let ready = process.ready(&self.folder.log, look).await;
        self.watchdog.settled()?;
        ready
    }
}
