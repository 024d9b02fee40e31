//! Makes the control database and the nodes agree again, after one of them was restored, or
//! promoted without its end.
//!
//! ```text
//! control has a partition, its node does not ─> made again on the node, empty
//! nodes have a topic, control does not ───────> with messages: put back into control; empty: its numbers are free
//! ```

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::admin::partitions::unknown_messages;
use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::control::{self, TopicDetail};
use crate::store::node::{Connection, Durability, Unfinished, write};
use crate::store::param::Param;
use crate::store::partitions::{self, Held};
use crate::store::sql;
use crate::topology::{even_slots, interleave};

/// What a [repair](Cluster::repair) has done, and what it could not do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Repaired {
    /// Partitions that their nodes had lost: they are there again, without the messages that they
    /// had.
    pub made: Vec<PartitionId>,
    /// Topics that the control database had lost: it has them again, with all their messages.
    pub put_back: Vec<TopicName>,
    /// Empty partitions of topics that were never made: their numbers are free.
    pub freed: Vec<PartitionId>,
    /// What could not be repaired, and why, one sentence each.
    pub left: Vec<String>,
}

/// What the nodes have of one topic that the control database does not know.
#[derive(Debug, Default)]
struct Unknown {
    generation: i32,
    by_node: BTreeMap<NodeId, Vec<PartitionId>>,
    has_messages: bool,
}

impl Cluster {
    /// Makes partitions again that their nodes have lost, puts topics back that the control
    /// database has lost, and frees what creations of topics have left that failed. For a node or a
    /// control database that was restored from a backup, or that is a standby promoted without its
    /// end. It does nothing where all agree, and may be called again. Not cancel safe: each step
    /// that was done stays done.
    ///
    /// The messages of partitions that are made again are lost, and their ids are used again;
    /// groups begin there as in a new partition.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where a node can't be reached: what it has is not known. Repaired
    /// nodes stay so.
    pub async fn repair(&self) -> Result<Repaired> {
        let refused = |error| refused(error, "repair the cluster");
        let change = Unfinished::new(self.inner.control.get().await?);
        let (_, version) = control::begin_change(change.connection()).await.map_err(refused)?;
        let known = known_topics(change.connection()).await?;
        let nodes = control::nodes(change.connection()).await.map_err(refused)?;
        let asked = nodes.iter().map(|(node, _)| self.held_by(*node));
        let held: Vec<Held> =
            join_all(asked).await.into_iter().collect::<Result<Vec<_>>>()?.concat();
        let mut done = Repaired::default();
        for (name, topic) in &known {
            self.make_lost(name, topic, &held, version, &mut done).await?;
        }
        for ((name, id), topic) in unknown_topics(&known, &held) {
            if topic.has_messages {
                put_back(change.connection(), &known, (&name, id), &topic, &mut done).await?;
            } else {
                self.free(id, &topic, &mut done).await?;
            }
        }
        if done == Repaired::default() {
            control::give_change_up(change.connection()).await.map_err(refused)?;
        } else {
            control::commit_change(change.connection()).await.map_err(refused)?;
        }
        change.finished();
        Ok(done)
    }

    async fn held_by(&self, node: NodeId) -> Result<Vec<Held>> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let held = partitions::held(&connection).await;
        held.map_err(|error| refused(error, &format!("list the partitions of node {node}")))
    }

    /// Partitions of a topic that their nodes do not have.
    async fn make_lost(
        &self,
        name: &TopicName,
        topic: &TopicDetail,
        held: &[Held],
        version: i64,
        done: &mut Repaired,
    ) -> Result<()> {
        for partition in &topic.partitions {
            match held.iter().find(|held| held.partition == *partition) {
                None => {}
                Some(held) if held.id == topic.id && !held.is_deleted => continue,
                Some(held) if held.id == topic.id => {
                    done.left.push(format!(
                        "partition {partition} of topic {name} was deleted: delete the topic again"
                    ));
                    continue;
                }
                Some(held) => {
                    done.left.push(format!(
                        "partition {partition} of topic {name} is one of topic {} on its node",
                        held.topic
                    ));
                    continue;
                }
            }
            let connection = self.inner.nodes.node(partition.node()).await?.get().await?;
            let (number, name) = (partition.as_i32(), name.as_str());
            let params: [&dyn Param; 5] = [&number, &name, &topic.id, &topic.generation, &version];
            let made = write(connection, Durability::Durable, sql::MAKE_PARTITION, &params).await;
            made.map_err(|error| refused(error, &format!("make partition {partition} again")))?;
            done.made.push(*partition);
        }
        Ok(())
    }

    async fn free(&self, id: Uuid, topic: &Unknown, done: &mut Repaired) -> Result<()> {
        for (node, partitions) in &topic.by_node {
            let connection = self.inner.nodes.node(*node).await?.get().await?;
            let freed =
                write(connection, Durability::Durable, sql::UNCLAIM_PARTITIONS, &[&id]).await;
            freed.map_err(|error| refused(error, &format!("free numbers of node {node}")))?;
            done.freed.extend(partitions);
        }
        Ok(())
    }

    /// Refuses to make a topic of whose name a node has messages that the control database does not
    /// know: nothing is taken up then, nor on other nodes. All nodes are asked where one of those
    /// that are chosen has partitions.
    pub(super) async fn refuse_unknown_messages(
        &self,
        name: &TopicName,
        chosen: &[NodeId],
        all: &[NodeId],
    ) -> Result<()> {
        if self.left_of(name, chosen).await?.is_empty() {
            return Ok(());
        }
        let left = self.left_of(name, all).await?;
        left.iter()
            .find(|held| held.has_messages)
            .map_or(Ok(()), |held| Err(unknown_messages(name, held.partition.node())))
    }

    /// What nodes have of topics of a name.
    async fn left_of(&self, name: &TopicName, nodes: &[NodeId]) -> Result<Vec<Held>> {
        let held = join_all(nodes.iter().map(|node| self.held_by(*node))).await;
        let mut left: Vec<Held> = held.into_iter().collect::<Result<Vec<_>>>()?.concat();
        left.retain(|held| held.topic == *name && !held.is_deleted);
        Ok(left)
    }

    /// Refuses a topic of that a node has lost partitions.
    pub(super) async fn refuse_lost(
        &self,
        node: NodeId,
        of: &[PartitionId],
        id: Uuid,
    ) -> Result<()> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let lost = partitions::lost(&connection, id, of).await;
        let lost = lost.map_err(|error| refused(error, &format!("look at node {node}")))?;
        if lost.is_empty() {
            return Ok(());
        }
        let lost: Vec<String> = lost.iter().map(ToString::to_string).collect();
        let what = format!(
            "node {node} has lost partitions {}: was it restored? `shardmq repair` makes them again",
            lost.join(", ")
        );
        Err(Error::new(ErrorKind::NotFound, what))
    }
}

async fn known_topics(change: &Connection) -> Result<Vec<(TopicName, TopicDetail)>> {
    let refused = |error| refused(error, "list the topics");
    let mut known = Vec::new();
    for row in control::topics(change).await.map_err(refused)? {
        let name = TopicName::new(&row.topic)?;
        if let Some(detail) = control::topic(change, &name).await.map_err(refused)? {
            known.push((name, detail));
        }
    }
    Ok(known)
}

fn unknown_topics(
    known: &[(TopicName, TopicDetail)],
    held: &[Held],
) -> BTreeMap<(TopicName, Uuid), Unknown> {
    let ids: BTreeSet<Uuid> = known.iter().map(|(_, topic)| topic.id).collect();
    let mut unknown: BTreeMap<(TopicName, Uuid), Unknown> = BTreeMap::new();
    for held in held.iter().filter(|held| !held.is_deleted && !ids.contains(&held.id)) {
        let topic = unknown.entry((held.topic.clone(), held.id)).or_default();
        topic.generation = topic.generation.max(held.generation);
        topic.has_messages |= held.has_messages;
        topic.by_node.entry(held.partition.node()).or_default().push(held.partition);
    }
    unknown
}

/// The map of keys is what it was when the topic was made: evenly over its partitions.
async fn put_back(
    change: &Connection,
    known: &[(TopicName, TopicDetail)],
    (name, id): (&TopicName, Uuid),
    topic: &Unknown,
    done: &mut Repaired,
) -> Result<()> {
    let partitions = || topic.by_node.values().flatten();
    let given = known.iter().find(|(_, known)| partitions().any(|p| known.partitions.contains(p)));
    if done.put_back.contains(name) || known.iter().any(|(known, _)| known == name) {
        done.left.push(format!(
            "the nodes have messages of an earlier topic {name}: delete the topic of that name to put it back"
        ));
    } else if let Some((other, _)) = given {
        done.left.push(format!("partitions of topic {name} were given to topic {other}"));
    } else {
        let slots = even_slots(&interleave(&topic.by_node));
        let recorded = control::record_topic(change, (name, id, topic.generation), &slots).await;
        recorded.map_err(|error| refused(error, &format!("put topic {name} back")))?;
        done.put_back.push(name.clone());
    }
    Ok(())
}
