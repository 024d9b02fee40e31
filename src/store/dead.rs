//! Dead letters.

use std::time::SystemTime;

use tokio_postgres::Row;

use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, query, query_one, write};
use crate::store::param::Param;
use crate::store::sql;

/// Which of a node: those that meet every condition that is set.
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub(crate) ids: Option<Vec<i64>>,
    pub(crate) topic: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) partition: Option<i32>,
    /// Text in the last error.
    pub(crate) error: Option<String>,
}

/// What is done with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Retry,
    Drop,
}

/// The node's time.
pub(crate) async fn clock(connection: &Connection) -> Result<SystemTime, Failed> {
    query_one(connection, sql::NODE_CLOCK, &[]).await.map(|row| row.get(0))
}

/// Letters by number, behind one: at most so many, and over the first so many bytes.
pub(crate) async fn list(
    connection: &Connection,
    chosen: &Chosen,
    (after, most, bytes): (i64, i32, i64),
) -> Result<Vec<Row>, Failed> {
    let Chosen { ids, topic, group, partition, error } = chosen;
    let params: [&dyn Param; 8] = [ids, topic, group, partition, error, &after, &most, &bytes];
    query(connection, sql::DEAD_LETTERS, &params).await
}

/// Gives up to so many to their groups again, or drops them: topic, group and how many of each.
pub(crate) async fn portion(
    connection: Connection,
    what: What,
    chosen: &Chosen,
    died_until: SystemTime,
    most: i32,
) -> Result<Vec<(String, String, i64)>, Failed> {
    let statement = match what {
        What::Retry => sql::DEAD_LETTER_RETRY,
        What::Drop => sql::DEAD_LETTER_DROP,
    };
    let Chosen { ids, topic, group, partition, error } = chosen;
    let params: [&dyn Param; 7] = [ids, topic, group, partition, error, &died_until, &most];
    let rows = write(connection, Durability::Durable, statement, &params).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}
