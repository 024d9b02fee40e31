//! Pools of connections to one target, each looked at before it is used.

use std::sync::Arc;
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Metrics, QueueMode, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use tokio_postgres::Client;

use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::failed::CutWait;
use crate::store::places::{Backend, Places};
use crate::store::pooler::Way;
use crate::store::sql;
use crate::store::target::Target;

/// A pooled connection, given back when dropped.
pub(super) type Object = managed::Object<Manager>;
pub(super) type Pool = managed::Pool<Manager>;

/// Whether a new connection leads to what it should.
pub(super) type Check = Arc<dyn Fn(&Client) -> BoxFuture<'_, Result<()>> + Send + Sync>;

/// A connection of a pool, and whether a commit on it ended before the standby had it.
pub(super) struct Session {
    pub(super) client: ClientWrapper,
    pub(super) cut: CutWait,
    pub(super) backend: Backend,
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

impl managed::Manager for Manager {
    type Type = Session;
    type Error = Error;

    async fn create(&self) -> Result<Session> {
        let (client, task, cut) = self.way.connect(&self.target, &self.what).await?;
        let client = ClientWrapper::new(client, task);
        (self.check)(&client).await?;
        let row = client.query_typed_one(sql::SERVER, &[]).await;
        let row = row.map_err(|error| refused(error, &self.what))?;
        let pid = self.way.keeps_sessions().then(|| row.get(1));
        let backend = Backend { server: row.get(0), pid };
        self.places.answered(backend.server);
        Ok(Session { client, cut, backend })
    }

    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<Error> {
        if session.client.is_closed() || session.cut.is_noted() {
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
