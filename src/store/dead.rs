//! Dead letters.

use std::time::SystemTime;

use tokio_postgres::Row;

use crate::failure::FailedAttempt;
use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::failures::{self, Under};
use crate::store::fetch::Batch;
use crate::store::group::Moved;
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
    Ok(query_one(connection, sql::NODE_CLOCK, &[]).await?.try_get(0)?)
}

/// Messages of one row that can't be read.
#[derive(Debug)]
pub(crate) struct Unread<'a> {
    pub(crate) under: Under,
    pub(crate) row: &'a Batch,
    /// The first that was not read before; all that follow are of these.
    pub(crate) from: i64,
    pub(crate) why: &'a FailedAttempt,
}

/// Records messages as dead letters without payload, and acknowledges them with that.
pub(crate) async fn put_unread(
    connection: Connection,
    (topic, group): (&TopicName, &GroupName),
    unread: &Unread<'_>,
) -> Result<Moved, Failed> {
    let Unread { under, row, from, why } = unread;
    let (topic, group) = (topic.as_str(), group.as_str());
    let failures = failures::json(std::slice::from_ref(*why));
    let params: [&dyn Param; 14] = [
        &group,
        &topic,
        &under.partition.as_i32(),
        &under.fence.owner,
        &under.fence.epoch,
        &under.fence.reset_epoch,
        &under.incarnation,
        from,
        &row.last_id(),
        &row.base_id,
        &row.producer,
        &row.sequence,
        &row.appended_at,
        &failures,
    ];
    let rows = write(connection, Durability::Durable, sql::PUT_UNREAD, &params).await?;
    let outcome = rows.first().map(|row| row.try_get(0)).transpose()?;
    Ok(outcome.map_or(Moved::LeaseLost, Moved::named))
}

/// How many of those that died until a time have no payload.
pub(crate) async fn count_unread(
    connection: &Connection,
    chosen: &Chosen,
    died_until: SystemTime,
) -> Result<i64, Failed> {
    let Chosen { ids, topic, group, partition, error } = chosen;
    let params: [&dyn Param; 6] = [ids, topic, group, partition, error, &died_until];
    Ok(query_one(connection, sql::DEAD_LETTERS_UNREAD, &params).await?.try_get(0)?)
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
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect()
}
