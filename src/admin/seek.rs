//! Moving a group to another position.
//!
//! ```text
//! resolve the target ─> each node: move ── locked ──> again, for 5 s ─> left
//!                                   └──── moved ───> running consumers are told
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::admin::groups::ANSWER;
use crate::cluster::Cluster;
use crate::consumer::{Start, start};
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, NodeId, PartitionId};
use crate::name::{GroupName, TopicName};
use crate::store::connect::refused;
use crate::store::group::StartAt;
use crate::store::group_admin::{self, SoughtRow};
use crate::topology::Topology;

/// For how long cursors are tried that another transaction has locked.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(50);

/// A group that was moved, in one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sought {
    /// The partition.
    pub partition: PartitionId,
    /// Everything up to this id was acknowledged before; none before the first message of a day.
    pub before_id: Option<MessageId>,
    /// Everything up to this id counts as acknowledged now; none before the first message of a day.
    pub acked_id: Option<MessageId>,
}

impl Cluster {
    /// Moves a group: consuming goes on at `target`, in all partitions of the topic or in these. Its
    /// consumers may run: what they received before is void, their acknowledgements of it are refused
    /// with [`ErrorKind::Reset`], and they keep their partitions. Returns what was moved, in order of
    /// the partitions.
    ///
    /// Each partition moves by itself, and stays moved where others fail: a call that failed may be
    /// made again. The same holds for a future that was dropped.
    ///
    /// Messages that failed and are parked are no part of the position: they come all the same, besides what is
    /// read again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such group, or a partition is not the topic's.
    /// [`ErrorKind::Timeout`] where another transaction had locked cursors for 5 s, such as one that
    /// commits acknowledgements together with its own work: the message names their partitions. Nodes
    /// that can't be reached are named in an error of its kind, after all others were moved.
    pub async fn seek(
        &self,
        topic: &str,
        group: &str,
        target: Start,
        partitions: Option<&[PartitionId]>,
    ) -> Result<Vec<Sought>> {
        let (topic, group) = (TopicName::new(topic)?, GroupName::new(group)?);
        let topology = self.topology(&topic).await?;
        let chosen = chosen(&topology, target, partitions)?;
        let known = match start::recorded(self, &topology, &group).await? {
            Some(known) => Some(known),
            // Consumers that know SQL alone tell their node, and nobody else.
            None => start::on_nodes(self, &topology, &group).await,
        };
        let Some(known) = known else {
            return Err(self.unknown_group(&topic, &group).await);
        };
        let what = format!("seek group {group} of topic {topic}");
        let to = in_time(ANSWER, &what, start::of(self, target)).await?;
        let seek = Seek { cluster: self, topology: &topology, group: &group, known, to, what };
        let ends = chosen.into_iter().map(|(node, partitions)| seek.on(node, partitions));
        let ends = join_all(ends).await;
        seek.tell_consumers(&ends).await;
        seek.outcome(ends)
    }
}

/// The partitions to move, by node.
fn chosen(
    topology: &Topology,
    target: Start,
    partitions: Option<&[PartitionId]>,
) -> Result<BTreeMap<NodeId, Vec<PartitionId>>> {
    if partitions.is_some_and(<[_]>::is_empty) {
        return Err(Error::invalid("the list of partitions to move is empty"));
    }
    let of_target = match target {
        Start::Id(id) => Some(id.partition()),
        _ => None,
    };
    let mut named = partitions.unwrap_or_default().iter().chain(&of_target);
    if let Some(stranger) = named.find(|p| !topology.partitions.contains(p)) {
        let what = format!("partition {stranger} is not one of topic {}", topology.topic);
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    let mut chosen = topology.by_node();
    if let Some(wanted) = partitions {
        chosen.retain(|_, on_node| {
            on_node.retain(|partition| wanted.contains(partition));
            !on_node.is_empty()
        });
    }
    Ok(chosen)
}

/// A seek under way.
struct Seek<'a> {
    cluster: &'a Cluster,
    topology: &'a Topology,
    group: &'a GroupName,
    /// Where the group starts: for nodes that do not know it yet.
    known: start::GroupStart,
    to: StartAt,
    what: String,
}

/// How it ended on one node.
struct End {
    node: NodeId,
    moved: Vec<Sought>,
    /// Partitions that were not moved.
    left: Vec<PartitionId>,
    failed: Option<Error>,
}

impl Seek<'_> {
    /// Moves the group on a node, until all is moved or the patience is over.
    async fn on(&self, node: NodeId, mut left: Vec<PartitionId>) -> End {
        let until = Instant::now() + PATIENCE;
        let mut moved: Vec<Sought> = Vec::new();
        loop {
            match self.once(node, &left).await {
                Ok(rows) => moved.extend(rows.iter().filter_map(read_sought)),
                Err(error) => return End { node, moved, left, failed: Some(error) },
            }
            left.retain(|partition| moved.iter().all(|sought| sought.partition != *partition));
            if left.is_empty() || Instant::now() >= until {
                return End { node, moved, left, failed: None };
            }
            sleep(AGAIN).await;
        }
    }

    async fn once(&self, node: NodeId, partitions: &[PartitionId]) -> Result<Vec<SoughtRow>> {
        let Self { cluster, topology, group, .. } = *self;
        let numbers: Vec<i32> = partitions.iter().map(|p| p.as_i32()).collect();
        let what = format!("{} on node {node}", self.what);
        in_time(ANSWER, &what, async {
            // It may have been away when the group began.
            self.known.tell(cluster, topology, group, node).await?;
            let connection = cluster.inner.nodes.node(node).await?.get().await?;
            let topic = &topology.topic;
            let rows = group_admin::seek(connection, topic, group, &numbers, self.to).await;
            rows.map_err(|error| refused(error, &what))
        })
        .await
    }

    /// Consumers that hear of it look at once; all others when they next look at their leases.
    async fn tell_consumers(&self, ends: &[End]) {
        // Of those that failed nobody knows whether they were moved.
        let failed = ends.iter().filter(|end| end.failed.is_some()).flat_map(|end| &end.left);
        let moved = ends.iter().flat_map(|end| &end.moved).map(|sought| &sought.partition);
        let partitions: Vec<PartitionId> = moved.chain(failed).copied().collect();
        if partitions.is_empty() {
            return;
        }
        let told = in_time(ANSWER, &self.what, async {
            let connection = self.cluster.inner.control.get().await?;
            let told = group_admin::tell(connection, &self.topology.topic, self.group).await;
            told.map_err(|error| refused(error, &self.what))
        });
        if let Err(error) = told.await {
            tracing::warn!(error = %error.chain(), "consumers see the seek when they next look");
        }
        self.cluster.inner.notifier.publish(&partitions);
    }

    fn outcome(&self, ends: Vec<End>) -> Result<Vec<Sought>> {
        let (mut all, mut locked) = (Vec::new(), Vec::new());
        let (mut nodes, mut cause) = (Vec::new(), None);
        for mut end in ends {
            all.append(&mut end.moved);
            match end.failed {
                Some(error) => {
                    nodes.push(end.node.to_string());
                    cause.get_or_insert(error);
                }
                None => locked.extend(end.left.iter().map(ToString::to_string)),
            }
        }
        let mut missing = Vec::new();
        if !nodes.is_empty() {
            missing.push(format!("node {} failed", nodes.join(", ")));
        }
        if !locked.is_empty() {
            let seconds = PATIENCE.as_secs();
            let list = locked.join(", ");
            missing.push(format!("another transaction has locked {list} for {seconds} s"));
        }
        let what = format!("{}: {}", self.what, missing.join(", and "));
        match cause {
            Some(cause) => Err(Error::with_source(cause.kind(), what, cause)),
            None if locked.is_empty() => {
                all.sort_by_key(|sought| sought.partition);
                Ok(all)
            }
            None => Err(Error::new(ErrorKind::Timeout, what)),
        }
    }
}

fn read_sought(row: &SoughtRow) -> Option<Sought> {
    let partition = PartitionId::from_i32(row.partition).ok().filter(|_| row.moved)?;
    let id = |number: i64| MessageId::try_from(number).ok();
    Some(Sought { partition, before_id: id(row.before_id), acked_id: id(row.acked_id) })
}
