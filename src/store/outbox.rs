//! An outbox: publishing into it, and what a relay does with it.

use std::time::{Duration, SystemTime};

use tokio_postgres::types::Type;
use tokio_postgres::{GenericClient, Row};
use uuid::Uuid;

use crate::id::{Day, PartitionId};
use crate::message::Message;
use crate::name::TopicName;
use crate::store::append::Arrays;
use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, query, query_one, write, write_all};
use crate::store::param::{Param, Typed, typed};
use crate::store::sql;

mod frozen;
mod snapshot;
mod step;

pub(crate) use frozen::{Frozen, State, arrays_of};
pub(crate) use snapshot::Snapshot;
pub(crate) use step::{INLINE, Step, Stepped, Target, step};

/// Publishes a message in a transaction of the caller's; returns the row's id.
pub(crate) async fn publish<C: GenericClient + Sync>(
    transaction: &C,
    topic: &TopicName,
    message: &Message,
    at: Option<SystemTime>,
) -> Result<i64, Failed> {
    let (topic, key) = (topic.as_str(), message.key.as_deref());
    let headers = (!message.headers.is_empty())
        .then(|| serde_json::to_value(&message.headers).unwrap_or_default());
    let params: [&dyn Param; 5] = [
        &topic,
        &Typed(&message.payload[..], Type::BYTEA),
        &key,
        &Typed(headers, Type::JSONB),
        &at,
    ];
    let row = transaction.query_typed_one(sql::OUTBOX_PUBLISH, &typed(&params)).await?;
    Ok(row.get(0))
}

/// When delayed messages are due.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Due {
    At(SystemTime),
    /// By the clock of their node.
    After(Duration),
}

/// Stores messages for later; a repeat under the same token returns the ids of the first call.
pub(crate) async fn deliver(
    connection: Connection,
    token: Uuid,
    topic: &TopicName,
    due: Due,
    arrays: &Arrays,
) -> Result<Vec<i64>, Failed> {
    let (at, secs) = match due {
        Due::At(at) => (Some(at), None),
        Due::After(delay) => (None, Some(delay.as_secs_f64())),
    };
    let topic = topic.as_str();
    let params: [&dyn Param; 7] = [
        &token,
        &topic,
        &at,
        &secs,
        &Typed(&arrays.payloads, Type::BYTEA_ARRAY),
        &Typed(&arrays.keys, Type::TEXT_ARRAY),
        &Typed(&arrays.headers, Type::JSONB_ARRAY),
    ];
    let rows = write(connection, Durability::Durable, sql::OUTBOX_DELIVER, &params).await?;
    Ok(rows.first().map(|row| row.get(0)).unwrap_or_default())
}

/// Takes a message back; false where a relay has taken it.
pub(crate) async fn cancel(connection: Connection, id: i64) -> Result<bool, Failed> {
    let rows = write(connection, Durability::Durable, sql::OUTBOX_CANCEL, &[&id]).await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// Who relays from a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Ours,
    Anothers,
    /// Of another cluster.
    OtherCluster,
}

/// Who asks to relay from a database.
#[derive(Debug, Clone)]
pub(crate) struct Keep {
    pub(crate) holder: Uuid,
    /// Names under which it may have the lease.
    pub(crate) former: Vec<Uuid>,
    pub(crate) cluster: Uuid,
    pub(crate) lease_secs: f64,
}

impl Keep {
    fn params(&self) -> [&dyn Param; 4] {
        [&self.holder, &self.former, &self.cluster, &self.lease_secs]
    }
}

fn standing(row: Option<&Row>) -> Standing {
    match row.map(|row| row.get(0)) {
        Some("ours") => Standing::Ours,
        Some("other_cluster") => Standing::OtherCluster,
        _ => Standing::Anothers,
    }
}

/// Takes or keeps the relaying from a database.
pub(crate) async fn keep(connection: Connection, keep: &Keep) -> Result<Standing, Failed> {
    let rows = write(connection, Durability::Relaxed, sql::OUTBOX_KEEP, &keep.params()).await?;
    Ok(standing(rows.first()))
}

/// Gives the relaying up.
pub(crate) async fn end(connection: Connection, holder: Uuid) -> Result<(), Failed> {
    write(connection, Durability::Relaxed, sql::OUTBOX_END, &[&holder]).await.map(drop)
}

/// What a look reads.
#[derive(Debug, Clone)]
pub(crate) struct Asked<'a> {
    pub(crate) holder: Uuid,
    /// Arms or disarms the flag, before anything is read, if this relay has the lease.
    pub(crate) arm: Option<bool>,
    /// Keeps the lease with it.
    pub(crate) keep: Option<&'a Keep>,
    /// All ids above this one.
    pub(crate) after: i64,
    /// And these ranges.
    pub(crate) ranges: &'a [(i64, i64)],
    /// Whether to draw a transaction id.
    pub(crate) draws: bool,
    /// What is due beyond this place.
    pub(crate) due_after: (SystemTime, i64),
    /// At most so many of each.
    pub(crate) limit: i32,
}

/// A message that waits to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) id: i64,
    /// None where somebody has dropped the table's checks.
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) bytes: usize,
    /// Where it is for later.
    pub(crate) due_at: Option<SystemTime>,
}

impl Waiting {
    fn read(row: &Row, columns: [usize; 4], due_at: Option<SystemTime>) -> Option<Self> {
        let [id, topic, key, bytes] = columns;
        Some(Self {
            id: row.get::<_, Option<i64>>(id)?,
            topic: row.get(topic),
            key: row.get(key),
            bytes: usize::try_from(row.get::<_, Option<i32>>(bytes).unwrap_or(0)).unwrap_or(0),
            due_at,
        })
    }
}

/// What a look saw, in one snapshot.
#[derive(Debug)]
pub(crate) struct Looked {
    /// Where the lease was kept.
    pub(crate) standing: Option<Standing>,
    /// What the flag was set to.
    pub(crate) armed: Option<bool>,
    /// None where it can't be read.
    pub(crate) snapshot: Option<Snapshot>,
    /// The transaction id that was drawn.
    pub(crate) own: Option<u64>,
    /// The highest id that was drawn until then, at least.
    pub(crate) last_id: i64,
    /// When the server was started.
    pub(crate) started: f64,
    /// In the order of their ids.
    pub(crate) published: Vec<Waiting>,
    /// In the order of time and id.
    pub(crate) due: Vec<Waiting>,
    /// Until the next is due; none where none waits.
    pub(crate) next_due: Option<Duration>,
}

/// Looks what there is to be taken.
pub(crate) async fn look(connection: Connection, asked: &Asked<'_>) -> Result<Looked, Failed> {
    let flag = i64::from(asked.arm == Some(true));
    let first: Vec<i64> = asked.ranges.iter().map(|range| range.0).collect();
    let last: Vec<i64> = asked.ranges.iter().map(|range| range.1).collect();
    let ids: [&dyn Param; 5] = [&asked.after, &asked.limit, &first, &last, &asked.draws];
    let due: [&dyn Param; 3] = [&asked.due_after.0, &asked.due_after.1, &asked.limit];
    let arm: [&dyn Param; 2] = [&flag, &asked.holder];
    let kept = asked.keep.map(Keep::params);
    let mut statements: Vec<(&str, &[&dyn Param])> = Vec::with_capacity(4);
    if let Some(kept) = &kept {
        statements.push((sql::OUTBOX_KEEP, kept));
    }
    if asked.arm.is_some() {
        statements.push((sql::OUTBOX_ARM, &arm));
    }
    statements.extend([(sql::OUTBOX_LOOK, &ids[..]), (sql::OUTBOX_LOOK_DUE, &due[..])]);
    let mut answers =
        write_all(connection, Durability::Relaxed, sql::OUTBOX_BEGIN, &statements).await?;
    let due = answers.pop().unwrap_or_default();
    let ids = answers.pop().unwrap_or_default();
    let armed =
        asked.arm.and_then(|arm| answers.pop().filter(|rows| !rows.is_empty()).map(|_| arm));
    let standing = kept.and(answers.pop()).map(|rows| standing(rows.first()));
    Ok(Looked { armed, ..read_look(standing, &ids, &due) })
}

fn read_look(standing: Option<Standing>, ids: &[Row], due: &[Row]) -> Looked {
    let first = ids.first();
    let own = first.and_then(|row| row.get::<_, Option<&str>>(1)?.parse().ok());
    let secs = due.first().and_then(|row| row.get::<_, Option<f64>>(5));
    let is_due = |row: &Row| Waiting::read(row, [0, 1, 2, 3], row.get(4));
    Looked {
        standing,
        armed: None,
        snapshot: first.and_then(|row| Snapshot::parse(row.get(0))),
        own,
        last_id: first.map_or(0, |row| row.get(2)),
        started: first.map_or(0.0, |row| row.get(3)),
        published: ids.iter().filter_map(|row| Waiting::read(row, [4, 5, 6, 7], None)).collect(),
        due: due.iter().filter_map(is_due).collect(),
        next_due: secs.map(|secs| Duration::try_from_secs_f64(secs.max(0.0)).unwrap_or_default()),
    }
}

/// Forgets batches that were appended. A crash may take that back: who finds one again finds it
/// stored.
pub(crate) async fn forget(connection: Connection, done: &[i64]) -> Result<(), Failed> {
    write(connection, Durability::Relaxed, sql::OUTBOX_DONE, &[&done]).await.map(drop)
}

/// The partitions that frozen batches wait for, as they are from now on for whoever has the lease;
/// none where this relay has not, or another is at work.
pub(crate) async fn lanes(
    connection: Connection,
    holder: Uuid,
) -> Result<Option<Vec<PartitionId>>, Failed> {
    let hold: [&dyn Param; 1] = [&holder];
    let statements: [(&str, &[&dyn Param]); 3] =
        [(sql::OUTBOX_LOCK, &[]), (sql::OUTBOX_HOLD, &hold), (sql::OUTBOX_LANES, &[])];
    let answers =
        write_all(connection, Durability::Durable, sql::OUTBOX_BEGIN, &statements).await?;
    let [_, ours, lanes] = answers.as_slice() else { return Ok(None) };
    let partition = |row: &Row| PartitionId::from_i32(row.get(0)).ok();
    let is_ours = ours.first().is_some_and(|row| row.get(0));
    Ok(is_ours.then(|| lanes.iter().filter_map(partition).collect()))
}

/// The next frozen batches of a partition, beyond one: at least one if there is any, and beyond the
/// first at most so many bytes.
pub(crate) async fn next(
    connection: &Connection,
    partition: PartitionId,
    after: i64,
    bytes: i64,
) -> Result<Vec<Frozen>, Failed> {
    let params: [&dyn Param; 3] = [&partition.as_i32(), &after, &bytes];
    let rows = query(connection, sql::OUTBOX_NEXT, &params).await?;
    Ok(rows.iter().filter_map(Frozen::read).collect())
}

/// Which messages nobody is about to take back.
pub(crate) async fn unlocked(connection: Connection, ids: &[i64]) -> Result<Vec<i64>, Failed> {
    let params: [&dyn Param; 1] = [&ids];
    let rows = write(connection, Durability::Relaxed, sql::OUTBOX_UNLOCKED, &params).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Lets attempts name another day; none where the batch is gone or being put back. Returns the
/// earliest day and the latest.
pub(crate) async fn name_day(
    connection: Connection,
    id: i64,
    day: Day,
) -> Result<Option<(Day, Day)>, Failed> {
    let params: [&dyn Param; 2] = [&id, &day.as_i32()];
    let rows = write(connection, Durability::Durable, sql::OUTBOX_NAME_DAY, &params).await?;
    Ok(rows.first().and_then(read_days))
}

fn read_days(row: &Row) -> Option<(Day, Day)> {
    Some((Day::from_i32(row.get(0)).ok()?, Day::from_i32(row.get(1)).ok()?))
}

/// Says what happens to a batch; none where it is gone, or something else does. Returns the
/// earliest day and the latest that attempts have named.
pub(crate) async fn set_state(
    connection: Connection,
    id: i64,
    state: State,
) -> Result<Option<(Day, Day)>, Failed> {
    let state = state.as_str();
    let params: [&dyn Param; 2] = [&id, &state];
    let rows = write(connection, Durability::Durable, sql::OUTBOX_SET_STATE, &params).await?;
    Ok(rows.first().and_then(read_days))
}

/// Puts the messages of a withdrawn batch back into the outbox, if this relay has the lock and the
/// lease; false where it has not. A batch that is gone is back already.
pub(crate) async fn put_back(
    connection: Connection,
    holder: Uuid,
    id: i64,
) -> Result<bool, Failed> {
    let (hold, batch): ([&dyn Param; 1], [&dyn Param; 1]) = ([&holder], [&id]);
    let statements: [(&str, &[&dyn Param]); 3] =
        [(sql::OUTBOX_LOCK, &[]), (sql::OUTBOX_HOLD, &hold), (sql::OUTBOX_PUT_BACK, &batch)];
    let answers =
        write_all(connection, Durability::Durable, sql::OUTBOX_BEGIN, &statements).await?;
    Ok(answers.get(1).and_then(|rows| rows.first()).is_some_and(|row| row.get(0)))
}

/// Ends a divided batch: sets the messages in these places, from 1, aside.
pub(crate) async fn bury_parts(
    connection: Connection,
    id: i64,
    parts: &[(i32, String)],
) -> Result<(), Failed> {
    let places: Vec<i32> = parts.iter().map(|part| part.0).collect();
    let errors: Vec<&str> = parts.iter().map(|part| part.1.as_str()).collect();
    let params: [&dyn Param; 3] = [&id, &places, &errors];
    write(connection, Durability::Durable, sql::OUTBOX_BURY_PARTS, &params).await.map(drop)
}

/// How many messages wait in a database for a relay, or for their time.
pub(crate) async fn left(connection: &Connection) -> Result<i64, Failed> {
    query_one(connection, sql::OUTBOX_LEFT, &[]).await.map(|row| row.get(0))
}

/// How many old calls [`prune`] forgets at most.
pub(crate) const PRUNED: i64 = 10_000;

/// Forgets old calls of [`deliver`]; returns how many.
pub(crate) async fn prune(connection: Connection) -> Result<i64, Failed> {
    let limit: [&dyn Param; 1] = [&PRUNED];
    let answers = write_all(
        connection,
        Durability::Relaxed,
        sql::OUTBOX_BEGIN,
        &[(sql::OUTBOX_PRUNE, &limit)],
    )
    .await?;
    Ok(answers.first().and_then(|rows| rows.first()).map_or(0, |row| row.get(0)))
}
