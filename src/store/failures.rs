//! Messages that a group failed at: put aside, read again when they are due, ended.

use std::time::SystemTime;

use tokio_postgres::{GenericClient, Row};
use uuid::Uuid;

use crate::failure::FailedAttempt;
use crate::id::PartitionId;
use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::fetch::Batch;
use crate::store::group::{Fence, InTransaction, Moved, Outcome, why_not};
use crate::store::node::{Connection, Durability, query, write};
use crate::store::packed::Unpacked;
use crate::store::param::{Param, typed};
use crate::store::sql;

/// Under what something was handed out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Under {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    /// The server that it was last seen on.
    pub(crate) incarnation: SystemTime,
}

/// What was tried, and when it is to be tried again.
#[derive(Debug, Clone)]
pub(crate) struct Tried {
    pub(crate) attempts: u32,
    pub(crate) first_seen: SystemTime,
    pub(crate) failures: Vec<FailedAttempt>,
    /// None: it is given up.
    pub(crate) due_secs: Option<f64>,
}

/// A message of the log that is put aside.
#[derive(Debug)]
pub(crate) struct Aside<'a> {
    pub(crate) under: Under,
    pub(crate) row: &'a Batch,
    /// Which of that row.
    pub(crate) index: u32,
    pub(crate) tried: &'a Tried,
}

/// Puts messages aside and acknowledges them with that; what became of each, in their order. Rows that others
/// have locked are passed over, or waited for, for a second: then all fails.
pub(crate) async fn put_aside(
    connection: Connection,
    (topic, group): (&TopicName, &GroupName),
    messages: &[Aside<'_>],
    waits: bool,
) -> Result<Vec<Moved>, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let fences = Fences::of(messages.iter().map(|message| &message.under));
    let (mut ids, mut producers, mut sequences, mut indexes) = (vec![], vec![], vec![], vec![]);
    let (mut appended, mut seen, mut attempts, mut failures) = (vec![], vec![], vec![], vec![]);
    let (mut due, mut keys, mut headers, mut payloads) = (vec![], vec![], vec![], vec![]);
    for Aside { row, index, tried, .. } in messages {
        let place = *index as usize;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ids.push(row.base_id + i64::from(*index));
        producers.push(row.producer);
        sequences.push(row.sequence);
        indexes.push(number(*index));
        appended.push(row.appended_at);
        seen.push(tried.first_seen);
        attempts.push(number(tried.attempts));
        failures.push(json(&tried.failures));
        due.push(tried.due_secs);
        keys.push(row.keys.as_ref().and_then(|keys| keys.element(place)).map(text));
        // Behind the format's version.
        let json = row.headers.as_ref().and_then(|all| all.element(place)?.get(1..));
        headers.push(json.map(text));
        payloads.push(row.payloads.element(place).unwrap_or_default());
    }
    let Fences { partitions, owners, epochs, resets, servers } = fences;
    let params: [&dyn Param; 19] = [
        &group,
        &topic,
        &partitions,
        &owners,
        &epochs,
        &resets,
        &servers,
        &ids,
        &producers,
        &sequences,
        &indexes,
        &appended,
        &seen,
        &attempts,
        &failures,
        &due,
        &keys,
        &headers,
        &payloads,
    ];
    let rows = if waits {
        let statement =
            sql::PUT_ASIDE.replace("for no key update skip locked", "for no key update");
        write(connection, Durability::Patient, &statement, &params).await?
    } else {
        write(connection, Durability::Durable, sql::PUT_ASIDE, &params).await?
    };
    in_order(&rows, messages.len())
}

/// How something parked ends.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// It is done.
    Done,
    /// It failed again.
    Failed(Tried),
}

/// Something parked that ends.
#[derive(Debug)]
pub(crate) struct Settle<'a> {
    pub(crate) under: Under,
    pub(crate) id: Uuid,
    pub(crate) ending: &'a Ending,
}

/// Ends what was parked; what became of each, in their order.
pub(crate) async fn settle_parked(
    connection: Connection,
    group: &GroupName,
    parked: &[Settle<'_>],
) -> Result<Vec<Moved>, Failed> {
    let group = group.as_str();
    let fences = Fences::of(parked.iter().map(|parked| &parked.under));
    let ids: Vec<Uuid> = parked.iter().map(|parked| parked.id).collect();
    let (mut actions, mut attempts, mut failures, mut due) = (vec![], vec![], vec![], vec![]);
    for Settle { ending, .. } in parked {
        let (action, tried) = match ending {
            Ending::Done => ("done", None),
            Ending::Failed(tried) if tried.due_secs.is_some() => ("again", Some(tried)),
            Ending::Failed(tried) => ("dead", Some(tried)),
        };
        actions.push(action);
        attempts.push(tried.map(|tried| number(tried.attempts)));
        failures.push(tried.map(|tried| json(&tried.failures)));
        due.push(tried.and_then(|tried| tried.due_secs));
    }
    let Fences { partitions, owners, epochs, resets, servers } = fences;
    let params: [&dyn Param; 11] = [
        &group,
        &partitions,
        &owners,
        &epochs,
        &resets,
        &servers,
        &ids,
        &actions,
        &attempts,
        &failures,
        &due,
    ];
    let rows = write(connection, Durability::Durable, sql::SETTLE_PARKED, &params).await?;
    in_order(&rows, parked.len())
}

/// Ends something parked in a user's transaction.
pub(crate) async fn commit_parked_in<C: GenericClient + Sync>(
    transaction: &C,
    group: &GroupName,
    this: &InTransaction,
    id: Uuid,
) -> Result<Outcome, Failed> {
    let (group, partition) = (group.as_str(), this.partition.as_i32());
    let Fence { owner, epoch, reset_epoch } = this.fence;
    let params: [&dyn Param; 7] =
        [&group, &partition, &owner, &epoch, &reset_epoch, &this.incarnation, &id];
    let ended = transaction.execute_typed(sql::COMMIT_PARKED_IN, &typed(&params)).await?;
    if ended == 1 {
        return Ok(Outcome::Acknowledged);
    }
    // Where its row has gone, that may have been in this very transaction: nobody can tell.
    Ok(match why_not(transaction, &params[..6]).await? {
        Outcome::Already => Outcome::Uncommitted,
        other => other,
    })
}

/// A parked message that is due.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) id: Uuid,
    pub(crate) partition: PartitionId,
    /// The message, in a row of its own.
    pub(crate) row: Batch,
    pub(crate) attempts: u32,
    pub(crate) first_seen: SystemTime,
    pub(crate) failures: Vec<FailedAttempt>,
}

/// What is due, and in how many seconds the next one is.
#[derive(Debug, Default)]
pub(crate) struct Due {
    pub(crate) parked: Vec<Parked>,
    pub(crate) next_secs: Option<f64>,
    /// By the node's clock: all that was due before is among these, or in hand; unless there were too many.
    pub(crate) complete_to: Option<SystemTime>,
}

/// Reads parked messages that are due since a time and not in hand, at most so many rows, and bytes over the
/// first.
pub(crate) async fn parked(
    connection: &Connection,
    group: &GroupName,
    partitions: &[i32],
    in_hand: &[Uuid],
    (rows, bytes): (i32, i64),
    since: Option<SystemTime>,
) -> Result<Due, Failed> {
    let group = group.as_str();
    let params: [&dyn Param; 6] = [&group, &partitions, &in_hand, &rows, &bytes, &since];
    let rows = query(connection, sql::PARKED, &params).await?;
    let first = rows.first();
    let parked = rows.iter().map(read_parked).collect::<Result<Vec<_>, Failed>>()?;
    Ok(Due {
        parked: parked.into_iter().flatten().collect(),
        next_secs: first.map_or(Ok(None), |row| row.try_get(0))?,
        complete_to: first.map(|row| row.try_get(16)).transpose()?,
    })
}

/// None where the row is of no message.
fn read_parked(row: &Row) -> Result<Option<Parked>, Failed> {
    let Some(id) = row.try_get::<_, Option<Uuid>>(2)? else { return Ok(None) };
    let message = Batch {
        base_id: row.try_get(4)?,
        count: 1,
        first_index: u32::try_from(row.try_get::<_, i32>(7)?).unwrap_or(0),
        bytes: usize::try_from(row.try_get::<_, i32>(15)?).unwrap_or(0),
        producer: row.try_get(5)?,
        sequence: row.try_get(6)?,
        appended_at: row.try_get(8)?,
        incarnation: row.try_get(1)?,
        keys: row.try_get(12)?,
        headers: row.try_get(13)?,
        payloads: row.try_get::<_, Option<Unpacked>>(14)?.unwrap_or_default(),
        unreadable: None,
    };
    let Ok(partition) = PartitionId::from_i32(row.try_get(3)?) else { return Ok(None) };
    let attempts = u32::try_from(row.try_get::<_, i32>(10)?).unwrap_or(0);
    // What was tried before is for people: the message comes without it too.
    let failures = serde_json::from_str(row.try_get(11)?).unwrap_or_else(|error| {
        vec![FailedAttempt::new(attempts, &format!("what was tried before can't be read: {error}"))]
    });
    let first_seen = row.try_get(9)?;
    Ok(Some(Parked { id, partition, row: message, attempts, first_seen, failures }))
}

/// The fences of many, as arrays.
struct Fences {
    partitions: Vec<i32>,
    owners: Vec<Uuid>,
    epochs: Vec<i64>,
    resets: Vec<i64>,
    servers: Vec<SystemTime>,
}

impl Fences {
    fn of<'a>(all: impl Iterator<Item = &'a Under> + Clone) -> Self {
        Self {
            partitions: all.clone().map(|under| under.partition.as_i32()).collect(),
            owners: all.clone().map(|under| under.fence.owner).collect(),
            epochs: all.clone().map(|under| under.fence.epoch).collect(),
            resets: all.clone().map(|under| under.fence.reset_epoch).collect(),
            servers: all.map(|under| under.incarnation).collect(),
        }
    }
}

/// What became of each place, counted from 1.
fn in_order(rows: &[Row], count: usize) -> Result<Vec<Moved>, Failed> {
    let mut outcomes = vec![Moved::LeaseLost; count];
    for row in rows {
        let place = usize::try_from(row.try_get::<_, i32>(0)?).unwrap_or(0);
        if let Some(outcome) = place.checked_sub(1).and_then(|place| outcomes.get_mut(place)) {
            *outcome = Moved::named(row.try_get(1)?);
        }
    }
    Ok(outcomes)
}

fn number(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

pub(super) fn json(failures: &[FailedAttempt]) -> String {
    serde_json::to_string(failures).unwrap_or_else(|_| "[]".to_owned())
}
