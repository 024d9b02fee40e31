//! A running server.

use std::path::PathBuf;
use std::process::ExitStatus;

use super::account::Account;
use super::builder::{Files, ServerBuilder};
use super::database;
use super::folder::Folder;
use super::life::{Life, StopMode};
use super::postmaster::{self, Postgres};
#[cfg(doc)]
use crate::ErrorKind;
use crate::Result;

/// In the folder of the server, beside that of the cluster.
const PASSWORD_FILE: &str = "pgpass";

/// A private Postgres server. Its superuser is `shardmq`, with a random password, unless its
/// [builder](ServerBuilder) said otherwise.
///
/// To drop it ends it, and removes its folder, some milliseconds later; the drop does not wait for
/// that. [`stop`](Self::stop) does. Both also end a server that somebody started again in the same
/// [folder](Self::data_dir) with `pg_ctl`. The same happens when this process ends, also by SIGKILL.
#[derive(Debug)]
#[must_use = "ends when dropped"]
pub struct Server {
    life: Life<Postgres>,
}

impl Server {
    /// The options of a new server.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The address of a database of this server, for clients on this machine:
    /// `postgresql://shardmq:PASSWORD@127.0.0.1:PORT/DATABASE`. Does not check that there is such a
    /// database.
    pub fn url(&self, database: &str) -> String {
        database::url(self.life.port, database, self.life.kind.password.as_ref())
    }

    /// The same address with the name of a [password file](Self::password_file) in place of the
    /// password, for [`Cluster::add_node`](crate::Cluster::add_node): the control database keeps
    /// addresses without passwords. Other clients than `ShardMQ` and libpq may not know that parameter.
    pub fn node_url(&self, database: &str) -> String {
        let url = database::url(self.life.port, database, None);
        if self.life.kind.password.is_none() {
            return url;
        }
        let file = self.password_file();
        format!("{url}?passfile={}", database::escaped(&file.display().to_string()))
    }

    /// A file with the password, as libpq reads it (`PGPASSFILE`, or `passfile=` in an address). Only the
    /// user of the server, and root, may read it. It lives as long as the server's folder.
    pub fn password_file(&self) -> PathBuf {
        self.life.folder.path().join(PASSWORD_FILE)
    }

    /// The port on `127.0.0.1`. Stays the same for as long as this value lives.
    pub fn port(&self) -> u16 {
        self.life.port
    }

    /// The folder of the server's Unix socket, which only the user of the server, and root, may
    /// enter.
    pub fn socket_dir(&self) -> PathBuf {
        self.life.folder.run()
    }

    /// The folder of the cluster, with `postgresql.conf` and `postmaster.pid`. `pg_ctl -D` that
    /// folder stops and starts the server with the same port and the same settings.
    pub fn data_dir(&self) -> PathBuf {
        self.life.folder.data()
    }

    /// The id of the server's main process, or `None` if it is down. Also that of a server which
    /// somebody else started in the same folder. Reads a small file.
    ///
    /// `None` as well between the end of a server and the time when
    /// [`start_server`](Self::start_server) has come to write that file. On other systems than Linux
    /// the id of a server that somebody else started stays after a crash.
    pub fn pid(&self) -> Option<u32> {
        postmaster::pid(&self.life)
    }

    /// All that the server has written to its log, as far as it was started here and not by others.
    /// Bytes that are not UTF-8 are replaced. Reads the whole file.
    pub fn log(&self) -> String {
        self.life.folder.log.text(0)
    }

    /// Returns when the server that was started last by this value has ended, for whatever reason;
    /// at once, if it has. To be called again after each start. `None` if its status is not known,
    /// since the runtime that started it was shut down. Cancel safe.
    pub async fn exited(&self) -> Option<ExitStatus> {
        self.life.current()?.exit.wait().await
    }

    /// Makes an empty database.
    ///
    /// [`ErrorKind::Invalid`] for a name that is empty, longer than 63 bytes, or has a NUL;
    /// [`ErrorKind::Conflict`] if there is one of that name; [`ErrorKind::Unavailable`] if the server
    /// is down; [`ErrorKind::Database`] otherwise. If dropped, the database may be made or not.
    pub async fn create_database(&self, name: &str) -> Result<()> {
        database::create(&self.url("postgres"), name).await
    }

    /// Stops the server and keeps its folder, for [`start_server`](Self::start_server). Does nothing
    /// if it is down. Also stops a server that somebody else started in the same folder.
    ///
    /// [`ErrorKind::Unavailable`] if it is not down after 60 seconds, as when it is suspended. If
    /// dropped, the server may be stopping.
    pub async fn stop_server(&self, mode: StopMode) -> Result<()> {
        self.life.stop_server(mode).await
    }

    /// Starts the server again, after [`stop_server`](Self::stop_server) or a crash, and waits until
    /// it takes connections, for at most 30 seconds.
    ///
    /// After a crash await [`exited`](Self::exited) first: [`ErrorKind::Conflict`] if the server that
    /// was started here has not ended. [`ErrorKind::Timeout`] if it was not ready in time, and was
    /// stopped for that; [`ErrorKind::Unavailable`] if it ended, with the last lines of its log in
    /// the cause. If dropped, the server may be down, or come up.
    pub async fn start_server(&self) -> Result<()> {
        self.life.start_server().await
    }

    /// [`stop_server`](Self::stop_server), then [`start_server`](Self::start_server), without another
    /// start or stop between them. If dropped, the server may be down, or come up.
    pub async fn restart(&self, mode: StopMode) -> Result<()> {
        self.life.restart(mode).await
    }

    /// Ends the server, without writing anything to disk, and returns when its processes and its
    /// folder are gone.
    ///
    /// [`ErrorKind::Unavailable`] if the folder could not be removed. If dropped, all that still
    /// happens.
    pub async fn stop(self) -> Result<()> {
        self.life.end().await
    }

    /// The user that its processes run as.
    pub(super) fn account(&self) -> Account {
        self.life.account
    }

    /// The first start, in a folder that has nothing but a log.
    pub(super) async fn start(
        folder: Folder,
        account: Account,
        postgres: Postgres,
        files: Files,
    ) -> Result<Self> {
        let mut life = Life::begin(postgres, account, folder)?;
        super::cluster::create(&life.folder, &life.kind.binaries, account).await?;
        life.configure(&files.settings).await?;
        for file in &files.others {
            life.folder.put(file).await?;
        }
        let password = life.kind.password.clone();
        if let Some(password) = &password {
            let file = life.folder.path().join(PASSWORD_FILE);
            life.folder.write(&file, &password.line()).await?;
        }
        life.launch_on_a_free_port().await?;
        if let Some(password) = password {
            password.set(&life.folder, life.port).await?;
        }
        Ok(Self { life })
    }
}
