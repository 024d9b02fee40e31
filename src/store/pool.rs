//! Pools of connections to one target, each looked at before it is used.

use std::sync::Arc;
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, Metrics, QueueMode, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use tokio_postgres::Client;

use crate::error::{Error, ErrorKind, Result};
use crate::store::failed::CutWait;
use crate::store::pooler::Way;
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
}

/// Makes a pool's connections. deadpool's own manager has no room for our errors, and opens
/// connections by itself.
pub(super) struct Manager {
    pub(super) target: Target,
    pub(super) what: String,
    pub(super) way: Arc<Way>,
    pub(super) check: Check,
}

impl managed::Manager for Manager {
    type Type = Session;
    type Error = Error;

    async fn create(&self) -> Result<Session> {
        let (client, task, cut) = self.way.connect(&self.target, &self.what).await?;
        let client = ClientWrapper::new(client, task);
        (self.check)(&client).await?;
        Ok(Session { client, cut })
    }

    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<Error> {
        if session.client.is_closed() || session.cut.is_noted() {
            return Err(RecycleError::message("it is closed, or a commit on it did not wait"));
        }
        Ok(())
    }
}

/// A pool of at most so many connections, in which a wait for a free one is bounded. The one that was
/// used last is used next, so that those beyond what is needed fall idle.
pub(super) fn build(manager: Manager, connections: usize, wait: Duration) -> Result<Pool> {
    let what = manager.what.clone();
    Pool::builder(manager)
        .max_size(connections)
        .queue_mode(QueueMode::Lifo)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(wait))
        .build()
        .map_err(|error| Error::with_source(ErrorKind::Invalid, what, error))
}
