//! Appending where no statement is kept prepared: behind a pooler that shares its server
//! connections. Large batches go this way too, wherever they go.
//!
//! ```text
//! begin ─ one statement (lock, append, lock, append, ..) ─ commit
//! ```
//!
//! The inserts of the pipeline would be parsed here under the lock, and nothing ends a server's
//! wait for the rest of a statement that it has begun to parse: a client that falls silent in the
//! middle of a large batch would keep the partition. So the statement that brings the batches takes
//! the locks itself, when all of it has arrived.

use std::time::Duration;

use futures_util::future::join3;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::{
    Again, Append, Culprit, FIRST_WAIT, Failure, Inserted, bytes_of, check_begun, lock_timeout,
    read_again, to_append,
};
use crate::deadline::with_bytes;
use crate::id::MessageId;
use crate::store::node::Connection;
use crate::store::sql;

/// Appends batches of different partitions in one transaction, waiting for the lock of the first
/// only.
pub(super) async fn append(
    connection: Connection,
    batches: &[Append<'_>],
    deadline: Duration,
) -> Result<Vec<Inserted>, Failure> {
    let wait = lock_timeout(deadline.min(FIRST_WAIT));
    let rows = call(connection, batches, &wait, deadline).await;
    let rows = rows.map_err(|failure| blamed(failure, batches))?;
    let outcome = |batch: &Append<'_>| {
        let of = |row: &&Row| row.get::<_, i32>(4) == batch.partition.as_i32();
        rows.iter().find(of).map_or(Inserted::No, inserted)
    };
    Ok(batches.iter().map(outcome).collect())
}

/// The failure with its culprit: the server says in which statement it waited. The lock of the
/// first partition is taken outside of any function.
fn blamed(failure: Failure, batches: &[Append<'_>]) -> Failure {
    let Failure::Locked(error, _) = failure else {
        return failure;
    };
    let place = error.as_db_error().and_then(|answer| answer.where_()).unwrap_or_default();
    let names = |batch: &Append<'_>| place.contains(&format!("batch_{}_", batch.partition));
    let culprit = match batches.iter().position(names) {
        Some(nth) => Culprit::Batch(nth),
        None if place.is_empty() => Culprit::Batch(0),
        None => Culprit::Unknown,
    };
    Failure::Locked(error, culprit)
}

fn inserted(row: &Row) -> Inserted {
    match row.get(0) {
        None => Inserted::NotHeld,
        Some("appended" | "duplicate") => row
            .get::<_, Option<i64>>(1)
            .and_then(|id| MessageId::try_from(id).ok())
            .map_or(Inserted::No, Inserted::At),
        Some(_) => Inserted::No,
    }
}

/// Finds a batch, inserts it or says why not, as [`append_again`](super::append_again) does.
pub(super) async fn append_again(
    connection: Connection,
    batch: &Append<'_>,
    deadline: Duration,
) -> Result<Again, Failure> {
    let wait = lock_timeout(deadline);
    let rows = call(connection, std::slice::from_ref(batch), &wait, deadline).await?;
    Ok(read_again(rows.first()))
}

async fn call(
    connection: Connection,
    batches: &[Append<'_>],
    lock_timeout: &str,
    deadline: Duration,
) -> Result<Vec<Row>, Failure> {
    let guard = to_append(connection)?;
    let connection = guard.connection();
    let opening = format!("{}; set local lock_timeout = '{lock_timeout}'", sql::BEGIN_DURABLE);
    let parts: Vec<Part<'_>> =
        batches.iter().enumerate().map(|(nth, batch)| Part::new(batch, nth == 0)).collect();
    let params: Vec<_> = parts.iter().flat_map(Part::params).collect();
    let text = text_of(parts.len());
    // Each sends as it is polled for the first time, in this order.
    let pipeline = join3(
        connection.batch_execute(&opening),
        connection.query_typed(&text, &params),
        connection.commit(),
    );
    let limit = with_bytes(deadline, bytes_of(batches));
    let Ok((begun, rows, committed)) = timeout(limit, pipeline).await else {
        return Err(Failure::Unknown(None));
    };
    guard.finished();
    check_begun(begun, &rows)?;
    let rows = rows.map_err(Failure::of)?;
    committed.map_err(Failure::of_commit)?;
    Ok(rows)
}

/// The parameters of a part.
const PARAMS: usize = 12;

/// The statement for so many batches, without its comment: it is sent each time.
fn text_of(parts: usize) -> String {
    let lines = sql::APPEND_FUNCTION.lines().filter(|line| !line.starts_with("--"));
    let part = lines.collect::<Vec<_>>().join("\n");
    let parts: Vec<String> = (0..parts).map(|nth| renumbered(&part, nth * PARAMS)).collect();
    parts.join("\nunion all\n")
}

/// A statement with its parameters numbered on.
fn renumbered(text: &str, by: usize) -> String {
    let renumber = |piece: &str| {
        let end = piece.find(|c: char| !c.is_ascii_digit()).unwrap_or(piece.len());
        let (number, rest) = piece.split_at(end);
        number.parse::<usize>().map_or_else(|_| piece.to_owned(), |n| format!("{}{rest}", n + by))
    };
    let mut pieces = text.split('$');
    let first = pieces.next().unwrap_or_default().to_owned();
    let renumbered: Vec<String> = std::iter::once(first).chain(pieces.map(renumber)).collect();
    renumbered.join("$")
}

/// A batch as parameters.
struct Part<'a> {
    partition: i32,
    day: i32,
    first_day: i32,
    waits: bool,
    batch: &'a Append<'a>,
}

impl<'a> Part<'a> {
    fn new(batch: &'a Append<'a>, waits: bool) -> Self {
        Self {
            partition: batch.partition.as_i32(),
            day: batch.day.as_i32(),
            first_day: batch.first_day.as_i32(),
            waits,
            batch,
        }
    }

    fn params(&self) -> [(&(dyn ToSql + Sync), Type); PARAMS] {
        let arrays = self.batch.arrays;
        [
            (&self.partition, Type::INT4),
            (&self.batch.topic_id, Type::UUID),
            (&self.batch.generation, Type::INT4),
            (&self.day, Type::INT4),
            (&self.first_day, Type::INT4),
            (&self.batch.producer, Type::UUID),
            (&self.batch.sequence, Type::INT8),
            (&arrays.bytes, Type::INT4),
            (&arrays.keys, Type::TEXT_ARRAY),
            (&arrays.headers, Type::JSONB_ARRAY),
            (&arrays.payloads, Type::BYTEA_ARRAY),
            (&self.waits, Type::BOOL),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_numbered_on() {
        assert_eq!(renumbered("f($1, $12::int) + $1", 12), "f($13, $24::int) + $13");
        assert_eq!(renumbered("no parameter", 12), "no parameter");
        let text = text_of(16);
        assert!(text.contains("$192") && !text.contains("$193"));
        assert_eq!(text.matches("union all").count(), 15);
        assert!(!text.contains("--"));
    }
}
