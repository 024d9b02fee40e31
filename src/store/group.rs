//! Groups on a node: starts, leases and cursors.

use std::time::SystemTime;

use tokio_postgres::GenericClient;
use uuid::Uuid;

use crate::id::PartitionId;
use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, query, write};
use crate::store::param::{Param, typed};
use crate::store::sql;

/// Where a group starts: at a time (none: by the server's clock), or exactly at an id in that id's
/// own partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StartAt {
    pub(crate) at: Option<SystemTime>,
    pub(crate) id: Option<i64>,
    /// The group is of one consumer alone, and goes when that has gone.
    pub(crate) broadcast: bool,
}

/// What every commit of a cursor names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fence {
    pub(crate) owner: Uuid,
    pub(crate) epoch: i64,
    pub(crate) reset_epoch: i64,
}

/// A partition that was taken.
#[derive(Debug, Clone)]
pub(crate) struct Acquired {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    /// The server that answered: when it was started.
    pub(crate) incarnation: SystemTime,
    pub(crate) acked_id: i64,
    /// Ids above it that are acknowledged too: first and last of each run.
    pub(crate) acked_ahead: Vec<(i64, i64)>,
    /// Whose it was, if it was not given back.
    pub(crate) owner_before: Option<Uuid>,
    pub(crate) member_before: Option<Uuid>,
}

/// Where a group starts on this node, if it knows.
pub(crate) async fn start(
    connection: &Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Option<StartAt>, Failed> {
    let params: [&dyn Param; 2] = [&topic.as_str(), &group.as_str()];
    let rows = query(connection, sql::GROUP_START_READ, &params).await?;
    Ok(rows.first().map(|row| StartAt {
        at: Some(row.get(0)),
        id: row.get(1),
        broadcast: row.get(2),
    }))
}

/// Resolves a group's start on this node, unless somebody did.
pub(crate) async fn write_start(
    connection: Connection,
    (topic, id): (&TopicName, Uuid),
    group: &GroupName,
    start: StartAt,
) -> Result<(), Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let params: [&dyn Param; 6] = [&topic, &group, &start.at, &start.id, &start.broadcast, &id];
    write(connection, Durability::Durable, sql::GROUP_START_WRITE, &params).await.map(drop)
}

/// Makes the cursors that a group lacks on this node.
pub(crate) async fn make_cursors(
    connection: Connection,
    (topic, id): (&TopicName, Uuid),
    group: &GroupName,
    partition: Option<PartitionId>,
) -> Result<(), Failed> {
    let (topic, group, partition) =
        (topic.as_str(), group.as_str(), partition.map(PartitionId::as_i32));
    let params: [&dyn Param; 4] = [&topic, &group, &partition, &id];
    write(connection, Durability::Brief, sql::MAKE_CURSORS, &params).await.map(drop)
}

/// What a renewal found.
#[derive(Debug)]
pub(crate) struct Renewed {
    /// The server that answered: when it was started.
    pub(crate) incarnation: SystemTime,
    /// Whether it is the one that was named, and so the lease renewed.
    pub(crate) same_server: bool,
    /// What the member owns on this node.
    pub(crate) owned: Vec<(PartitionId, Fence)>,
    /// In how many seconds the first parked message of those partitions is due: less than none
    /// where it is already.
    pub(crate) parked_secs: Option<f64>,
}

/// Renews a member's lease, unless another server answers than the one that the member knows, or a
/// later turn was there first.
pub(crate) async fn renew(
    connection: Connection,
    (member, turn): (Uuid, i64),
    group: &GroupName,
    lease_secs: f64,
    incarnation: Option<SystemTime>,
    session: Option<String>,
    parked_since: Option<SystemTime>,
) -> Result<Renewed, Failed> {
    let group = group.as_str();
    let params: [&dyn Param; 7] =
        [&member, &group, &lease_secs, &incarnation, &session, &parked_since, &turn];
    let rows = write(connection, Durability::Relaxed, sql::RENEW, &params).await?;
    let owned = rows.iter().filter_map(|row| {
        let partition = PartitionId::from_i32(row.get::<_, Option<i32>>(2)?).ok()?;
        let owner = row.get::<_, Option<Uuid>>(3)?;
        Some((partition, Fence { owner, epoch: row.get(4), reset_epoch: row.get(5) }))
    });
    Ok(Renewed {
        incarnation: rows.first().map_or(SystemTime::UNIX_EPOCH, |row| row.get(0)),
        same_server: rows.first().is_some_and(|row| row.get(1)),
        owned: owned.collect(),
        parked_secs: rows.iter().filter_map(|row| row.get(6)).reduce(f64::min),
    })
}

/// Who takes partitions, and whose.
#[derive(Debug)]
pub(crate) struct Taker<'a> {
    /// Its own lease must be live.
    pub(crate) member: Uuid,
    pub(crate) lease_secs: f64,
    /// Whether what a member has whose lease is over may be taken.
    pub(crate) ended_too: bool,
    /// Members that have died, as others saw.
    pub(crate) gone: &'a [Uuid],
    /// Members that have died for certain.
    pub(crate) dead: &'a [Uuid],
}

/// Takes those of these partitions that are free, or a dead member's.
pub(crate) async fn acquire(
    connection: Connection,
    (topic_id, group): (Uuid, &GroupName),
    taker: &Taker<'_>,
    partitions: &[i32],
) -> Result<Vec<Acquired>, Failed> {
    let group = group.as_str();
    let Taker { member, lease_secs, ended_too, gone, dead } = taker;
    let params: [&dyn Param; 8] =
        [&topic_id, &group, member, &partitions, ended_too, gone, lease_secs, dead];
    let rows = write(connection, Durability::Durable, sql::ACQUIRE, &params).await?;
    let acquired = rows.iter().filter_map(|row| {
        Some(Acquired {
            partition: PartitionId::from_i32(row.get(0)).ok()?,
            fence: Fence { owner: row.get(1), epoch: row.get(2), reset_epoch: row.get(3) },
            acked_id: row.get(4),
            acked_ahead: parse_ranges(row.get(5)),
            incarnation: row.get(6),
            owner_before: row.get(7),
            member_before: row.get(8),
        })
    });
    Ok(acquired.collect())
}

/// A cursor to be moved.
#[derive(Debug, Clone)]
pub(crate) struct Move {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    /// The server that the messages were last seen on.
    pub(crate) incarnation: SystemTime,
    pub(crate) acked_id: i64,
    pub(crate) acked_ahead: Vec<(i64, i64)>,
}

/// What became of a cursor that was to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    /// Committed.
    Yes,
    /// It was done before.
    Already,
    /// The row was locked by another transaction: next time.
    Locked,
    /// The partition is another owner's.
    LeaseLost,
    /// A seek came in between.
    Reset,
    /// Another server answered than the one that the messages were seen on: not before a look.
    OtherServer,
}

impl Moved {
    pub(super) fn named(name: &str) -> Self {
        match name {
            "moved" => Self::Yes,
            "already" => Self::Already,
            "locked" => Self::Locked,
            "reset" => Self::Reset,
            "other_server" => Self::OtherServer,
            _ => Self::LeaseLost,
        }
    }
}

/// Moves cursors, each only where its fence still holds.
pub(crate) async fn flush(
    connection: Connection,
    group: &GroupName,
    moves: &[Move],
) -> Result<Vec<(PartitionId, Moved)>, Failed> {
    let partitions: Vec<i32> = moves.iter().map(|m| m.partition.as_i32()).collect();
    let owners: Vec<Uuid> = moves.iter().map(|m| m.fence.owner).collect();
    let epochs: Vec<i64> = moves.iter().map(|m| m.fence.epoch).collect();
    let resets: Vec<i64> = moves.iter().map(|m| m.fence.reset_epoch).collect();
    let acked: Vec<i64> = moves.iter().map(|m| m.acked_id).collect();
    let ahead: Vec<String> = moves.iter().map(|m| format_ranges(&m.acked_ahead)).collect();
    let servers: Vec<SystemTime> = moves.iter().map(|m| m.incarnation).collect();
    let group = group.as_str();
    let params: [&dyn Param; 8] =
        [&group, &partitions, &owners, &epochs, &resets, &acked, &ahead, &servers];
    let rows = write(connection, Durability::Durable, sql::FLUSH, &params).await?;
    let outcomes = rows.iter().filter_map(|row| {
        Some((PartitionId::from_i32(row.get(0)).ok()?, Moved::named(row.get(1))))
    });
    Ok(outcomes.collect())
}

/// What is acknowledged under a fence: the watermark, runs above it, and the server; none where
/// another has the partition.
pub(crate) async fn entrusted(
    connection: &Connection,
    group: &GroupName,
    partition: PartitionId,
    fence: Fence,
) -> Result<Option<(i64, Vec<(i64, i64)>, SystemTime)>, Failed> {
    let (group, partition) = (group.as_str(), partition.as_i32());
    let Fence { owner, epoch, reset_epoch } = fence;
    let params: [&dyn Param; 5] = [&group, &partition, &owner, &epoch, &reset_epoch];
    let rows = query(connection, sql::ENTRUSTED, &params).await?;
    Ok(rows.first().map(|row| (row.get(0), parse_ranges(row.get(1)), row.get(2))))
}

/// A message that is acknowledged in a user's transaction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InTransaction {
    pub(crate) partition: PartitionId,
    pub(crate) fence: Fence,
    /// The server that it was last seen on.
    pub(crate) incarnation: SystemTime,
    pub(crate) id: i64,
    /// All before it is acknowledged.
    pub(crate) is_next: bool,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Acknowledged, if the transaction is committed.
    Acknowledged,
    /// It was acknowledged before, for good.
    Already,
    /// It is acknowledged, but maybe only in this transaction, which may still be rolled back.
    Uncommitted,
    /// The partition is another owner's.
    LeaseLost,
    /// A seek came in between.
    Reset,
    /// Another server answered than the one that it was seen on: not before a look.
    OtherServer,
    /// The transaction is on another node.
    Elsewhere,
}

/// Acknowledges a message in a user's transaction, which may wait for another one of its partition.
pub(crate) async fn commit_in<C: GenericClient + Sync>(
    transaction: &C,
    group: &GroupName,
    this: &InTransaction,
) -> Result<Outcome, Failed> {
    let (group, partition) = (group.as_str(), this.partition.as_i32());
    let Fence { owner, epoch, reset_epoch } = this.fence;
    let params: [&dyn Param; 8] = [
        &group,
        &partition,
        &owner,
        &epoch,
        &reset_epoch,
        &this.incarnation,
        &this.id,
        &this.is_next,
    ];
    let moved = transaction.execute_typed(sql::COMMIT_IN, &typed(&params)).await?;
    if moved == 1 {
        return Ok(Outcome::Acknowledged);
    }
    why_not(transaction, &params[..6]).await
}

/// Why a message was not acknowledged in a user's transaction: asked with its group, partition,
/// owner, epoch, reset epoch and incarnation.
pub(super) async fn why_not<C: GenericClient + Sync>(
    transaction: &C,
    params: &[&dyn Param],
) -> Result<Outcome, Failed> {
    let why = transaction.query_typed_opt(sql::COMMIT_IN_REFUSED, &typed(params)).await?;
    Ok(match why.as_ref().map(|row| row.get(0)) {
        Some("acknowledged") => Outcome::Already,
        Some("uncommitted") => Outcome::Uncommitted,
        Some("reset") => Outcome::Reset,
        Some("other_server") => Outcome::OtherServer,
        Some(_) => Outcome::LeaseLost,
        None => Outcome::Elsewhere,
    })
}

/// Gives partitions back, where they are still these owners' and no transaction has locked their
/// rows: the next renewal finds those.
pub(crate) async fn release(
    connection: Connection,
    group: &GroupName,
    owned: &[(PartitionId, Uuid)],
) -> Result<(), Failed> {
    let partitions: Vec<i32> = owned.iter().map(|(partition, _)| partition.as_i32()).collect();
    let owners: Vec<Uuid> = owned.iter().map(|(_, owner)| *owner).collect();
    let group = group.as_str();
    write(connection, Durability::Durable, sql::RELEASE, &[&group, &partitions, &owners])
        .await
        .map(drop)
}

/// Ends a member's lease: no renewal of an earlier turn counts any more.
pub(crate) async fn leave(
    connection: Connection,
    member: Uuid,
    group: &GroupName,
    turn: i64,
) -> Result<(), Failed> {
    let params: [&dyn Param; 3] = [&member, &group.as_str(), &turn];
    write(connection, Durability::Relaxed, sql::LEAVE, &params).await.map(drop)
}

/// Removes the groups of broadcast consumers that are gone: by two clocks, and not those that are
/// known to live.
pub(crate) async fn sweep_broadcasts(
    connection: Connection,
    clock: SystemTime,
    live: &[String],
) -> Result<(), Failed> {
    let params: [&dyn Param; 2] = [&clock, &live];
    write(connection, Durability::Relaxed, sql::SWEEP_BROADCASTS, &params).await.map(drop)
}

/// Removes members whose lease ended long ago.
pub(crate) async fn sweep_members(connection: Connection) -> Result<(), Failed> {
    write(connection, Durability::Relaxed, sql::SWEEP_MEMBERS, &[]).await.map(drop)
}

/// A multirange as Postgres writes it, `{[1,5),[7,9)}`, as first and last of each run.
fn parse_ranges(text: &str) -> Vec<(i64, i64)> {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    let bounds: Vec<i64> = numbers.filter_map(|number| number.parse().ok()).collect();
    bounds.chunks_exact(2).map(|bound| (bound[0], bound[1] - 1)).collect()
}

fn format_ranges(ranges: &[(i64, i64)]) -> String {
    let parts: Vec<String> =
        ranges.iter().map(|(first, last)| format!("[{first},{})", last + 1)).collect();
    format!("{{{}}}", parts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_round_trip_through_postgres_own_form() {
        let ranges = vec![(1_010_126_112_200_000_005, 1_010_126_112_200_000_009), (7, 7)];
        assert_eq!(parse_ranges(&format_ranges(&ranges)), ranges);
        assert_eq!(format_ranges(&[(7, 8)]), "{[7,9)}");
        assert!(parse_ranges("{}").is_empty());
    }
}
