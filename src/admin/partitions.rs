//! Partitions on their nodes: taken and given back, on some nodes at a time.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt};
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::node::{Connection, Durability, write};
use crate::store::param::Param;
use crate::store::{control, sql};
use crate::topology::Topology;

/// How many nodes make or drop tables at once. A transaction holds some locks for each table that
/// it makes, 99 at most, and the nodes may be databases of one server, which has room for so many
/// locks: 6,400 by default, five a table.
const AT_ONCE: usize = 8;

/// A topic that is being made.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewTopic<'a> {
    pub(super) name: &'a TopicName,
    pub(super) id: Uuid,
    pub(super) generation: i32,
    /// The version of the topology that it comes with.
    pub(super) version: i64,
}

impl<'a> NewTopic<'a> {
    pub(super) fn identity(&self) -> (&'a TopicName, Uuid, i32) {
        (self.name, self.id, self.generation)
    }
}

/// The partitions that the control database has given away, by node.
pub(super) type Given = BTreeMap<NodeId, Vec<PartitionId>>;

impl Cluster {
    /// Takes so many partitions on each node, and none where one of the nodes has not enough. The
    /// change of the topology stays open meanwhile, however many nodes there are.
    pub(super) async fn claim_all(
        &self,
        change: &Connection,
        topic: NewTopic<'_>,
        shares: BTreeMap<NodeId, usize>,
        given: &Given,
    ) -> Result<BTreeMap<NodeId, Vec<PartitionId>>> {
        let nodes: Vec<NodeId> = shares.keys().copied().collect();
        let claims = shares.into_iter().map(|(node, count)| self.claim(topic, node, count, given));
        let mut claims = stream::iter(claims).buffer_unordered(AT_ONCE);
        let (mut by_node, mut failed) = (BTreeMap::new(), None);
        // All claims are waited for, so that each one is taken back where another fails.
        while let Some(claimed) = claims.next().await {
            match claimed {
                Ok((node, partitions)) => drop(by_node.insert(node, partitions)),
                Err(error) => failed = failed.or(Some(error)),
            }
            if let Err(error) = self.stay(change).await {
                failed = failed.or(Some(error));
            }
        }
        match failed {
            None => Ok(by_node),
            Some(error) => {
                self.unclaim_all(topic.id, nodes).await;
                Err(error)
            }
        }
    }

    /// Takes back the claims for a topic that is not made. Where this fails, the next attempt to
    /// make a topic of that name takes the claims over, or a repair frees them.
    async fn unclaim_all(&self, topic: Uuid, nodes: Vec<NodeId>) {
        let undone = nodes.into_iter().map(|node| async move {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let undone =
                write(connection, Durability::Durable, sql::UNCLAIM_PARTITIONS, &[&topic]).await;
            undone.map_err(|error| refused(error, &format!("give partitions of node {node} back")))
        });
        let mut undone = stream::iter(undone).buffer_unordered(AT_ONCE);
        while let Some(done) = undone.next().await {
            if let Err(error) = done {
                tracing::warn!(error = %error.chain(), "partitions of a topic that was not made stay for now");
            }
        }
    }

    async fn claim(
        &self,
        topic: NewTopic<'_>,
        node: NodeId,
        count: usize,
        given: &Given,
    ) -> Result<(NodeId, Vec<PartitionId>)> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let wanted = i32::try_from(count).unwrap_or(i32::MAX);
        let given = given.get(&node).into_iter().flatten();
        let given: Vec<i32> = given.map(|partition| partition.as_i32()).collect();
        let NewTopic { name, id, generation, version } = topic;
        let params: [&dyn Param; 6] = [&name.as_str(), &id, &generation, &wanted, &version, &given];
        let rows = write(connection, Durability::Durable, sql::CLAIM_PARTITIONS, &params)
            .await
            .map_err(|error| {
                let what = format!("take partitions on node {node}");
                match error.code() {
                    // Numbers are free again a day after their partition was deleted.
                    Some(&SqlState::CONFIGURATION_LIMIT_EXCEEDED) => {
                        Error::with_source(ErrorKind::Full, what, error)
                    }
                    Some(&SqlState::OBJECT_IN_USE) => unknown_messages(name, node),
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
            self.drop_on(node, &partitions, topology).await
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
        topology: &Topology,
    ) -> Result<()> {
        let topic = &topology.topic;
        for partition in partitions {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let params: [&dyn Param; 2] = [&partition.as_i32(), &topology.id];
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

/// A topic of this name has messages on a node, and the control database does not know it.
pub(super) fn unknown_messages(name: &TopicName, node: NodeId) -> Error {
    let what = format!(
        "node {node} has messages of a topic {name} that the control database does not know: `shardmq \
         repair` takes it back, and then it can be deleted too"
    );
    Error::new(ErrorKind::Conflict, what)
}
