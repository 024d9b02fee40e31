//! Appending batches: one round trip, one short transaction, one pipeline.
//!
//! ```text
//! begin ─ lock statement ─ insert (10101) ─ insert (10102) ─ .. ─ commit
//! ```
//!
//! All statements are queued in one synchronous step, in this order, on one connection. A batch is
//! appended only if its insert returned a `base_id` *and* every statement, the commit included, was
//! answered without an error: the commit after a failed statement is answered ROLLBACK, without
//! one.
//!
//! Where no statement can be kept prepared, [`function`] takes the place of the pipeline. Messages
//! with dedup keys go by [`once`].

use std::time::Duration;

use futures_util::future::{join_all, join4};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Row, Statement};
use uuid::Uuid;

use crate::deadline::with_bytes;
use crate::error::{Error, ErrorKind};
use crate::id::{Day, MessageId, NodeId, PartitionId};
use crate::store::connect::{is_data_error, is_definite, refused};
use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, Unfinished, write};
use crate::store::packed::Packed;
use crate::store::param::Param;
use crate::store::sql;

mod days;
mod function;
mod once;

pub(crate) use days::{Rolled, days, make_days_ahead, roll};
pub(crate) use once::append_once;

/// The most partitions that one commit carries.
pub(crate) const MAX_PARTITIONS: usize = 16;
/// How long a first attempt waits for its first lock at most: the other batches of its transaction
/// wait with it.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The bytes from which on a batch takes its partition's lock when all of it has arrived.
const LARGE: i32 = 2 << 20;
/// How long other short transactions may take.
const SHORT: Duration = Duration::from_secs(6);

/// The arrays of a batch.
#[derive(Debug, Default, Clone)]
pub(crate) struct Arrays {
    pub(crate) count: i32,
    /// Uncompressed bytes of payloads, keys and headers.
    pub(crate) bytes: i32,
    pub(crate) keys: Option<Packed>,
    pub(crate) headers: Option<Packed>,
    pub(crate) payloads: Packed,
    /// Of a batch that goes by [`append_once`]: one for each message.
    pub(crate) dedup_keys: Option<Packed>,
}

/// A batch and what its client believes of its partition.
#[derive(Debug, Clone)]
pub(crate) struct Append<'a> {
    pub(crate) partition: PartitionId,
    pub(crate) topic_id: Uuid,
    pub(crate) generation: i32,
    pub(crate) day: Day,
    /// The earliest day that an attempt has named: where a repeat looks from.
    pub(crate) first_day: Day,
    /// The latest day that an attempt has named: until when a fence is kept.
    pub(crate) latest_day: Day,
    pub(crate) producer: Uuid,
    pub(crate) sequence: i64,
    pub(crate) arrays: &'a Arrays,
}

/// What became of a transaction that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A day table is missing: the partition must be rolled. Nothing was stored.
    #[error("the day table is missing")]
    NoTable,
    /// The server refused the data itself. Nothing was stored.
    #[error("the server refused the data")]
    Data(#[source] Failed),
    /// A lock was not to be had in time: a partition's, or that of its day table. Nothing was
    /// stored.
    #[error("a lock of the partition was not to be had")]
    Locked(#[source] Failed, Culprit),
    /// The server refused, for another reason. Nothing was stored.
    #[error("the server refused")]
    Refused(#[source] Failed),
    /// No answer came in time, but what would store something had not been sent yet.
    #[error("silence")]
    Silent,
    /// The connection failed, or no answer came in time: all may have been stored, or may be yet.
    #[error("no answer")]
    Unknown(#[source] Option<Failed>),
}

impl Failure {
    fn of(error: Failed) -> Self {
        if !is_definite(&error) {
            return Self::Unknown(Some(error));
        }
        match error.code() {
            Some(&SqlState::UNDEFINED_TABLE) => Self::NoTable,
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) => {
                Self::Locked(error, Culprit::Batch(0))
            }
            _ if is_data_error(&error) => Self::Data(error),
            _ => Self::Refused(error),
        }
    }

    /// The same failure, of a statement for the batch in this place.
    fn at(self, nth: usize) -> Self {
        match self {
            Self::Locked(error, _) => Self::Locked(error, Culprit::Batch(nth)),
            failure => failure,
        }
    }

    /// Of a statement that is asked outside of the pipeline, so that nothing was stored.
    fn before(error: Failed) -> Self {
        match Self::of(error) {
            Self::Unknown(Some(error)) => Self::Refused(error),
            failure => failure,
        }
    }

    /// Of a commit. Only an error of a deferred constraint tells that nothing was stored.
    fn of_commit(error: Failed) -> Self {
        if is_definite(&error) && is_data_error(&error) {
            Self::Data(error)
        } else {
            Self::Unknown(Some(error))
        }
    }

    /// The public error, in the words of what was being done.
    pub(crate) fn into_error(self, what: &str) -> Error {
        match self {
            Self::Data(error) | Self::Locked(error, _) | Self::Refused(error) => {
                refused(error, what)
            }
            Self::Unknown(Some(error)) => Error::with_source(ErrorKind::Unknown, what, error),
            Self::Unknown(None) => {
                Error::new(ErrorKind::Unknown, format!("{what}: no answer in time"))
            }
            Self::Silent => {
                Error::new(ErrorKind::Unavailable, format!("{what}: the server is silent"))
            }
            Self::NoTable => Error::new(ErrorKind::Unavailable, format!("{what}: no day table")),
        }
    }
}

/// Which batch of a transaction waited in vain for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Culprit {
    /// The one in this place.
    Batch(usize),
    /// Some batch: the server did not say which.
    Unknown,
}

/// What became of one batch of a transaction that was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// On disk, with this first id.
    At(MessageId),
    /// Its partition's lock was another's: to be sent in the next transaction.
    NotHeld,
    /// The guards did not hold: [`append_again`] says which.
    No,
}

/// Appends batches of different partitions of one node in one transaction, waiting for the lock of
/// the first only. The outer result tells whether the transaction was committed. The deadline is
/// that of a transaction without bytes: it grows with what is sent.
///
/// Dropping the future closes the connection: the batches' fate is unknown then.
pub(crate) async fn append(
    connection: Connection,
    batches: &[Append<'_>],
    deadline: Duration,
) -> Result<Vec<Inserted>, Failure> {
    if !connection.keeps_statements() || is_large(batches) {
        return function::append(connection, batches, deadline).await;
    }
    let mut texts = vec![sql::APPEND_LOCK.to_owned()];
    let insert = |b: &Append<'_>| sql::for_day(sql::APPEND_INSERT, b.partition, b.day);
    texts.extend(batches.iter().map(insert));
    let (guard, statements) = prepared(connection, &texts, deadline).await?;
    let [lock, inserts @ ..] = statements.as_slice() else {
        return Err(Failure::NoTable);
    };
    let pipeline = pipeline(guard.connection(), lock, inserts, batches, deadline);
    let Ok(answers) = timeout(with_bytes(deadline, bytes_of(batches)), pipeline).await else {
        return Err(Failure::Unknown(None));
    };
    guard.finished();
    answers
}

/// A connection on which batches may be committed.
fn to_append(connection: Connection) -> Result<Unfinished, Failure> {
    Unfinished::to_commit(connection, Durability::Durable).map_err(Failure::before)
}

/// Prepares statements before the transaction begins: a statement that is parsed inside of it would
/// keep the idle timeout from ending it. A connection that does not answer is closed.
async fn prepared(
    connection: Connection,
    texts: &[String],
    deadline: Duration,
) -> Result<(Unfinished, Vec<Statement>), Failure> {
    let guard = to_append(connection)?;
    let prepare = async {
        let mut statements = Vec::with_capacity(texts.len());
        for (nth, text) in texts.iter().enumerate() {
            // The first is that of the locks. To prepare an insert waits for a lock of its day
            // table.
            let kept = guard.connection().prepare(text).await;
            statements
                .push(kept.map_err(|error| Failure::before(error).at(nth.saturating_sub(1)))?);
        }
        Ok(statements)
    };
    let outcome = timeout(deadline, prepare).await;
    match outcome.map_err(|_| Failure::Silent)? {
        Ok(statements) => Ok((guard, statements)),
        Err(error) => {
            guard.finished();
            Err(error)
        }
    }
}

async fn pipeline(
    connection: &Connection,
    lock: &Statement,
    inserts: &[Statement],
    batches: &[Append<'_>],
    deadline: Duration,
) -> Result<Vec<Inserted>, Failure> {
    let number = |batch: &Append<'_>| batch.partition.as_i32();
    let partitions: Vec<i32> = batches.iter().map(number).collect();
    let wait = lock_timeout(deadline.min(FIRST_WAIT));
    let inserts =
        batches.iter().zip(inserts).map(|(batch, statement)| insert(connection, statement, batch));
    // Each sends as it is polled for the first time, in this order.
    let (begun, locked, inserted, committed) = join4(
        connection.batch_execute(sql::APPEND_BEGIN),
        connection.query_prepared(lock, &[&partitions, &wait]),
        join_all(inserts),
        connection.commit(),
    )
    .await;
    begun.map_err(Failure::of)?;
    let held: Option<String> = locked.map_err(Failure::of)?.first().and_then(|row| row.get(4));
    let rows: Vec<Vec<Row>> =
        inserted.into_iter().enumerate().map(of_nth).collect::<Result<_, _>>()?;
    committed.map_err(Failure::of_commit)?;
    Ok(rows
        .into_iter()
        .zip(batches)
        .map(|(rows, batch)| outcome(rows.first(), batch, held.as_deref()))
        .collect())
}

/// The rows of the insert in this place. The first that failed is the culprit: after it all do.
fn of_nth((nth, rows): (usize, Result<Vec<Row>, Failed>)) -> Result<Vec<Row>, Failure> {
    rows.map_err(|error| Failure::of(error).at(nth))
}

async fn insert(
    connection: &Connection,
    statement: &Statement,
    batch: &Append<'_>,
) -> Result<Vec<Row>, Failed> {
    let arrays = batch.arrays;
    connection
        .query_prepared(
            statement,
            &[
                &arrays.count,
                &arrays.bytes,
                &batch.producer,
                &batch.sequence,
                &arrays.keys,
                &arrays.headers,
                &arrays.payloads,
                &batch.topic_id,
                &batch.generation,
            ],
        )
        .await
}

fn outcome(row: Option<&Row>, batch: &Append<'_>, held: Option<&str>) -> Inserted {
    if let Some(row) = row {
        return MessageId::try_from(row.get::<_, i64>(0)).map_or(Inserted::No, Inserted::At);
    }
    let name = format!(",{},", batch.partition);
    if held.is_some_and(|held| held.contains(&name)) { Inserted::No } else { Inserted::NotHeld }
}

/// Shorter than the deadline, so that a lock held by another is a definite answer.
fn lock_timeout(deadline: Duration) -> String {
    let most = u128::from(i32::MAX.unsigned_abs());
    format!("{}ms", (deadline.as_millis() * 3 / 4).clamp(1, most))
}

/// The bytes of some batches together.
fn bytes_of(batches: &[Append<'_>]) -> i32 {
    batches.iter().fold(0, |sum: i32, batch| sum.saturating_add(batch.arrays.bytes))
}

/// Whether a batch is so large that no lock may be held while it is on its way: a slow line takes
/// longer for it than the server waits for the rest of a transaction.
fn is_large(batches: &[Append<'_>]) -> bool {
    batches.iter().any(|batch| batch.arrays.bytes > LARGE)
}

/// Where each message of a batch is that has dedup keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Each {
    pub(crate) ids: Vec<MessageId>,
    /// The first one of those that are stored now.
    pub(crate) first_new: Option<MessageId>,
}

impl Each {
    /// The first id that was given now, and how many were: what was stored before has lower ones.
    pub(crate) fn new_ids(&self) -> Option<(MessageId, u32)> {
        let (first, last) = (self.first_new?, self.ids.iter().max()?);
        let count = last.sequence().checked_sub(first.sequence())?.checked_add(1)?;
        Some((first, count))
    }
}

/// What became of a batch that was looked for and, where it was missing, inserted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Again {
    /// On disk, now or since an earlier attempt, with this first id.
    At(MessageId),
    /// On disk, now or since an earlier send of the same dedup key.
    Each(Each),
    /// The partition takes another day, or must be rolled to `today` first.
    WrongDay {
        /// The partition's day.
        day: Day,
        /// The server's date.
        today: Day,
    },
    /// No room for the batch in this partition until midnight UTC. Final.
    Full,
    /// Takes no messages any more. Final.
    Sealed,
    /// The topic has another map of keys to partitions. Final.
    WrongGeneration,
    /// The partition is gone, or is another topic's. Final.
    WrongTopic,
    /// Fenced: it must not be stored any more. Final.
    Refused,
    /// Overtaken by a later batch of this producer: it must not be stored any more. Final.
    Overtaken,
}

/// Appends a batch of which an earlier attempt may have been stored, be stored yet, or have
/// inserted nothing: finds it, inserts it or says why not, in one transaction.
pub(crate) async fn append_again(
    connection: Connection,
    batch: &Append<'_>,
    deadline: Duration,
) -> Result<Again, Failure> {
    if !connection.keeps_statements() || is_large(std::slice::from_ref(batch)) {
        return function::append_again(connection, batch, deadline).await;
    }
    let texts = [sql::APPEND_LOCK, sql::APPEND_AGAIN].map(str::to_owned);
    let (guard, statements) = prepared(connection, &texts, deadline).await?;
    let [lock, again] = statements.as_slice() else {
        return Err(Failure::NoTable);
    };
    let connection = guard.connection();
    let (partitions, lock_timeout) = (vec![batch.partition.as_i32()], lock_timeout(deadline));
    let arrays = batch.arrays;
    let (partition, day, first_day) =
        (batch.partition.as_i32(), batch.day.as_i32(), batch.first_day.as_i32());
    let pipeline = async {
        join4(
            connection.batch_execute(sql::APPEND_BEGIN),
            connection.query_prepared(lock, &[&partitions, &lock_timeout]),
            connection.query_prepared(
                again,
                &[
                    &partition,
                    &batch.topic_id,
                    &batch.generation,
                    &day,
                    &first_day,
                    &batch.producer,
                    &batch.sequence,
                    &arrays.bytes,
                    &arrays.keys,
                    &arrays.headers,
                    &arrays.payloads,
                ],
            ),
            connection.commit(),
        )
        .await
    };
    let limit = with_bytes(deadline, arrays.bytes);
    let Ok((begun, locked, rows, committed)) = timeout(limit, pipeline).await else {
        return Err(Failure::Unknown(None));
    };
    guard.finished();
    check_begun(begun, &rows)?;
    locked.map_err(Failure::of)?;
    let rows = rows.map_err(Failure::of)?;
    committed.map_err(Failure::of_commit)?;
    Ok(read_again(rows.first()))
}

/// Where `begin` failed, a statement that did not was committed by itself.
fn check_begun(begun: Result<(), Failed>, rows: &Result<Vec<Row>, Failed>) -> Result<(), Failure> {
    let undone = rows.as_ref().is_err_and(is_definite);
    begun.map_err(|error| if undone { Failure::of(error) } else { Failure::Unknown(Some(error)) })
}

fn read_again(row: Option<&Row>) -> Again {
    let Some(row) = row else { return Again::WrongTopic };
    let id = || MessageId::try_from(row.get::<_, Option<i64>>(1).unwrap_or(0));
    let day = |index| Day::from_i32(row.get::<_, Option<i32>>(index).unwrap_or(0));
    match row.get(0) {
        "appended" | "duplicate" => id().map_or(Again::Refused, Again::At),
        "wrong_day" => match (day(2), day(3)) {
            (Ok(day), Ok(today)) => Again::WrongDay { day, today },
            _ => Again::WrongTopic,
        },
        "full" => Again::Full,
        "sealed" => Again::Sealed,
        "wrong_generation" => Again::WrongGeneration,
        "refused" => Again::Refused,
        "overtaken" => Again::Overtaken,
        _ => Again::WrongTopic,
    }
}

/// Asks for a batch that is to be given up. `None`: it is not there and never will be.
pub(crate) async fn fence(
    connection: Connection,
    batch: &Append<'_>,
    deadline: Duration,
) -> Result<Option<MessageId>, Failure> {
    let partition = batch.partition.as_i32();
    let (first_day, latest_day) = (batch.first_day.as_i32(), batch.latest_day.as_i32());
    let params: [&dyn Param; 5] =
        [&partition, &batch.producer, &batch.sequence, &first_day, &latest_day];
    let asked = write(connection, Durability::Durable, sql::FENCE, &params);
    let rows =
        timeout(deadline, asked).await.map_err(|_| Failure::Unknown(None))?.map_err(Failure::of)?;
    let found: Option<i64> = rows.first().and_then(|row| row.get(0));
    Ok(found.and_then(|id| MessageId::try_from(id).ok()))
}

/// Whether a node can write: asks it to, durably, and stores nothing.
pub(crate) async fn probe(connection: Connection, node: NodeId) -> Result<(), Error> {
    short(connection, sql::PROBE, &[], &format!("probe node {node}")).await.map(drop)
}

/// One statement that may be repeated, in a transaction of its own; a server that does not answer
/// is an error, not a stall.
async fn short(
    connection: Connection,
    statement: &str,
    params: &[&dyn Param],
    what: &str,
) -> Result<Vec<Row>, Error> {
    let asked = write(connection, Durability::Durable, statement, params);
    match timeout(SHORT, asked).await {
        Ok(answer) => answer.map_err(|error| refused(error, what)),
        Err(_) => Err(Error::new(ErrorKind::Unavailable, format!("{what}: the server is silent"))),
    }
}
