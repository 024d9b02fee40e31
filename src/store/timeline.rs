//! Which primary of a server is the newest. Each promotion of a standby begins a timeline with a
//! higher number, and an old primary that wakes up, or is started again, keeps its own: it takes
//! writes, which nobody will see.
//!
//! ```text
//! a new connection: timeline ── lower than what is known ─> closed, the next host
//!                      │
//!                      └─ higher ─> known from now on: no connection with a lower one is used on, and what
//!                                   it still answers does not count
//! ```
//!
//! Timelines are compared under one system identifier only, which standbys share with their
//! primary. A server that does not tell its timeline is compared with nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_postgres::error::Severity;
use tokio_postgres::{Error, Row};

use crate::store::session::Session;
use crate::store::sql;

/// A primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Primary {
    /// The system identifier of its server.
    pub(crate) system: i64,
    pub(crate) timeline: i64,
}

impl Primary {
    pub(crate) fn is_older_than(&self, other: &Self) -> bool {
        self.system == other.system && self.timeline < other.timeline
    }

    /// Of two columns, from this one on; none where the server does not tell, or is a standby.
    pub(super) fn of(row: &Row, column: usize) -> Option<Self> {
        let number = |column| row.get::<_, Option<i64>>(column);
        Some(Self { system: number(column)?, timeline: number(column + 1)? })
    }
}

/// Which primary a session is on; none where it is a standby, or its role may not know.
pub(super) async fn primary(session: Session<'_>) -> Result<Option<Primary>, Error> {
    match session.query(sql::PRIMARY, &[]).await {
        Ok(rows) => Ok(rows.first().and_then(|row| Primary::of(row, 0))),
        Err(error) if is_untold(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a server does not tell which primary it is: it has no such functions, or not for this
/// role.
pub(super) fn is_untold(error: &Error) -> bool {
    let Some(answer) = error.as_db_error() else { return false };
    let class = answer.code().code().get(..2).unwrap_or_default();
    // Not where it is in trouble: it is too full, shuts down, or has a broken disk.
    answer.parsed_severity() == Some(Severity::Error) && !["53", "57", "58"].contains(&class)
}

/// The newest primary of a database that this process knows of.
#[derive(Debug)]
pub(crate) struct Newest {
    known: watch::Sender<Option<Primary>>,
    /// Its timeline, looked at with each answer; the least that there is while none is known.
    timeline: AtomicI64,
    node: Option<OfNode>,
}

/// Where news of a node's newer primary goes.
#[derive(Debug)]
struct OfNode {
    /// Told when one was seen.
    seen: Arc<Notify>,
    /// That of the control database, where it is on the same server.
    control: Option<Arc<Newest>>,
}

impl Default for Newest {
    fn default() -> Self {
        Self { known: watch::Sender::new(None), timeline: AtomicI64::new(i64::MIN), node: None }
    }
}

impl Newest {
    /// Of a node, with what is known from the control database, and with the newest primary of that
    /// where both have the same hosts. A system identifier alone would not do: servers that were
    /// made from one image have the same.
    pub(crate) fn of_node(
        listed: Option<Primary>,
        seen: Arc<Notify>,
        control: Option<Arc<Self>>,
    ) -> Self {
        let newest = Self { node: Some(OfNode { seen, control }), ..Self::default() };
        if let Some(listed) = listed {
            newest.hear(listed);
        }
        newest
    }

    pub(crate) fn known(&self) -> Option<Primary> {
        *self.known.borrow()
    }

    /// A connection that was looked at leads to this primary, or a look has found it.
    pub(crate) fn see(&self, primary: Primary) {
        let is_news = self.take(primary, |known| {
            known
                .is_none_or(|known| known.system != primary.system || known.is_older_than(&primary))
        });
        if let (true, Some(node)) = (is_news, &self.node) {
            node.seen.notify_one();
        }
    }

    /// Another process has seen this primary.
    pub(crate) fn hear(&self, primary: Primary) {
        self.take(primary, |known| known.is_none_or(|known| known.is_older_than(&primary)));
    }

    fn take(&self, primary: Primary, is_news: impl Fn(Option<Primary>) -> bool) -> bool {
        let taken = self.known.send_if_modified(|known| {
            let taken = is_news(*known);
            if taken {
                *known = Some(primary);
                self.timeline.store(primary.timeline, Ordering::Release);
            }
            taken
        });
        if let (true, Some(OfNode { control: Some(control), .. })) = (taken, &self.node) {
            control.shares(primary);
        }
        taken
    }

    /// A database that is on the same server has this primary.
    fn shares(&self, primary: Primary) {
        self.take(primary, |known| known.is_some_and(|known| known.is_older_than(&primary)));
    }

    /// The newest primary, where that is a newer one than this.
    pub(crate) fn newer_than(&self, primary: Option<Primary>) -> Option<Primary> {
        let primary = primary?;
        if primary.timeline >= self.timeline.load(Ordering::Acquire) {
            return None;
        }
        self.known().filter(|known| primary.is_older_than(known))
    }

    /// Returns when a newer primary than this is known. Cancel safe.
    pub(crate) async fn overtakes(&self, primary: Option<Primary>) {
        let mut known = self.known.subscribe();
        loop {
            if self.newer_than(primary).is_some() {
                return;
            }
            // The sender lives as long as this.
            let _ = known.changed().await;
        }
    }

    /// Why a connection to an older primary is not used.
    pub(super) fn refusal(&self, older: Option<Primary>, newest: Primary) -> String {
        let (older, newest) = (older.map_or(0, |older| older.timeline), newest.timeline);
        let meant = match self.node {
            Some(_) => "`shardmq node add` says so",
            None => "restart this process",
        };
        format!(
            "it is an older primary: it has timeline {older} where {newest} is known; stop it, or where it is meant, \
             as after a restore from a backup, {meant}"
        )
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn on(system: i64, timeline: i64) -> Primary {
        Primary { system, timeline }
    }

    fn is_outdated(newest: &Newest, primary: Primary) -> bool {
        newest.newer_than(Some(primary)).is_some()
    }

    #[test]
    fn of_one_server_the_highest_timeline_holds() {
        let newest = Newest::default();
        assert_eq!(newest.newer_than(Some(on(1, 1))), None);
        for timeline in [1, 3, 2] {
            newest.see(on(1, timeline));
        }
        assert_eq!(newest.known(), Some(on(1, 3)));
        assert!(is_outdated(&newest, on(1, 2)) && !is_outdated(&newest, on(1, 3)));
        assert!(!is_outdated(&newest, on(2, 1)) && newest.newer_than(None).is_none());
    }

    #[test]
    fn another_server_is_taken_over_where_a_connection_leads_there_and_not_by_hearsay() {
        let newest = Newest::default();
        newest.see(on(1, 7));
        newest.hear(on(2, 9));
        assert_eq!(newest.known(), Some(on(1, 7)));
        newest.see(on(2, 1));
        assert_eq!(newest.known(), Some(on(2, 1)));
        assert!(!is_outdated(&newest, on(1, 1)));
    }

    #[tokio::test]
    async fn what_was_seen_is_told_and_what_was_heard_is_not() {
        let seen = Arc::new(Notify::new());
        let newest = Newest::of_node(Some(on(1, 1)), Arc::clone(&seen), None);
        newest.hear(on(1, 2));
        newest.see(on(1, 2));
        assert!(seen.notified().now_or_never().is_none());
        newest.see(on(1, 3));
        assert!(seen.notified().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_control_database_on_the_same_server_shares_what_is_known() {
        let control = Arc::new(Newest::default());
        let newest = Newest::of_node(None, Arc::default(), Some(Arc::clone(&control)));
        newest.see(on(1, 2));
        assert_eq!(control.known(), None);
        control.see(on(1, 1));
        let mut overtaken = Box::pin(control.overtakes(Some(on(1, 1))));
        assert!((&mut overtaken).now_or_never().is_none());
        newest.see(on(1, 3));
        assert!((&mut overtaken).now_or_never().is_some());
        assert!(is_outdated(&control, on(1, 2)));
    }
}
