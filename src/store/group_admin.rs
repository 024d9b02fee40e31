//! Groups as those see them who look after them: listed, moved and deleted, on nodes and in control.

use std::time::SystemTime;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::id::NodeId;
use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::group::StartAt;
use crate::store::node::{Connection, Durability, query, write};
use crate::store::param::Param;
use crate::store::sql;

/// A group as the control database has it.
#[derive(Debug, Clone)]
pub(crate) struct GroupRow {
    pub(crate) topic: String,
    pub(crate) group: String,
    pub(crate) broadcast: bool,
    pub(crate) start_at: SystemTime,
    /// How many of its consumers live.
    pub(crate) members: i64,
    pub(crate) partitions: i64,
    pub(crate) nodes: Vec<NodeId>,
}

/// All groups, or those of a topic, or one, by topic and name.
pub(crate) async fn groups(
    connection: &Connection,
    topic: Option<&TopicName>,
    group: Option<&GroupName>,
) -> Result<Vec<GroupRow>, Failed> {
    let (topic, group) = (topic.map(TopicName::as_str), group.map(GroupName::as_str));
    let rows = query(connection, sql::CONTROL_GROUPS, &[&topic, &group]).await?;
    let read = |row: &Row| GroupRow {
        topic: row.get(0),
        group: row.get(1),
        broadcast: row.get(2),
        start_at: row.get(3),
        members: row.get(4),
        partitions: row.get(5),
        nodes: nodes(&row.get::<_, Vec<i32>>(6)),
    };
    Ok(rows.iter().map(read).collect())
}

/// A group as a node has it.
#[derive(Debug, Clone)]
pub(crate) struct NodeGroupRow {
    pub(crate) topic: String,
    pub(crate) group: String,
    pub(crate) start_at: SystemTime,
}

/// The groups that a node knows, but for those of one consumer alone: all, or those of a topic, or one.
pub(crate) async fn groups_on(
    connection: &Connection,
    topic: Option<&TopicName>,
    group: Option<&GroupName>,
) -> Result<Vec<NodeGroupRow>, Failed> {
    let (topic, group) = (topic.map(TopicName::as_str), group.map(GroupName::as_str));
    let rows = query(connection, sql::GROUPS_ON, &[&topic, &group]).await?;
    let read =
        |row: &Row| NodeGroupRow { topic: row.get(0), group: row.get(1), start_at: row.get(2) };
    Ok(rows.iter().map(read).collect())
}

fn nodes(numbers: &[i32]) -> Vec<NodeId> {
    let node = |number: &i32| NodeId::new(u8::try_from(*number).ok()?).ok();
    numbers.iter().filter_map(node).collect()
}

/// A consumer as the control database has it.
#[derive(Debug, Clone)]
pub(crate) struct MemberRow {
    pub(crate) member: Uuid,
    pub(crate) host: String,
    pub(crate) pid: i32,
    pub(crate) started_at: SystemTime,
    pub(crate) heartbeat_secs: f64,
    pub(crate) unreachable: Vec<NodeId>,
    pub(crate) live: bool,
}

/// A group's consumers, also those that fell silent a while ago.
pub(crate) async fn members(
    connection: &Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Vec<MemberRow>, Failed> {
    let params: [&dyn Param; 2] = [&topic.as_str(), &group.as_str()];
    let rows = query(connection, sql::CONTROL_MEMBERS, &params).await?;
    let read = |row: &Row| MemberRow {
        member: row.get(0),
        host: row.get(1),
        pid: row.get(2),
        started_at: row.get(3),
        heartbeat_secs: row.get(4),
        unreachable: nodes(&row.get::<_, Vec<i32>>(5)),
        live: row.get(6),
    };
    Ok(rows.iter().map(read).collect())
}

/// What the control database made of a group that was to be forgotten.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Forgotten {
    /// A consumer lives: nothing was done.
    pub(crate) live: bool,
    pub(crate) known: bool,
}

/// Forgets a group in the control database, unless one of its consumers lives.
pub(crate) async fn forget(
    connection: Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Forgotten, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let rows = write(connection, Durability::Durable, sql::CONTROL_DELETE_GROUP, &[&topic, &group])
        .await?;
    let read = |row: &Row| Forgotten { live: row.get(0), known: row.get(1) };
    Ok(rows.first().map_or(Forgotten { live: false, known: false }, read))
}

/// Tells the group's running consumers to look at their cursors.
pub(crate) async fn tell(
    connection: Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<(), Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let tell = sql::CONTROL_TELL_GROUP;
    write(connection, Durability::Relaxed, tell, &[&topic, &group]).await.map(drop)
}

/// A cursor that was to be moved by a seek.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SoughtRow {
    pub(crate) partition: i32,
    pub(crate) before_id: i64,
    pub(crate) acked_id: i64,
    /// False where another transaction has locked it.
    pub(crate) moved: bool,
}

/// Moves a group's cursors in these partitions of a node, where nobody has locked them.
pub(crate) async fn seek(
    connection: Connection,
    topic: &TopicName,
    group: &GroupName,
    partitions: &[i32],
    to: StartAt,
) -> Result<Vec<SoughtRow>, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let latest = to.at.is_none() && to.id.is_none();
    let params: [&dyn Param; 6] = [&topic, &group, &partitions, &to.at, &to.id, &latest];
    let rows = write(connection, Durability::Durable, sql::SEEK, &params).await?;
    let read = |row: &Row| SoughtRow {
        partition: row.get(0),
        before_id: row.get(1),
        acked_id: row.get(2),
        moved: row.get(3),
    };
    Ok(rows.iter().map(read).collect())
}

/// What a node made of a group that was to be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deleted {
    Yes,
    Unknown,
    /// A consumer's lease is not over: nothing was done.
    Live,
}

/// Forgets a group on a node, unless a consumer of it has a lease there.
pub(crate) async fn delete(
    connection: Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Deleted, Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let rows = write(connection, Durability::Durable, sql::DELETE_GROUP, &[&topic, &group]).await?;
    Ok(match rows.first().map(|row| row.get::<_, &str>(0)) {
        Some("deleted") => Deleted::Yes,
        Some("live") => Deleted::Live,
        _ => Deleted::Unknown,
    })
}
