//! Appending messages that have dedup keys: each key is stored once.
//!
//! ```text
//! begin ─ one statement (lock, look for the keys, append what is new) ─ commit
//! ```
//!
//! The same where statements are kept prepared and where they are not: the function takes the lock
//! itself, when all of the batch has arrived.

use std::time::Duration;

use futures_util::future::join3;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::{
    Again, Append, Each, FIRST_WAIT, Failure, check_begun, lock_timeout, prepared, read_again,
    to_append,
};
use crate::deadline::with_bytes;
use crate::id::MessageId;
use crate::store::node::Connection;
use crate::store::sql;

/// Appends the messages of a batch whose dedup keys are new, and says where all of them are. May be
/// repeated, with another sequence, whatever became of it. The first attempt waits for the
/// partition's lock as long as those of other batches do.
pub(crate) async fn append_once(
    connection: Connection,
    batch: &Append<'_>,
    deadline: Duration,
    is_first: bool,
) -> Result<Again, Failure> {
    let (guard, kept) = if connection.keeps_statements() {
        let texts = [sql::APPEND_ONCE.to_owned()];
        let (guard, statements) = prepared(connection, &texts, deadline).await?;
        (guard, statements.into_iter().next())
    } else {
        (to_append(connection)?, None)
    };
    let connection = guard.connection();
    let wait = lock_timeout(if is_first { deadline.min(FIRST_WAIT) } else { deadline });
    let opening = format!("{}; set local lock_timeout = '{wait}'", sql::BEGIN_DURABLE);
    let (partition, day) = (batch.partition.as_i32(), batch.day.as_i32());
    let params = params(batch, &partition, &day);
    let call = async {
        match &kept {
            Some(statement) => {
                connection
                    .query_prepared(statement, &params.each_ref().map(|(value, _)| *value))
                    .await
            }
            None => connection.query_typed(sql::APPEND_ONCE, &params).await,
        }
    };
    // Each sends as it is polled for the first time, in this order.
    let pipeline = join3(connection.batch_execute(&opening), call, connection.commit());
    let limit = with_bytes(deadline, batch.arrays.bytes);
    let Ok((begun, rows, committed)) = timeout(limit, pipeline).await else {
        return Err(Failure::Unknown(None));
    };
    guard.finished();
    check_begun(begun, &rows)?;
    let rows = rows.map_err(Failure::of)?;
    committed.map_err(Failure::of_commit)?;
    Ok(read(rows.first(), batch.arrays.count))
}

type Value<'a> = (&'a (dyn ToSql + Sync), Type);

fn params<'a>(batch: &'a Append<'_>, partition: &'a i32, day: &'a i32) -> [Value<'a>; 10] {
    let arrays = batch.arrays;
    [
        (partition, Type::INT4),
        (&batch.topic_id, Type::UUID),
        (&batch.generation, Type::INT4),
        (day, Type::INT4),
        (&batch.producer, Type::UUID),
        (&batch.sequence, Type::INT8),
        (&arrays.keys, Type::TEXT_ARRAY),
        (&arrays.headers, Type::JSONB_ARRAY),
        (&arrays.payloads, Type::BYTEA_ARRAY),
        (&arrays.dedup_keys, Type::TEXT_ARRAY),
    ]
}

fn read(row: Option<&Row>, count: i32) -> Again {
    let stored = row.filter(|row| matches!(row.get(0), "appended" | "duplicate"));
    let Some(row) = stored else {
        return read_again(row);
    };
    let ids: Vec<Option<i64>> = row.get::<_, Option<_>>(1).unwrap_or_default();
    let ids = ids.into_iter().flatten().filter_map(|id| MessageId::try_from(id).ok());
    let ids: Vec<_> = ids.collect();
    // A message without an id is not known to be stored.
    if ids.len() != count.unsigned_abs() as usize {
        return Again::Refused;
    }
    let base: Option<i64> = row.get(4);
    Again::Each(Each { ids, first_new: base.and_then(|id| MessageId::try_from(id).ok()) })
}
