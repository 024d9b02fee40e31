//! Why a statement has no result, and a wait for a standby that was cut short.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_postgres::error::{DbError, SqlState};

/// Why a statement has no result that counts.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The server's error, or that of the connection.
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    /// The server committed, but somebody cancelled its wait for a standby: a failover may still
    /// lose the commit, so nobody may count on it.
    #[error("the commit's wait for a standby was cancelled, so a failover may still lose it")]
    Unconfirmed,
    /// The answer came from an older primary than is known: what it did there may be lost with it.
    #[error("an older primary has answered, and a newer one is known: what it did may be lost")]
    Outdated,
    /// Nothing was sent: the commits of all of this pool's connections hang.
    #[error(
        "all connections of this process wait for their commits, as where a standby is away that Postgres \
         waits for"
    )]
    NoPlace,
}

impl Failed {
    /// The server's code, where it sent one.
    pub(crate) fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Postgres(error) => error.code(),
            Self::Unconfirmed | Self::Outdated | Self::NoPlace => None,
        }
    }

    /// What the server sent.
    pub(crate) fn as_db_error(&self) -> Option<&DbError> {
        match self {
            Self::Postgres(error) => error.as_db_error(),
            Self::Unconfirmed | Self::Outdated | Self::NoPlace => None,
        }
    }
}

/// Whether a commit on a connection ended before the standby had it. Postgres answers such a commit
/// with success, and says so in a notice before.
#[derive(Debug, Clone, Default)]
pub(crate) struct CutWait(Arc<AtomicBool>);

impl CutWait {
    /// Takes note of a notice. The routine's name tells, in whatever language the server speaks.
    pub(super) fn note(&self, notice: &DbError) {
        if notice.routine() == Some("SyncRepWaitForLSN") {
            tracing::warn!(
                alert = "standby_wait_cancelled",
                "a commit's wait for a standby was cancelled on the server: what was committed is asked \
                 for again"
            );
            self.0.store(true, Ordering::Release);
        }
    }

    /// Whether that happened on this connection. It is of no use any more then.
    pub(super) fn is_noted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
