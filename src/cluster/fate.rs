//! What became of a topic that the control database does not have: its nodes know.

use futures_util::future::join_all;

use crate::cluster::nodes::{ANSWER, Nodes};
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::store::connect::refused;
use crate::store::partitions;
use crate::topology::Topology;

/// What the nodes have of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Every node that answers says that its partitions are gone, and one at least answers.
    Nothing,
    /// This node has some.
    Partitions(NodeId),
}

/// Asks all nodes of a topic for its partitions.
///
/// # Errors
/// Where no node answers, and so nothing is known.
pub(super) async fn on_nodes(nodes: &Nodes, topology: &Topology) -> Result<Found> {
    let asked = topology.by_node().into_iter().map(|(node, partitions)| async move {
        match lost_on(nodes, topology, node, &partitions).await {
            // It is no node any more: a node that has partitions can't be removed.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok((node, false)),
            lost => lost.map(|lost| (node, lost < partitions.len())),
        }
    });
    let answers: Vec<Result<(NodeId, bool)>> = join_all(asked).await;
    let found = answers.iter().filter_map(|answer| answer.as_ref().ok());
    if let Some((node, _)) = found.clone().find(|(_, has_some)| *has_some) {
        return Ok(Found::Partitions(*node));
    }
    if found.count() > 0 {
        return Ok(Found::Nothing);
    }
    let nobody = || {
        let what = format!("look up topic {}: it has no partitions", topology.topic);
        Error::new(ErrorKind::NotFound, what)
    };
    Err(answers.into_iter().find_map(Result::err).unwrap_or_else(nobody))
}

/// How many of a topic's partitions a node does not have.
async fn lost_on(
    nodes: &Nodes,
    topology: &Topology,
    node: NodeId,
    partitions: &[PartitionId],
) -> Result<usize> {
    let what = format!("look for partitions of topic {} on node {node}", topology.topic);
    let lost = in_time(ANSWER, &what, async {
        let connection = nodes.node(node).await?.get().await?;
        let lost = partitions::lost(&connection, topology.id, partitions).await;
        lost.map_err(|error| refused(error, &what))
    });
    lost.await.map(|lost| lost.len())
}
