//! What every session pins, so that no statement waits or runs without a bound, and no name is
//! taken over.
//!
//! A session of Postgres itself has it as settings, from its beginning. A pooler hands sessions on,
//! so there it goes along with each statement, in the same round trip:
//!
//! ```text
//! Postgres itself:  statement
//! a pooler:         begin, set local .. ─ statement ─ commit
//! ```
//!
//! A transaction that writes, or takes a partition's lock, sets its own in either case: see the
//! statements whose names begin with `begin`.

use std::future::Future;
use std::time::Duration;

use futures_util::future::join3;
use tokio::time::timeout;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};

use crate::store::failed::{CutWait, Failed};
use crate::store::sql;
use crate::store::target::Canceller;

/// The settings of a session, in the form of the startup parameter `options`. Waits for locks are
/// short: a statement that reads is repeated, and meanwhile others need the connection. A statement
/// may run as long as the largest message takes over a slow line. Names are those of Postgres
/// alone, since everybody may create in `public` on Postgres 14; temporary ones come last.
pub(super) const OPTIONS: &str =
    "-c search_path=pg_catalog,pg_temp -c statement_timeout=60s -c lock_timeout=100ms";

/// A value with its type, as a parameter of a statement that is not kept.
pub(crate) type Value<'a> = (&'a (dyn ToSql + Sync), Type);

/// A client outside of a pool, or on its way into one.
#[derive(Clone, Copy)]
pub(crate) struct Session<'a> {
    client: &'a Client,
    /// Whether the settings are the session's own.
    pinned: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(client: &'a Client, pinned: bool) -> Self {
        Self { client, pinned }
    }

    /// Of a client whose session was opened at Postgres itself.
    pub(crate) fn direct(client: &'a Client) -> Self {
        Self::new(client, true)
    }

    /// Runs a statement that reads.
    pub(crate) async fn query(self, text: &str, params: &[Value<'_>]) -> Result<Vec<Row>, Error> {
        let run = self.client.query_typed(text, params);
        if self.pinned {
            return run.await;
        }
        within(self.client, sql::BEGIN_READ, run).await
    }
}

async fn within<T>(
    client: &Client,
    opening: &str,
    run: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    // Each sends as it is polled for the first time, in this order.
    let (begun, answer, ended) =
        join3(client.batch_execute(opening), run, client.batch_execute("commit")).await;
    begun?;
    let answer = answer?;
    ended?;
    Ok(answer)
}

/// How long a statement that runs long may wait for a lock.
const LONG_LOCK: &str = "1s";
/// How long a server may take to hear that a statement is to be ended.
const CANCEL: Duration = Duration::from_secs(5);

/// One connection outside of any pool.
pub(crate) struct Single {
    pub(super) client: Client,
    pub(super) pinned: bool,
    pub(super) canceller: Canceller,
    /// Whether a commit on it ended before the standby had it.
    pub(super) cut: CutWait,
}

impl Single {
    pub(crate) fn session(&self) -> Session<'_> {
        Session::new(&self.client, self.pinned)
    }

    /// Runs statements one after the other in one durable transaction. Returns the rows of the last
    /// one.
    pub(crate) async fn write(
        &self,
        statements: &[(&str, &[Value<'_>])],
    ) -> Result<Vec<Row>, Failed> {
        self.client.batch_execute(sql::BEGIN_DURABLE).await?;
        let mut rows = Vec::new();
        for (text, params) in statements {
            rows = self.client.query_typed(text, params).await?;
        }
        self.client.batch_execute("commit").await?;
        if self.cut.is_noted() { Err(Failed::Unconfirmed) } else { Ok(rows) }
    }

    /// The client itself, for what can't be in a transaction.
    #[cfg(feature = "embedded")]
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The client alone.
    #[cfg(feature = "embedded")]
    pub(crate) fn into_client(self) -> Client {
        self.client
    }

    /// Runs a statement that can't be in a transaction and has a bound of its own. A pooler's
    /// session can't be given that: there it is ended from here when its time is over.
    pub(crate) async fn run_long(&self, text: &str, bound: Duration) -> Result<(), Error> {
        if self.pinned {
            let bound = bound.as_millis();
            let bounds =
                format!("set statement_timeout = {bound}; set lock_timeout = '{LONG_LOCK}'");
            self.client.batch_execute(&bounds).await?;
            // It ends with its client. Where the server's system can't tell of that, within its
            // bound.
            let _ = self.client.batch_execute("set client_connection_check_interval = '5s'").await;
            return self.client.batch_execute(text).await;
        }
        let mut running = std::pin::pin!(self.client.batch_execute(text));
        if let Ok(ended) = timeout(bound, &mut running).await {
            return ended;
        }
        let _ = timeout(CANCEL, self.canceller.cancel(&self.client)).await;
        running.await
    }
}
