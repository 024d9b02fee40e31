//! An outbox: publishing into it, and what a relay does with it.

use std::time::{Duration, SystemTime};

use tokio_postgres::error::SqlState;
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

pub(crate) use frozen::{Frozen, State, arrays_of};
pub(crate) use snapshot::Snapshot;

const DAY: Duration = Duration::from_hours(24);

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
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keep {
    pub(crate) holder: Uuid,
    /// Who it was before.
    pub(crate) before: Uuid,
    pub(crate) cluster: Uuid,
    pub(crate) lease_secs: f64,
}

impl Keep {
    fn params(&self) -> [&dyn Param; 4] {
        [&self.holder, &self.before, &self.cluster, &self.lease_secs]
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

/// A batch that is to be frozen: for whom, and which messages in which order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) partition: PartitionId,
    pub(crate) topic: TopicName,
    pub(crate) generation: i32,
    pub(crate) day: Day,
    /// Ids, and whether they are for later.
    pub(crate) messages: Vec<(i64, bool)>,
    pub(crate) bytes: usize,
}

/// What a step does.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Batches that were appended.
    pub(crate) done: Vec<i64>,
    pub(crate) targets: Vec<Target>,
    /// Ids to be set aside, whether they are for later, and why.
    pub(crate) dead: Vec<(i64, bool, String)>,
}

/// What a step did.
#[derive(Debug)]
pub(crate) enum Stepped {
    Did {
        frozen: Vec<Frozen>,
        /// What was set aside: id, topic, error.
        buried: Vec<(i64, Option<String>, String)>,
    },
    /// Another relay works, or has the lease.
    NotOurs,
    /// Somebody is about to take a message back.
    Locked,
}

/// The ids of one kind with their batches and places.
#[derive(Default)]
struct Places(Vec<i64>, Vec<i32>, Vec<i32>);

fn places(targets: &[Target], for_later: bool) -> Places {
    let mut all = Places::default();
    for (target, batch) in targets.iter().zip(1..) {
        for ((id, later), place) in target.messages.iter().zip(1..) {
            if *later == for_later {
                all.0.push(*id);
                all.1.push(batch);
                all.2.push(place);
            }
        }
    }
    all
}

/// Freezes batches, sets aside what no partition takes, and forgets what was appended: durably, in one
/// transaction, if this relay has the lock and the lease.
pub(crate) async fn step(
    connection: Connection,
    holder: Uuid,
    step: &Step,
) -> Result<Stepped, Failed> {
    let (now, later) = (places(&step.targets, false), places(&step.targets, true));
    let partitions: Vec<i32> = step.targets.iter().map(|t| t.partition.as_i32()).collect();
    let topics: Vec<&str> = step.targets.iter().map(|t| t.topic.as_str()).collect();
    let generations: Vec<i32> = step.targets.iter().map(|t| t.generation).collect();
    let producers: Vec<Uuid> = step.targets.iter().map(|_| Uuid::now_v7()).collect();
    let days: Vec<i32> = step.targets.iter().map(|t| t.day.as_i32()).collect();
    let first_days: Vec<i32> = step.targets.iter().map(|t| first_day(t.day).as_i32()).collect();
    let freeze: [&dyn Param; 12] = [
        &now.0,
        &now.1,
        &now.2,
        &later.0,
        &later.1,
        &later.2,
        &partitions,
        &topics,
        &generations,
        &producers,
        &days,
        &first_days,
    ];
    let of = |later: bool| -> Vec<i64> {
        step.dead.iter().filter(|dead| dead.1 == later).map(|dead| dead.0).collect()
    };
    let all: Vec<i64> = step.dead.iter().map(|dead| dead.0).collect();
    let errors: Vec<&str> = step.dead.iter().map(|dead| dead.2.as_str()).collect();
    let (dead, dead_later) = (of(false), of(true));
    let bury: [&dyn Param; 4] = [&dead, &dead_later, &all, &errors];
    let (hold, done): ([&dyn Param; 1], [&dyn Param; 1]) = ([&holder], [&step.done]);
    let statements: [(&str, &[&dyn Param]); 5] = [
        (sql::OUTBOX_LOCK, &[]),
        (sql::OUTBOX_HOLD, &hold),
        (sql::OUTBOX_DONE, &done),
        (sql::OUTBOX_FREEZE, &freeze),
        (sql::OUTBOX_BURY, &bury),
    ];
    let asked = [true, true, !step.done.is_empty(), !all_empty(&now, &later), !all.is_empty()];
    let asked: Vec<_> =
        statements.into_iter().zip(asked).filter_map(|(text, on)| on.then_some(text)).collect();
    let mut answers =
        match write_all(connection, Durability::Durable, sql::OUTBOX_BEGIN, &asked).await {
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                return Ok(Stepped::Locked);
            }
            answers => answers?,
        };
    let is_ours = answers.get(1).and_then(|rows| rows.first()).is_some_and(|row| row.get(0));
    if !is_ours {
        return Ok(Stepped::NotOurs);
    }
    let buried = if all.is_empty() { Vec::new() } else { answers.pop().unwrap_or_default() };
    let buried = buried.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let frozen = if all_empty(&now, &later) { None } else { answers.pop() };
    let frozen = frozen.unwrap_or_default().iter().filter_map(Frozen::read).collect();
    Ok(Stepped::Did { frozen, buried })
}

/// Where a batch is looked for that is to be stored on a day. Another relay, whose clock is right, may store
/// it earlier.
fn first_day(day: Day) -> Day {
    Day::of(day.start() - 2 * DAY).unwrap_or(day)
}

fn all_empty(now: &Places, later: &Places) -> bool {
    now.0.is_empty() && later.0.is_empty()
}

/// Forgets batches that were appended. A crash may take that back: who finds one again finds it stored.
pub(crate) async fn forget(connection: Connection, done: &[i64]) -> Result<(), Failed> {
    write(connection, Durability::Relaxed, sql::OUTBOX_DONE, &[&done]).await.map(drop)
}

/// The partitions that frozen batches wait for, as they are from now on for whoever has the lease; none
/// where this relay has not, or another is at work.
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

/// The next frozen batches of a partition, beyond one: at least one if there is any, and beyond the first
/// at most so many bytes.
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

/// Lets attempts name another day; none where the batch is gone or being put back. Returns the earliest
/// day and the latest.
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

/// Says what happens to a batch; none where it is gone, or something else does. Returns the earliest day and
/// the latest that attempts have named.
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

/// Puts the messages of a withdrawn batch back into the outbox, if this relay has the lock and the lease;
/// false where it has not. A batch that is gone is back already.
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
