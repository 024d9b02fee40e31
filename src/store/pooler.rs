//! Whether a pooler that keeps no session's state stands between this process and a server.
//!
//! PgBouncer in transaction mode gives each transaction any of its server connections. A statement
//! that was prepared before the transaction is missing there, or is another process's of the same
//! name. So through a pooler none is kept.
//!
//! That is found out when connecting, not guessed: a setting goes along that only who opens a
//! session itself can have in it.
//!
//! ```text
//! connect with -c shardmq.direct=.. ── refused ─> connect without it ─> a pooler
//!        │
//!        └─ is it there? ── no ─> a pooler
//!                 └─ yes ─> Postgres itself
//! ```
//!
//! Once a pool has met a pooler it keeps no statement any more, on any connection, and sends a
//! session's settings with each statement ([`session`](crate::store::session)): what is right
//! through a pooler is right everywhere. A node with another address gets another pool, and it is
//! found out again.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, Error};
use uuid::Uuid;

use crate::error::Result;
use crate::store::connect::{self, refused};
use crate::store::failed::CutWait;
use crate::store::session::{self, Session};
use crate::store::sql;
use crate::store::target::{Older, Opened, Target, drive};

/// Whether statements stay prepared on data connections, which makes each of them cheaper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PreparedStatements {
    /// Where the address leads to Postgres itself; not through a pooler. Found out when connecting,
    /// by a setting in the startup parameter `options`: a pooler refuses that, or leaves it out.
    #[default]
    Auto,
    /// Always. Through a pooler in transaction mode this needs one that prepares a client's
    /// statements again wherever they are missing, as PgBouncer does from 1.21 on where its
    /// `max_prepared_statements` is not 0. Through any other, statements fail. Since the pooler may
    /// do so in the middle of an append, a producer that falls silent there can keep a partition
    /// locked until the pooler or the network finds that it is gone, and not for 5 s only.
    Always,
    /// Never: each statement is parsed again, and appends go by an SQL function.
    Never,
}

/// A setting that no other session has.
#[derive(Debug, Clone)]
pub(crate) struct Marker(String);

impl Marker {
    pub(crate) fn new() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }

    /// The same address, with the settings of our sessions and this one behind the user's own: of
    /// two values the last one holds.
    pub(super) fn added_to(&self, config: &Config) -> Config {
        let own = config.get_options().map(|options| format!("{options} ")).unwrap_or_default();
        let mut marked = config.clone();
        marked.options(format!("{own}{} -c shardmq.direct={}", session::OPTIONS, self.0));
        marked
    }

    /// Whether it is in the session that answers.
    pub(crate) async fn is_there(&self, client: &Client) -> Result<bool, Error> {
        // Whose settings the session has is not known yet.
        let session = Session::new(client, false);
        let rows = session.query(sql::IS_DIRECT, &[(&self.0, Type::TEXT)]).await?;
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }
}

/// Whether a connection was refused for its startup parameters, by whoever does not know them.
pub(super) fn refuses_options(error: &Error) -> bool {
    let refusals = [&SqlState::PROTOCOL_VIOLATION, &SqlState::FEATURE_NOT_SUPPORTED];
    error.code().is_some_and(|code| refusals.contains(&code))
}

/// The way to an address, and what is known of it.
#[derive(Debug)]
pub(crate) struct Way {
    setting: PreparedStatements,
    marker: Marker,
    pooled: AtomicBool,
}

/// A connection that a task drives.
pub(super) struct Entered {
    pub(super) client: Client,
    pub(super) task: JoinHandle<()>,
    pub(super) cut: CutWait,
    /// The number of its host in the address.
    pub(super) host: usize,
}

impl Way {
    pub(crate) fn new(setting: PreparedStatements) -> Self {
        Self { setting, marker: Marker::new(), pooled: AtomicBool::new(false) }
    }

    /// Whether statements may be kept on the connections that there are now.
    pub(crate) fn keeps_statements(&self) -> bool {
        match self.setting {
            PreparedStatements::Always => true,
            PreparedStatements::Never => false,
            PreparedStatements::Auto => !self.pooled.load(Ordering::Acquire),
        }
    }

    /// Whether the connections that there are now have our settings as their sessions' own.
    pub(crate) fn is_pinned(&self) -> bool {
        !self.pooled.load(Ordering::Acquire)
    }

    /// A connection, driven by a task, to a host that is none of these. Before it returns, it is
    /// known whether a pooler made its session.
    pub(super) async fn connect(
        &self,
        target: &Target,
        what: &str,
        older: &[Older],
    ) -> Result<Entered> {
        let marker = self.is_pinned().then_some(&self.marker);
        let Opened { client, messages, marked, host } = target.connect(what, marker, older).await?;
        let cut = CutWait::default();
        let task = tokio::spawn(drive(messages, cut.clone()));
        if let Some(marker) = marker
            && !(marked && marker.is_there(&client).await.map_err(|error| refused(error, what))?)
        {
            self.pooled.store(true, Ordering::Release);
            tracing::info!(
                address = %connect::describe(&target.config),
                "a pooler stands before the server: settings go along with each statement"
            );
        }
        Ok(Entered { client, task, cut, host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_stands_behind_the_users_own_options() {
        let marker = Marker(String::from("x"));
        let options = |url: &str| {
            let config = marker.added_to(&url.parse().unwrap());
            config.get_options().map(str::to_owned)
        };
        let ours = format!("{} -c shardmq.direct=x", session::OPTIONS);
        assert_eq!(options("postgresql://h/d").unwrap(), ours);
        assert_eq!(
            options("postgresql://h/d?options=-c%20work_mem%3D8MB").unwrap(),
            format!("-c work_mem=8MB {ours}")
        );
    }

    #[test]
    fn a_setting_of_the_user_needs_no_finding_out() {
        assert!(Way::new(PreparedStatements::Always).keeps_statements());
        assert!(!Way::new(PreparedStatements::Never).keeps_statements());
        assert!(Way::new(PreparedStatements::Auto).keeps_statements());
    }
}
