//! A topic's partitions on a node.

use tokio_postgres::Row;
use uuid::Uuid;

use crate::id::PartitionId;
use crate::name::TopicName;
use crate::store::failed::Failed;
use crate::store::node::{Connection, query};
use crate::store::param::Param;
use crate::store::sql;

/// Those of these partitions that a node does not have of a topic.
pub(crate) async fn lost(
    connection: &Connection,
    topic: Uuid,
    partitions: &[PartitionId],
) -> Result<Vec<PartitionId>, Failed> {
    let numbers: Vec<i32> = partitions.iter().map(|partition| partition.as_i32()).collect();
    let params: [&dyn Param; 2] = [&numbers, &topic];
    let rows = query(connection, sql::PARTITIONS_LOST, &params).await?;
    Ok(rows.iter().filter_map(|row| PartitionId::from_i32(row.get(0)).ok()).collect())
}

/// A partition as its node has it.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) partition: PartitionId,
    pub(crate) topic: TopicName,
    pub(crate) id: Uuid,
    pub(crate) generation: i32,
    pub(crate) is_deleted: bool,
    pub(crate) has_messages: bool,
}

/// All partitions of a node, with those that were deleted.
pub(crate) async fn held(connection: &Connection) -> Result<Vec<Held>, Failed> {
    let rows = query(connection, sql::PARTITIONS_HERE, &[]).await?;
    let read = |row: &Row| {
        Some(Held {
            partition: PartitionId::from_i32(row.get(0)).ok()?,
            topic: TopicName::new(row.get(1)).ok()?,
            id: row.get(2),
            generation: row.get(3),
            is_deleted: row.get(4),
            has_messages: row.get(5),
        })
    };
    Ok(rows.iter().filter_map(read).collect())
}
