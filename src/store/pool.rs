//! Pools of connections to one target, each looked at before it is used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Metrics, QueueMode, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use futures_util::future::{BoxFuture, join_all};
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Statement};

use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::failed::CutWait;
use crate::store::kept::Kept;
use crate::store::places::{Backend, Places};
use crate::store::pooler::{Entered, Way};
use crate::store::session::Session;
use crate::store::sql;
use crate::store::target::{self, Older, Opened, Target};
use crate::store::timeline::{self, Newest, Primary};

/// How long a look at a host may take.
const LOOK: Duration = Duration::from_secs(3);

/// A pooled connection, given back when dropped.
pub(super) type Object = managed::Object<Manager>;
pub(super) type Pool = managed::Pool<Manager>;

/// Whether a new connection leads to what it should.
pub(super) type Check = Arc<dyn Fn(Session<'_>) -> BoxFuture<'_, Result<()>> + Send + Sync>;

/// A connection with the statements that it keeps.
pub(super) struct Pooled {
    pub(super) client: ClientWrapper,
    /// Whether a commit on it ended before the standby had it.
    pub(super) cut: CutWait,
    /// The server process behind it.
    pub(super) backend: Backend,
    /// The primary that it leads to, where that is known.
    pub(super) primary: Option<Primary>,
    newest: Arc<Newest>,
    kept: Mutex<Kept<Statement>>,
}

impl Pooled {
    /// Whether a newer primary is known than the one that it leads to.
    pub(super) fn is_outdated(&self) -> bool {
        self.newest.newer_than(self.primary).is_some()
    }

    /// The statement with this text, if it is kept.
    pub(super) fn kept(&self, text: &str) -> Option<Statement> {
        self.lock().get(text, Instant::now())
    }

    /// Keeps a statement. Those that go for it are closed.
    pub(super) fn keep(&self, text: &str, statement: Statement) {
        let gone = self.lock().add(text, statement, Instant::now());
        drop(gone);
    }

    fn lock(&self) -> MutexGuard<'_, Kept<Statement>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a pool's connections. deadpool's own manager has no room for our errors, and opens
/// connections by itself.
pub(super) struct Manager {
    pub(super) target: Target,
    pub(super) what: String,
    pub(super) way: Arc<Way>,
    pub(super) check: Check,
    pub(super) places: Arc<Places>,
    pub(super) newest: Arc<Newest>,
    /// The server does not tell which primary it is.
    pub(super) untold: AtomicBool,
}

impl Manager {
    /// Asks which server process serves a new session, and of which primary. A pooler may give the
    /// session another each time.
    async fn backend(&self, session: Session<'_>) -> Result<(Backend, Option<Primary>)> {
        let untold = self.untold.load(Ordering::Relaxed);
        let text = if untold { sql::SERVER } else { sql::SERVER_PRIMARY };
        let rows = match session.query(text, &[]).await {
            Err(error) if !untold && timeline::is_untold(&error) => {
                self.untold.store(true, Ordering::Relaxed);
                session.query(sql::SERVER, &[]).await
            }
            rows => rows,
        };
        let rows = rows.map_err(|error| refused(error, &self.what))?;
        let row = rows.first().ok_or_else(|| Error::new(ErrorKind::Unavailable, &*self.what))?;
        let pid = self.way.is_pinned().then(|| row.get(1));
        let primary = if row.len() > 2 { Primary::of(row, 2) } else { None };
        Ok((Backend { server: row.get(0), pid }, primary))
    }

    /// Opens a connection to a host that is none of those with an older primary; or adds its host
    /// to these.
    async fn open(&self, older: &mut Vec<Older>) -> Result<Option<Pooled>> {
        let Entered { client, task, cut, host } =
            self.way.connect(&self.target, &self.what, older).await?;
        let client = ClientWrapper::new(client, task);
        let session = Session::new(&client, self.way.is_pinned());
        let (backend, primary) = self.backend(session).await?;
        if let Some(newer) = self.newest.newer_than(primary) {
            older.push(Older { host, why: self.newest.refusal(primary, newer) });
            return Ok(None);
        }
        (self.check)(session).await?;
        if let Some(primary) = primary {
            self.newest.see(primary);
        }
        self.places.answered(backend.server);
        let newest = Arc::clone(&self.newest);
        Ok(Some(Pooled { client, cut, backend, primary, newest, kept: Mutex::default() }))
    }
}

impl managed::Manager for Manager {
    type Type = Pooled;
    type Error = Error;

    async fn create(&self) -> Result<Pooled> {
        let mut older = Vec::new();
        // Each time without one host more.
        loop {
            if let Some(pooled) = self.open(&mut older).await? {
                return Ok(pooled);
            }
        }
    }

    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<Error> {
        if pooled.client.is_closed() || pooled.cut.is_noted() {
            return Err(RecycleError::message("it is closed, or a commit on it did not wait"));
        }
        if pooled.is_outdated() {
            return Err(RecycleError::message("it leads to an older primary"));
        }
        Ok(())
    }
}

/// A pool of as many connections as there are places, in which a wait for one is bounded. The one
/// that was used last is used next, so that those beyond what is needed fall idle.
pub(super) fn build(manager: Manager, wait: Duration) -> Result<Pool> {
    let (what, most) = (manager.what.clone(), manager.places.most());
    Pool::builder(manager)
        .max_size(most)
        .queue_mode(QueueMode::Lifo)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(wait))
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Invalid, what, error))
}

/// A primary at one of the hosts of an address, on a connection of its own.
pub(crate) struct Found {
    /// The host with its port.
    pub(crate) at: String,
    pub(crate) primary: Primary,
    pub(crate) client: Client,
}

/// The primaries at all hosts of an address that answer in time.
pub(super) async fn primaries(target: &Target) -> Vec<Found> {
    let at = async |host| timeout(LOOK, primary_at(target, host)).await.ok().flatten();
    join_all((0..target.hosts()).map(at)).await.into_iter().flatten().collect()
}

async fn primary_at(target: &Target, host: usize) -> Option<Found> {
    let Opened { client, messages, .. } = target.open_at(host).await.ok()?;
    tokio::spawn(target::drive(messages, CutWait::default()));
    let primary = timeline::primary(Session::new(&client, false)).await.ok()??;
    Some(Found { at: target.place(host), primary, client })
}
