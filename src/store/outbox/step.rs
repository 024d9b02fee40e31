//! One step of a relay: what it takes out of the outbox, in one transaction.

use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::Frozen;
use crate::id::{Day, PartitionId};
use crate::name::TopicName;
use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, write_all};
use crate::store::param::Param;
use crate::store::sql;

const DAY: Duration = Duration::from_hours(24);
/// So many bytes come back with the answer to a step, nearly: on a slow line it takes no longer
/// than a lease lasts. Larger batches are read of the table.
pub(crate) const INLINE: usize = 4 << 20;

/// A batch that is to be frozen: for whom, and which messages in which order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) partition: PartitionId,
    pub(crate) topic: TopicName,
    pub(crate) topic_id: Uuid,
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

impl Step {
    /// Of how many bytes a batch comes back with the answer.
    fn inline(&self) -> usize {
        let all: usize = self.targets.iter().map(|target| target.bytes).sum();
        if all <= INLINE { INLINE } else { INLINE / self.targets.len() }
    }
}

/// What a step did.
#[derive(Debug)]
pub(crate) enum Stepped {
    Did {
        frozen: Vec<Frozen>,
        /// The partitions of batches that are to be read of the table.
        large: Vec<PartitionId>,
        /// What was set aside: topic and error.
        buried: Vec<(Option<String>, String)>,
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

/// Freezes batches, sets aside what no partition takes, and forgets what was appended: durably, in
/// one transaction, if this relay has the lock and the lease.
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
    let inline = i32::try_from(step.inline()).unwrap_or(i32::MAX);
    let topic_ids: Vec<Uuid> = step.targets.iter().map(|t| t.topic_id).collect();
    let freeze: [&dyn Param; 14] = [
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
        &inline,
        &topic_ids,
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
    let frozen = if all_empty(&now, &later) { None } else { answers.pop() };
    Ok(did(frozen.unwrap_or_default(), &buried))
}

fn did(frozen: Vec<Row>, buried: &[Row]) -> Stepped {
    let (whole, large): (Vec<Row>, Vec<Row>) = frozen.into_iter().partition(Frozen::is_whole);
    let partition = |row: &Row| PartitionId::from_i32(row.get(1)).ok();
    Stepped::Did {
        frozen: whole.iter().filter_map(Frozen::read).collect(),
        large: large.iter().filter_map(partition).collect(),
        buried: buried.iter().map(|row| (row.get(1), row.get(2))).collect(),
    }
}

/// Where a batch is looked for that is to be stored on a day. Another relay, whose clock is right,
/// may store it earlier.
fn first_day(day: Day) -> Day {
    Day::of(day.start() - 2 * DAY).unwrap_or(day)
}

fn all_empty(now: &Places, later: &Places) -> bool {
    now.0.is_empty() && later.0.is_empty()
}
