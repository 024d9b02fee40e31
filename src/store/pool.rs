//! Pools of connections to one target, each looked at before it is used.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Metrics, QueueMode, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_postgres::Statement;

use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::failed::CutWait;
use crate::store::kept::Kept;
use crate::store::places::{Backend, Places};
use crate::store::pooler::Way;
use crate::store::session::Session;
use crate::store::sql;
use crate::store::target::Target;

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
    kept: Mutex<Kept<Statement>>,
}

impl Pooled {
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
}

impl Manager {
    /// Asks which server process serves a new session. A pooler may give the session another each time.
    async fn backend(&self, session: Session<'_>) -> Result<Backend> {
        let rows = session.query(sql::SERVER, &[]).await;
        let rows = rows.map_err(|error| refused(error, &self.what))?;
        let row = rows.first().ok_or_else(|| Error::new(ErrorKind::Unavailable, &*self.what))?;
        Ok(Backend { server: row.get(0), pid: self.way.is_pinned().then(|| row.get(1)) })
    }
}

impl managed::Manager for Manager {
    type Type = Pooled;
    type Error = Error;

    async fn create(&self) -> Result<Pooled> {
        let (client, task, cut) = self.way.connect(&self.target, &self.what).await?;
        let client = ClientWrapper::new(client, task);
        let session = Session::new(&client, self.way.is_pinned());
        (self.check)(session).await?;
        let backend = self.backend(session).await?;
        self.places.answered(backend.server);
        Ok(Pooled { client, cut, backend, kept: Mutex::default() })
    }

    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<Error> {
        if pooled.client.is_closed() || pooled.cut.is_noted() {
            return Err(RecycleError::message("it is closed, or a commit on it did not wait"));
        }
        Ok(())
    }
}

/// A pool of as many connections as there are places, in which a wait for one is bounded. The one that was
/// used last is used next, so that those beyond what is needed fall idle.
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
