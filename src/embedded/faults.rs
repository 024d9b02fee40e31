//! Failures of a server that a test brings about: killed, suspended, locked, with a wrong clock.

use std::path::Path;
use std::time::Duration;

use tokio_postgres::Client;

use super::account;
use super::server::Server;
use crate::store::connect::connect_once;
use crate::store::faults;
use crate::{Error, ErrorKind, PartitionId, Result};

impl Server {
    /// Ends the server's main process with SIGKILL, and returns when it has ended.
    /// [`start_server`](Self::start_server) starts it again.
    ///
    /// [`ErrorKind::Unavailable`] if it is down. If dropped, the server may be ending.
    pub async fn kill(&self) -> Result<()> {
        let pid = self.pid().ok_or_else(is_down)?;
        self.signal("KILL", &[pid]).await?;
        self.exited().await;
        Ok(())
    }

    /// Suspends all processes of the server with SIGSTOP, up to [`resume`](Self::resume): to its
    /// clients it hangs. On other systems than Linux only the main process, which takes no new
    /// connections then.
    ///
    /// [`ErrorKind::Unavailable`] if it is down. If dropped, the server may be suspended or not.
    pub async fn suspend(&self) -> Result<()> {
        let pid = self.pid().ok_or_else(is_down)?;
        // First the one that starts the others.
        self.signal("STOP", &[pid]).await?;
        self.signal_all("STOP", &children(pid)).await
    }

    /// Lets the processes of a suspended server go on.
    ///
    /// [`ErrorKind::Unavailable`] if it is down. If dropped, they may go on or not.
    pub async fn resume(&self) -> Result<()> {
        let pid = self.pid().ok_or_else(is_down)?;
        self.signal_all("CONT", &children(pid)).await?;
        self.signal("CONT", &[pid]).await
    }

    /// Locks the table of a day of one of a node's partitions against everybody for so long: the
    /// one that takes appends, of the partition of this number (counted from 0, and round again).
    /// Does nothing where there is no partition.
    ///
    /// The error is that of the statement that failed. If dropped, the lock ends.
    pub async fn lock_day_table(
        &self,
        database: &str,
        partition: usize,
        lasts: Duration,
    ) -> Result<Option<PartitionId>> {
        let client = self.client(database).await?;
        let doing = "lock a day table";
        let days = faults::days(&client).await.map_err(failed(doing))?;
        let Some(day) = days.iter().cycle().nth(partition).filter(|_| !days.is_empty()) else {
            return Ok(None);
        };
        faults::lock_day(&client, day.partition, day.day).await.map_err(failed(doing))?;
        tokio::time::sleep(lasts).await;
        faults::unlock(&client).await.map_err(failed(doing))?;
        Ok(Some(day.partition))
    }

    /// Moves all open partitions of a node to the next day, as the first append after midnight
    /// does.
    ///
    /// The error is that of the statement that failed. If dropped, it was done or not.
    pub async fn roll_days(&self, database: &str) -> Result<()> {
        let client = self.client(database).await?;
        let doing = "roll the days of a node";
        let days = faults::days(&client).await.map_err(failed(doing))?;
        faults::roll(&client, &days).await.map_err(failed(doing))
    }

    /// Makes the clock of a node's schema show so many seconds more than the true time, or less; 0
    /// puts it right. The clocks of the machine and of Postgres are left alone.
    ///
    /// The error is that of the statement that failed. If dropped, it was done or not.
    pub async fn move_clock(&self, database: &str, ahead_secs: i64) -> Result<()> {
        let client = self.client(database).await?;
        faults::move_clock(&client, ahead_secs).await.map_err(failed("move the clock of a node"))
    }

    async fn client(&self, database: &str) -> Result<Client> {
        let client = connect_once(&self.url(database), "shardmq embedded").await?.into_client();
        // A fault waits for those that use what it breaks.
        let bounds = "set statement_timeout = '1min'; set lock_timeout = '10s'";
        client.batch_execute(bounds).await.map_err(failed("break an embedded server"))?;
        Ok(client)
    }

    /// A signal to processes that may have ended since.
    async fn signal_all(&self, name: &str, pids: &[u32]) -> Result<()> {
        for pid in pids {
            let sent = self.signal(name, &[*pid]).await;
            if sent.is_err() && Path::new(&format!("/proc/{pid}")).exists() {
                return sent;
            }
        }
        Ok(())
    }

    /// As the user of the server, who can reach no other processes but its own.
    async fn signal(&self, name: &str, pids: &[u32]) -> Result<()> {
        let mut kill = self.account().command("kill");
        kill.arg(format!("-{name}")).args(pids.iter().map(u32::to_string));
        account::run(kill, "", "send a signal to the embedded server").await.map(drop)
    }
}

fn is_down() -> Error {
    Error::new(ErrorKind::Unavailable, "send a signal to the embedded server, which is down")
}

/// For `map_err`: a statement failed.
fn failed(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Error {
    move |cause| crate::store::connect::refused(cause, doing)
}

/// The processes that this one started, where `/proc` tells.
fn children(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.parse::<u32>().ok();
    let pids = entries.filter_map(|entry| number(entry.file_name()));
    pids.filter(|child| parent_of(*child) == Some(pid)).collect()
}

/// Behind the name in parentheses: state, then the parent.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}
