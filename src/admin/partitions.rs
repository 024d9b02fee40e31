//! Partitions on their nodes: taken and given back, on some nodes at a time.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt};
use tokio_postgres::error::SqlState;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::node::{Connection, Durability, write};
use crate::store::param::Param;
use crate::store::{control, sql};
use crate::topology::Topology;

/// How many nodes make or drop tables at once. A transaction holds some locks for each table that it
/// makes, 99 at most, and the nodes may be databases of one server, which has room for so many locks:
/// 6,400 by default, five a table.
const AT_ONCE: usize = 8;

impl Cluster {
    /// Takes so many partitions on each node. The change of the topology stays open meanwhile, however
    /// many nodes there are.
    pub(super) async fn claim_all(
        &self,
        change: &Connection,
        topic: &TopicName,
        shares: BTreeMap<NodeId, usize>,
        version: i64,
    ) -> Result<BTreeMap<NodeId, Vec<PartitionId>>> {
        let claims =
            shares.into_iter().map(|(node, count)| self.claim(topic, node, count, version));
        let mut claims = stream::iter(claims).buffer_unordered(AT_ONCE);
        let mut by_node = BTreeMap::new();
        while let Some(claimed) = claims.next().await {
            let (node, partitions) = claimed?;
            by_node.insert(node, partitions);
            self.stay(change).await?;
        }
        Ok(by_node)
    }

    async fn claim(
        &self,
        topic: &TopicName,
        node: NodeId,
        count: usize,
        version: i64,
    ) -> Result<(NodeId, Vec<PartitionId>)> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let (name, wanted) = (topic.as_str(), i32::try_from(count).unwrap_or(i32::MAX));
        let params: [&dyn Param; 4] = [&name, &1_i32, &wanted, &version];
        let rows = write(connection, Durability::Durable, sql::CLAIM_PARTITIONS, &params)
            .await
            .map_err(|error| {
                let what = format!("take partitions on node {node}");
                match error.code() {
                    // Numbers are free again a day after their partition was deleted.
                    Some(&SqlState::CONFIGURATION_LIMIT_EXCEEDED) => {
                        Error::with_source(ErrorKind::Full, what, error)
                    }
                    _ => refused(error, &what),
                }
            })?;
        let partitions: Result<Vec<_>> =
            rows.iter().map(|row| PartitionId::from_i32(row.get(0))).collect();
        Ok((node, partitions?))
    }

    /// Drops a topic's partitions on all nodes.
    pub(super) async fn drop_all(&self, change: &Connection, topology: &Topology) -> Result<()> {
        let drops = topology.by_node().into_iter().map(|(node, partitions)| async move {
            self.drop_on(node, &partitions, &topology.topic).await
        });
        let mut drops = stream::iter(drops).buffer_unordered(AT_ONCE);
        while let Some(dropped) = drops.next().await {
            dropped?;
            self.stay(change).await?;
        }
        Ok(())
    }

    /// One after the other, each in a transaction of its own.
    async fn drop_on(
        &self,
        node: NodeId,
        partitions: &[PartitionId],
        topic: &TopicName,
    ) -> Result<()> {
        for partition in partitions {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let params: [&dyn Param; 2] = [&partition.as_i32(), &topic.as_str()];
            write(connection, Durability::Durable, sql::DELETE_PARTITION, &params).await.map_err(
                |error| refused(error, &format!("delete topic {topic}: partition {partition}")),
            )?;
        }
        Ok(())
    }

    /// Keeps a change open that has waited for a node.
    async fn stay(&self, change: &Connection) -> Result<()> {
        control::stay(change).await.map_err(|error| refused(error, "change the topology"))
    }
}
