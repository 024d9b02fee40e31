//! The control database: an index of the nodes, topics and groups.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use crate::id::{NodeId, PartitionId};
use crate::name::{GroupName, TopicName};
use crate::store::failed::Failed;
use crate::store::group::StartAt;
use crate::store::node::{Connection, Durability, query, query_one, write};
use crate::store::param::{Param, typed};
use crate::store::sql;
use crate::store::timeline::Primary;
use crate::topology::Version;

/// The cluster's id and the version of its topology.
pub(crate) async fn cluster(connection: &Connection) -> Result<(Uuid, Version), Failed> {
    let row = query_one(connection, sql::CONTROL_CLUSTER, &[]).await?;
    Ok((row.get(0), Version { number: row.get(1), token: row.get(2), history: row.get(3) }))
}

/// A node as the control database lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Its address, without a password.
    pub(crate) url: String,
    /// Drawn when an operator says which primary is the right one.
    pub(crate) registration: Uuid,
    /// The newest primary that was seen.
    pub(crate) primary: Option<Primary>,
}

/// All nodes.
pub(crate) async fn nodes(connection: &Connection) -> Result<Vec<(NodeId, Listed)>, Failed> {
    let rows = query(connection, sql::CONTROL_NODES, &[]).await?;
    let primary = |row: &Row| {
        let (system, timeline) = (row.get::<_, Option<i64>>(3)?, row.get::<_, Option<i64>>(4)?);
        Some(Primary { system, timeline })
    };
    let listed =
        |row: &Row| Listed { url: row.get(1), registration: row.get(2), primary: primary(row) };
    Ok(rows.iter().filter_map(|row| Some((node_of(row, 0)?, listed(row)))).collect())
}

/// Records a newer primary of a node, inside a change; false where one as new is known, or the node
/// was registered anew.
pub(crate) async fn record_newer(
    connection: &Connection,
    node: NodeId,
    registration: Uuid,
    primary: Primary,
) -> Result<bool, Failed> {
    let number = i32::from(node.number());
    let params: [&dyn Param; 4] = [&number, &registration, &primary.system, &primary.timeline];
    let rows = query(connection, sql::CONTROL_NEWER_PRIMARY, &params).await?;
    Ok(!rows.is_empty())
}

fn node_of(row: &Row, column: usize) -> Option<NodeId> {
    NodeId::new(u8::try_from(row.get::<_, i32>(column)).ok()?).ok()
}

/// The cluster's settings; none where the schema is older than they are.
pub(crate) async fn settings(connection: &Connection) -> Result<BTreeMap<String, String>, Failed> {
    match query(connection, sql::CONTROL_SETTINGS, &[]).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(BTreeMap::new()),
        Err(error) => Err(error),
        Ok(rows) => Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect()),
    }
}

/// Sets one, inside a change.
pub(crate) async fn set(connection: &Connection, name: &str, value: &str) -> Result<(), Failed> {
    query(connection, sql::CONTROL_SET, &[&name, &value]).await.map(drop)
}

/// Forgets one, inside a change.
pub(crate) async fn unset(connection: &Connection, name: &str) -> Result<(), Failed> {
    query(connection, sql::CONTROL_UNSET, &[&name]).await.map(drop)
}

/// The addresses of databases that have an outbox and are no nodes.
pub(crate) async fn outboxes(connection: &Connection) -> Result<Vec<String>, Failed> {
    let rows = query(connection, sql::CONTROL_OUTBOXES, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Records such a database, inside a change.
pub(crate) async fn add_outbox(connection: &Connection, dsn: &str) -> Result<(), Failed> {
    query(connection, sql::CONTROL_ADD_OUTBOX, &[&dsn]).await.map(drop)
}

/// Forgets such a database, inside a change; false where it was not known.
pub(crate) async fn remove_outbox(connection: &Connection, dsn: &str) -> Result<bool, Failed> {
    let rows = query(connection, sql::CONTROL_REMOVE_OUTBOX, &[&dsn]).await?;
    Ok(!rows.is_empty())
}

/// Records on which server this control database is, inside a change.
pub(crate) async fn stand(connection: &Connection, server: Option<String>) -> Result<(), Failed> {
    query(connection, sql::CONTROL_STAND, &[&server]).await.map(drop)
}

/// Says on an old primary of the control database, which some processes may take for the right one,
/// which newer primaries are known of the nodes. The server may wait for standbys that it has lost:
/// this does not.
pub(crate) async fn warn(
    old: &Client,
    newest: &[(NodeId, Uuid, Primary)],
) -> Result<(), tokio_postgres::Error> {
    old.batch_execute(sql::BEGIN_RELAXED).await?;
    for (node, registration, primary) in newest {
        let number = i32::from(node.number());
        let params: [&dyn Param; 4] = [&number, registration, &primary.system, &primary.timeline];
        old.query_typed(sql::CONTROL_NEWER_PRIMARY, &typed(&params)).await?;
    }
    old.batch_execute("commit").await?;
    old.batch_execute(sql::BEGIN_RELAXED).await?;
    old.query_typed(sql::CONTROL_TELL_PRIMARIES, &[]).await?;
    old.batch_execute("commit").await
}

/// Records a node's address and its primary, inside a change.
pub(crate) async fn add_node(
    connection: &Connection,
    node: NodeId,
    dsn: &str,
    primary: Option<Primary>,
) -> Result<(), Failed> {
    let number = i32::from(node.number());
    let (system, timeline) = (primary.map(|on| on.system), primary.map(|on| on.timeline));
    query(connection, sql::CONTROL_ADD_NODE, &[&number, &dsn, &system, &timeline]).await.map(drop)
}

/// The topics that have partitions on a node.
pub(crate) async fn topics_on(
    connection: &Connection,
    node: NodeId,
) -> Result<Vec<String>, Failed> {
    let number = i32::from(node.number());
    let rows = query(connection, sql::CONTROL_TOPICS_ON, &[&number]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Removes a node, inside a change.
pub(crate) async fn forget_node(connection: &Connection, node: NodeId) -> Result<(), Failed> {
    let number = i32::from(node.number());
    query(connection, sql::CONTROL_FORGET_NODE, &[&number]).await.map(drop)
}

/// Which of these topics exist.
pub(crate) async fn existing(
    connection: &Connection,
    topics: &[String],
) -> Result<HashSet<String>, Failed> {
    let rows = query(connection, sql::CONTROL_EXISTING, &[&topics]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A topic as the list shows it.
#[derive(Debug, Clone)]
pub(crate) struct TopicRow {
    pub(crate) topic: String,
    pub(crate) generation: i32,
    pub(crate) partitions: i64,
    pub(crate) created_at: SystemTime,
}

/// All topics, by name.
pub(crate) async fn topics(connection: &Connection) -> Result<Vec<TopicRow>, Failed> {
    let rows = query(connection, sql::CONTROL_TOPICS, &[]).await?;
    let read = |row: &Row| TopicRow {
        topic: row.get(0),
        generation: row.get(1),
        partitions: row.get(2),
        created_at: row.get(3),
    };
    Ok(rows.iter().map(read).collect())
}

/// A topic with its partitions and the map of its key slots.
#[derive(Debug, Clone)]
pub(crate) struct TopicDetail {
    pub(crate) id: Uuid,
    pub(crate) generation: i32,
    pub(crate) created_at: SystemTime,
    pub(crate) partitions: Vec<PartitionId>,
    /// First slot, last slot, partition.
    pub(crate) slots: Vec<(u16, u16, PartitionId)>,
}

/// One topic; `None` where there is none of that name.
pub(crate) async fn topic(
    connection: &Connection,
    topic: &TopicName,
) -> Result<Option<TopicDetail>, Failed> {
    let name = topic.as_str();
    let rows = query(connection, sql::CONTROL_TOPIC, &[&name]).await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    let generation: i32 = row.get(0);
    let partitions = query(connection, sql::CONTROL_PARTITIONS, &[&name]).await?;
    let slots = query(connection, sql::CONTROL_SLOTS, &[&name, &generation]).await?;
    let slot = |row: &Row, column: usize| u16::try_from(row.get::<_, i32>(column)).unwrap_or(0);
    Ok(Some(TopicDetail {
        id: row.get(2),
        generation,
        created_at: row.get(1),
        partitions: partitions
            .iter()
            .filter_map(|row| PartitionId::from_i32(row.get(0)).ok())
            .collect(),
        slots: slots
            .iter()
            .filter_map(|row| {
                Some((slot(row, 0), slot(row, 1), PartitionId::from_i32(row.get(2)).ok()?))
            })
            .collect(),
    }))
}

/// The partitions that are given away, by node.
pub(crate) async fn known_partitions(
    connection: &Connection,
) -> Result<BTreeMap<NodeId, Vec<PartitionId>>, Failed> {
    let rows = query(connection, sql::CONTROL_KNOWN, &[]).await?;
    let mut known: BTreeMap<NodeId, Vec<PartitionId>> = BTreeMap::new();
    for partition in rows.iter().filter_map(|row| PartitionId::from_i32(row.get(0)).ok()) {
        known.entry(partition.node()).or_default().push(partition);
    }
    Ok(known)
}

/// How many partitions each node has.
pub(crate) async fn partition_counts(
    connection: &Connection,
) -> Result<HashMap<NodeId, usize>, Failed> {
    let rows = query(connection, sql::CONTROL_PARTITION_COUNTS, &[]).await?;
    let read = |row: &Row| {
        Some((node_of(row, 0)?, usize::try_from(row.get::<_, i64>(1)).unwrap_or(usize::MAX)))
    };
    Ok(rows.iter().filter_map(read).collect())
}

/// Begins a change of the topology: one at a time in the whole cluster, to the end of the
/// transaction on this connection. Returns the cluster's id and the version that the change makes.
pub(crate) async fn begin_change(connection: &Connection) -> Result<(Uuid, i64), Failed> {
    connection.may_commit()?;
    connection.open_transaction(sql::BEGIN_DURABLE).await?;
    stay(connection).await?;
    let row = query_one(connection, sql::CONTROL_LOCK, &[]).await?;
    Ok((row.get(0), row.get::<_, i64>(1) + 1))
}

/// Says that a change goes on: nodes are asked meanwhile, and the silence is ours, not a lost
/// client's.
pub(crate) async fn stay(connection: &Connection) -> Result<(), Failed> {
    connection.batch_execute("set local idle_in_transaction_session_timeout = '60s'").await
}

/// Ends a change that found everything as it should be. What it found may be of a commit that no
/// standby has: this one waits.
pub(crate) async fn confirm(connection: &Connection) -> Result<(), Failed> {
    connection.batch_execute(sql::PROBE).await?;
    connection.commit().await
}

/// Commits a change under a new version.
pub(crate) async fn commit_change(connection: &Connection) -> Result<(), Failed> {
    connection.batch_execute(sql::CONTROL_BUMP).await?;
    connection.commit().await
}

/// Takes a change back.
pub(crate) async fn give_change_up(connection: &Connection) -> Result<(), Failed> {
    connection.roll_back().await
}

/// Records a topic of this id and generation, inside a change.
pub(crate) async fn record_topic(
    connection: &Connection,
    topic: (&TopicName, Uuid, i32),
    slots: &[(u16, u16, PartitionId)],
) -> Result<(), Failed> {
    let (topic, id, generation) = topic;
    let partitions: Vec<i32> = slots.iter().map(|slot| slot.2.as_i32()).collect();
    let first: Vec<i32> = slots.iter().map(|slot| i32::from(slot.0)).collect();
    let last: Vec<i32> = slots.iter().map(|slot| i32::from(slot.1)).collect();
    let params: [&dyn Param; 6] = [&topic.as_str(), &partitions, &first, &last, &id, &generation];
    query(connection, sql::CONTROL_CREATE_TOPIC, &params).await.map(drop)
}

/// Removes a topic, inside a change.
pub(crate) async fn forget_topic(connection: &Connection, id: Uuid) -> Result<(), Failed> {
    query(connection, sql::CONTROL_DELETE_TOPIC, &[&id]).await.map(drop)
}

/// A group's start as it was recorded first, and whether it is this database's clock.
pub(crate) async fn group_start(
    connection: &Connection,
    topic: &TopicName,
    group: &GroupName,
) -> Result<Option<(StartAt, bool)>, Failed> {
    let params: [&dyn Param; 2] = [&topic.as_str(), &group.as_str()];
    let rows = query(connection, sql::CONTROL_GROUP_START, &params).await?;
    let read = |row: &Row| {
        (StartAt { at: Some(row.get(0)), id: row.get(1), broadcast: row.get(3) }, row.get(2))
    };
    Ok(rows.first().map(read))
}

/// Records a group's start, unless somebody did.
pub(crate) async fn make_group(
    connection: Connection,
    (topic, id): (&TopicName, Uuid),
    group: &GroupName,
    start: StartAt,
) -> Result<(), Failed> {
    let (topic, group) = (topic.as_str(), group.as_str());
    let params: [&dyn Param; 6] = [&topic, &group, &start.at, &start.id, &start.broadcast, &id];
    write(connection, Durability::Durable, sql::CONTROL_MAKE_GROUP, &params).await.map(drop)
}

/// The groups of broadcast consumers that control has heard of lately.
pub(crate) async fn live_broadcasts(connection: &Connection) -> Result<Vec<String>, Failed> {
    let rows = query(connection, sql::CONTROL_LIVE_BROADCASTS, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
