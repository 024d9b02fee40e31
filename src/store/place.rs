//! Which database of which server a control database or a node is. A physical standby is the same
//! as its primary, and so is one that was promoted; what was restored from a dump is not, though it
//! says the same of itself.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Error, Row};
use uuid::Uuid;

use crate::error::{self, ErrorKind};
use crate::id::NodeId;
use crate::migrate::{self, Schema};
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::node::{Connection, query_one};
use crate::store::session::Session;
use crate::store::sql;

/// Where a database was last known to be, and where it is; none where that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) known: Option<String>,
    pub(crate) here: Option<String>,
}

impl Place {
    pub(crate) fn is_copy(&self) -> bool {
        self.known.is_some() && self.here.is_some() && self.known != self.here
    }

    /// Refuses a copy of `what`: both would be taken for the same.
    pub(crate) fn refuse_copy(&self, what: &str) -> error::Result<()> {
        if !self.is_copy() {
            return Ok(());
        }
        let what = format!(
            "{what} was copied from another server, as by pg_dump: `shardmq cluster adopt` makes a copy a cluster \
             of its own, with nodes of its own; where the original is gone and has moved here, `shardmq cluster \
             moved` says so"
        );
        Err(error::Error::new(ErrorKind::Conflict, what))
    }
}

/// Of a control database, with the cluster's id.
pub(crate) async fn of_control(session: Session<'_>) -> Result<Option<(Uuid, Place)>, Error> {
    match session.query(sql::CONTROL_SERVER, &[]).await {
        Ok(rows) => {
            let read = |row: &Row| (row.get(0), Place { known: row.get(1), here: row.get(2) });
            Ok(rows.first().map(read))
        }
        Err(error) if is_forbidden(&error) => {
            let rows = session.query(sql::CONTROL_CLUSTER, &[]).await?;
            Ok(rows.first().map(|row| (row.get(0), Place { known: None, here: None })))
        }
        Err(error) => Err(error),
    }
}

/// Of a node, with the cluster that it is of, and its number there; none before it was registered.
pub(crate) async fn of_node(session: Session<'_>) -> Result<Option<(Uuid, i32, Place)>, Error> {
    match session.query(sql::IDENTITY_HERE, &[]).await {
        Ok(rows) => {
            let read =
                |row: &Row| (row.get(0), row.get(1), Place { known: row.get(2), here: row.get(3) });
            Ok(rows.first().map(read))
        }
        Err(error) if is_forbidden(&error) => {
            let rows = session.query(sql::IDENTITY, &[]).await?;
            let read = |row: &Row| (row.get(0), row.get(1), Place { known: None, here: None });
            Ok(rows.first().map(read))
        }
        Err(error) => Err(error),
    }
}

/// Where this database is; none where its role may not know.
pub(crate) async fn here_by(connection: &Connection) -> Result<Option<String>, Failed> {
    match query_one(connection, sql::ORIGIN, &[]).await {
        Ok(row) => Ok(row.get(0)),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Refuses a control database that is a copy of one.
pub(super) async fn check_control(session: Session<'_>) -> error::Result<()> {
    migrate::check(session, Schema::Control).await?;
    let found = of_control(session).await;
    let found = found.map_err(|error| refused(error, "ask the control database which it is"))?;
    found.map_or(Ok(()), |(_, place)| place.refuse_copy("the control database"))
}

/// Refuses a database that is not this cluster's node of this number.
pub(super) async fn check_node(
    session: Session<'_>,
    cluster: Uuid,
    id: NodeId,
) -> error::Result<()> {
    migrate::check(session, Schema::Node).await?;
    let what = format!("ask node {id} who it is");
    let found = of_node(session).await.map_err(|error| refused(error, &what))?;
    match found {
        Some((uuid, number, place)) if uuid == cluster && number == i32::from(id.number()) => {
            place.refuse_copy(&format!("node {id}"))
        }
        Some((uuid, number, _)) => Err(error::Error::new(
            ErrorKind::Conflict,
            format!(
                "the address of node {id} of cluster {cluster} leads to node {number:02} of \
                 cluster {uuid}"
            ),
        )),
        None => Err(error::Error::new(
            ErrorKind::Conflict,
            format!("the address of node {id} leads to a database that is not a node yet"),
        )),
    }
}

fn is_forbidden(error: &Error) -> bool {
    error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)
}
