//! Members of groups in the control database: signs of life, and who has which partition.

use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use uuid::Uuid;

use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::node::{Connection, Durability, query, write};
use crate::store::param::Param;
use crate::store::sql;

/// What a member tells of itself.
#[derive(Debug, Clone)]
pub(crate) struct Sign<'a> {
    pub(crate) member: Uuid,
    pub(crate) host: &'a str,
    pub(crate) lease_secs: f64,
    /// The only partitions that it takes.
    pub(crate) only: Option<Vec<i32>>,
    /// Nodes that it does not reach.
    pub(crate) unreachable: Vec<i32>,
    /// Nodes whose partitions others should have.
    pub(crate) avoid: Vec<i32>,
    /// The `application_name` of its process' listening session.
    pub(crate) session: Option<String>,
}

/// What the others have found of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Listed,
    /// It was silent for too long.
    LeftOut,
    /// Its process has died.
    Died,
}

/// A member as the control database has it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) member: Uuid,
    pub(crate) only: Option<Vec<i32>>,
    pub(crate) unreachable: Vec<i32>,
    pub(crate) avoid: Vec<i32>,
    pub(crate) heartbeat_at: SystemTime,
    pub(crate) standing: Standing,
    /// Nothing was heard of it for a third of its lease, by the control database's clock.
    pub(crate) silent: bool,
    /// The same for so long that its leases are over.
    pub(crate) long_silent: bool,
    pub(crate) lease: Duration,
    /// Its process' session is not there.
    pub(crate) missing: bool,
}

/// The answer to a heartbeat.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    /// The members of the group, in order, the asking one among them.
    pub(crate) members: Vec<Seen>,
    /// The version and basis of the assignment, if there is one.
    pub(crate) assignment: Option<(i64, String)>,
}

/// A consumer's sign of life. None where the control database does not have the topic, or has
/// another one of its name: then the consumer is in no group.
pub(crate) async fn heartbeat(
    connection: Connection,
    ((topic, id), group): ((&TopicName, Uuid), &GroupName),
    sign: &Sign<'_>,
) -> Result<Option<Heard>, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let Sign { member, host, lease_secs, only, unreachable, avoid, session } = sign;
    let params: [&dyn Param; 11] =
        [member, &topic, &group, host, &pid, lease_secs, only, unreachable, avoid, session, &id];
    let rows = write(connection, Durability::Relaxed, sql::CONTROL_HEARTBEAT, &params).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let version = first.get::<_, Option<i64>>(9);
    let assignment = version.zip(first.get(10));
    Ok(Some(Heard { members: rows.iter().map(read_member).collect(), assignment }))
}

fn read_member(row: &Row) -> Seen {
    Seen {
        member: row.get(0),
        only: row.get(1),
        unreachable: row.get(2),
        avoid: row.get(3),
        heartbeat_at: row.get(4),
        standing: match (row.get(5), row.get(6)) {
            (false, _) => Standing::Listed,
            (true, false) => Standing::LeftOut,
            (true, true) => Standing::Died,
        },
        silent: row.get(7),
        missing: row.get(8),
        long_silent: row.get(11),
        lease: Duration::try_from_secs_f64(row.get(12)).unwrap_or_default(),
    }
}

/// Leaves a member out, if nothing was heard of it since.
pub(crate) async fn bury(
    connection: Connection,
    member: Uuid,
    heartbeat_at: SystemTime,
    died: bool,
) -> Result<bool, Failed> {
    let params: [&dyn Param; 3] = [&member, &heartbeat_at, &died];
    let rows = write(connection, Durability::Relaxed, sql::CONTROL_BURY, &params).await?;
    Ok(!rows.is_empty())
}

/// A consumer that leaves, for good: no heartbeat of it counts any more.
pub(crate) async fn leave(
    connection: Connection,
    ((topic, id), group): ((&TopicName, Uuid), &GroupName),
    member: Uuid,
) -> Result<(), Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let params: [&dyn Param; 4] = [&member, &topic, &group, &id];
    write(connection, Durability::Relaxed, sql::CONTROL_LEAVE, &params).await.map(drop)
}

/// Who has which partition, as it was agreed upon.
#[derive(Debug, Clone, Default)]
pub(crate) struct Assignment {
    /// Rises with each; 0 where there was none.
    pub(crate) version: i64,
    /// What it was computed from, in short.
    pub(crate) basis: String,
    pub(crate) members: Vec<Uuid>,
    pub(crate) partitions: Vec<i32>,
    /// The place in `members`, from 1, by partition; 0 where it has no owner.
    pub(crate) owners: Vec<i32>,
}

/// The assignment of a group, if there is one.
pub(crate) async fn assignment(
    connection: &Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Option<Assignment>, Failed> {
    let params: [&dyn Param; 2] = [&topic.as_str(), &group.as_str()];
    let rows = query(connection, sql::CONTROL_ASSIGNMENT, &params).await?;
    let read = |row: &Row| Assignment {
        version: row.get(0),
        basis: row.get(1),
        members: row.get(2),
        partitions: row.get(3),
        owners: row.get(4),
    };
    Ok(rows.first().map(read))
}

/// Forgets members and broadcast groups that are gone for good, if nobody has within a minute.
pub(crate) async fn sweep(connection: Connection) -> Result<(), Failed> {
    write(connection, Durability::Relaxed, sql::CONTROL_SWEEP, &[]).await.map(drop)
}

/// Records an assignment in the place of the version before; false where another one was first, or
/// the topic is gone.
pub(crate) async fn assign(
    connection: Connection,
    ((topic, id), group): ((&TopicName, Uuid), &GroupName),
    next: &Assignment,
) -> Result<bool, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let before = next.version - 1;
    let Assignment { basis, members, partitions, owners, .. } = next;
    let params: [&dyn Param; 8] =
        [&topic, &group, &before, basis, members, partitions, owners, &id];
    let rows = write(connection, Durability::Durable, sql::CONTROL_ASSIGN, &params).await?;
    Ok(!rows.is_empty())
}
