//! Looking at groups, and deleting them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;

use crate::admin::PartitionLag;
use crate::admin::rows::read_lag;
use crate::cluster::Cluster;
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, NodeId, PartitionId};
use crate::name::{GroupName, TopicName, nearest};
use crate::store::connect::refused;
use crate::store::group_admin::{self, Deleted, GroupRow, MemberRow, NodeGroupRow};
use crate::store::node::query;
use crate::store::param::Param;
use crate::store::sql;

/// How long a node may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(5);
/// The same where it waits for cursors that others have locked, 5 s at most.
const DELETE: Duration = Duration::from_secs(10);

/// A group as lists show it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// Its topic.
    pub topic: TopicName,
    /// Its name.
    pub group: GroupName,
    /// Whether it is of one consumer alone, and goes when that has gone.
    pub broadcast: bool,
    /// When its first message may have been appended, at the earliest: 1970 where it began with the
    /// first that was there.
    pub start_at: SystemTime,
    /// Its live consumers, without those that know SQL alone.
    pub members: usize,
    /// The partitions of its topic.
    pub partitions: usize,
    /// Those of them that the lag is not known of: their node did not answer, or the group has not
    /// come to them yet.
    pub unknown: usize,
    /// Messages that are not acknowledged, in the others.
    pub lag: u64,
    /// The age of the oldest of them, in seconds.
    pub lag_secs: Option<f64>,
}

/// A group with its consumers and partitions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Its topic.
    pub topic: TopicName,
    /// Its name.
    pub group: GroupName,
    /// Whether it is of one consumer alone, and goes when that has gone.
    pub broadcast: bool,
    /// When its first message may have been appended, at the earliest: 1970 where it began with the
    /// first that was there.
    pub start_at: SystemTime,
    /// Its consumers in the order in which they joined: those that live, and those that fell silent
    /// and still have partitions. Consumers that know SQL alone are not among them, but own
    /// partitions.
    pub members: Vec<MemberInfo>,
    /// The topic's partitions, in rising order.
    pub partitions: Vec<GroupPartition>,
}

/// A consumer of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Its id, as [`ConsumerHandle::member`](crate::ConsumerHandle::member) tells.
    pub member: String,
    /// The machine that it runs on.
    pub host: String,
    /// Its process there.
    pub pid: i32,
    /// When it joined.
    pub started_at: SystemTime,
    /// The age of its last heartbeat, in seconds.
    pub heartbeat_secs: f64,
    /// Whether that is within its lease, and nobody has found that it died.
    pub live: bool,
    /// The partitions that it has, on the nodes that answered.
    pub partitions: Vec<PartitionId>,
    /// Nodes that it says it does not reach.
    pub unreachable: Vec<NodeId>,
}

/// How far a group is in a partition, and who has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupPartition {
    /// The partition.
    pub partition: PartitionId,
    /// The node that stores it.
    pub node: NodeId,
    /// Whose it is.
    pub state: CursorState,
    /// The consumer that has it, or had it when its lease ended.
    pub member: Option<String>,
    /// How often it was taken by a consumer.
    pub epoch: Option<i64>,
    /// How often the group was moved by a seek here.
    pub reset_epoch: Option<i64>,
    /// Everything up to this id is acknowledged; none at the very beginning.
    pub acked_id: Option<MessageId>,
    /// The partition's last message.
    pub last_id: Option<MessageId>,
    /// Messages that are not acknowledged.
    pub lag: Option<u64>,
    /// The age of the oldest of them, in seconds.
    pub lag_secs: Option<f64>,
}

/// Whose a partition is, in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CursorState {
    /// A consumer's whose lease is live.
    Owned,
    /// A consumer's whose lease is over: another may take it.
    LeaseOver,
    /// Nobody's.
    Free,
    /// The group has not come to it yet.
    New,
    /// Its node did not answer.
    Unreachable,
}

impl fmt::Display for CursorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owned => "owned",
            Self::LeaseOver => "lease over",
            Self::Free => "free",
            Self::New => "new",
            Self::Unreachable => "unreachable",
        })
    }
}

/// The lags of each group of each topic.
type Lags = HashMap<(String, String), Vec<PartitionLag>>;

impl Cluster {
    /// The groups of a topic, or of all topics (none), by topic and name, also those that only
    /// nodes know, since nothing but SQL has consumed in them. Their lag is computed: no message is
    /// counted. A node that does not answer within 5 s is no error:
    /// [`unknown`](GroupSummary::unknown) says how much is missing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such topic, [`ErrorKind::Unavailable`] without the
    /// control database.
    pub async fn groups(&self, topic: Option<&str>) -> Result<Vec<GroupSummary>> {
        let topic = topic.map(TopicName::new).transpose()?;
        let nodes: Vec<NodeId> = match &topic {
            Some(topic) => self.topology(topic).await?.by_node().into_keys().collect(),
            None => self.inner.nodes.refresh().await?.into_iter().map(|(node, _)| node).collect(),
        };
        let mut known = self.known_groups(topic.as_ref(), None).await?;
        let asked = nodes.into_iter().map(|node| {
            let on_node = known.iter().filter(|group| group.nodes.contains(&node));
            let topics = on_node.map(|group| group.topic.clone()).collect();
            self.groups_on(node, topic.as_ref(), topics)
        });
        let (mut lags, mut found) = (Lags::new(), Vec::new());
        for (groups, on_node) in join_all(asked).await {
            found.extend(groups);
            for (topic, lag) in on_node {
                lags.entry((topic, lag.group.clone())).or_default().push(lag);
            }
        }
        self.add_found(&mut known, found).await?;
        known.into_iter().map(|group| summary(group, &lags)).collect()
    }

    /// The groups that a node knows, and the lag in these topics and in theirs. Topic by topic; a
    /// node that does not answer is not asked for the others.
    async fn groups_on(
        &self,
        node: NodeId,
        topic: Option<&TopicName>,
        mut topics: BTreeSet<String>,
    ) -> (Vec<NodeGroupRow>, Vec<(String, PartitionLag)>) {
        let mut all = Vec::new();
        let groups = match self.found_on(node, topic, None).await {
            Ok(groups) => groups,
            Err(error) => {
                tracing::warn!(error = %error.chain(), "lag is not known");
                return (Vec::new(), all);
            }
        };
        topics.extend(groups.iter().map(|group| group.topic.clone()));
        for topic in topics {
            let what = format!("read the lag on node {node}");
            match in_time(ANSWER, &what, self.lag_on(node, &topic)).await {
                Ok(lags) => all.extend(lags.into_iter().map(|lag| (topic.clone(), lag))),
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "lag is not known");
                    break;
                }
            }
        }
        (groups, all)
    }

    async fn found_on(
        &self,
        node: NodeId,
        topic: Option<&TopicName>,
        group: Option<&GroupName>,
    ) -> Result<Vec<NodeGroupRow>> {
        let what = format!("list the groups on node {node}");
        in_time(ANSWER, &what, async {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let found = group_admin::groups_on(&connection, topic, group).await;
            found.map_err(|error| refused(error, &what))
        })
        .await
    }

    /// Adds groups that only nodes know: consumers that know SQL alone tell their node, and nobody
    /// else.
    async fn add_found(&self, known: &mut Vec<GroupRow>, found: Vec<NodeGroupRow>) -> Result<()> {
        let mut starts: BTreeMap<(String, String), SystemTime> = BTreeMap::new();
        for NodeGroupRow { topic, group, start_at } in found {
            let first = starts.entry((topic, group)).or_insert(start_at);
            *first = start_at.min(*first);
        }
        for group in known.iter() {
            starts.remove(&(group.topic.clone(), group.group.clone()));
        }
        for ((topic, group), start_at) in starts {
            let topology = match self.topology(&TopicName::new(&topic)?).await {
                Ok(topology) => topology,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let partitions = i64::try_from(topology.partitions.len()).unwrap_or(0);
            let nodes = topology.by_node().into_keys().collect();
            let broadcast = false;
            known.push(GroupRow {
                topic,
                group,
                broadcast,
                start_at,
                members: 0,
                partitions,
                nodes,
            });
        }
        known.sort_by(|a, b| (&a.topic, &a.group).cmp(&(&b.topic, &b.group)));
        Ok(())
    }

    /// A group with its consumers, and how far it is. A node that does not answer within 5 s is no
    /// error: its partitions are shown as [unreachable](CursorState::Unreachable).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such topic or group; the message has the nearest
    /// names. [`ErrorKind::Unavailable`] without the control database.
    pub async fn group(&self, topic: &str, group: &str) -> Result<GroupInfo> {
        let (topic, group) = (TopicName::new(topic)?, GroupName::new(group)?);
        let topology = self.topology(&topic).await?;
        let mut known = self.known_groups(Some(&topic), Some(&group)).await?;
        if known.is_empty() {
            let nodes = topology.by_node().into_keys();
            let asked = nodes.map(|node| self.found_on(node, Some(&topic), Some(&group)));
            let found = join_all(asked).await.into_iter().filter_map(Result::ok).flatten();
            self.add_found(&mut known, found.collect()).await?;
        }
        let Some(known) = known.pop() else {
            return Err(self.unknown_group(&topic, &group).await);
        };
        let members = self.members_of(&topic, &group).await?;
        let by_node = topology.by_node();
        let asked = by_node.into_iter().map(|(node, partitions)| {
            let (topic, group) = (&topic, &group);
            async move {
                let what = format!("describe group {group} on node {node}");
                let found = in_time(ANSWER, &what, self.cursors_on(node, topic, group)).await;
                if let Err(error) = &found {
                    tracing::warn!(error = %error.chain(), "partitions are not known");
                }
                let found = found.ok();
                partitions.into_iter().map(move |p| described(p, found.as_deref())).collect()
            }
        });
        let partitions: Vec<Vec<GroupPartition>> = join_all(asked).await;
        let partitions: Vec<GroupPartition> = partitions.into_iter().flatten().collect();
        let members = members.into_iter().map(|member| described_member(member, &partitions));
        let members = members.filter(|m| m.live || !m.partitions.is_empty()).collect();
        let GroupRow { broadcast, start_at, .. } = known;
        Ok(GroupInfo { topic, group, broadcast, start_at, members, partitions })
    }

    async fn cursors_on(
        &self,
        node: NodeId,
        topic: &TopicName,
        group: &GroupName,
    ) -> Result<Vec<GroupPartition>> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let params: [&dyn Param; 2] = [&topic.as_str(), &group.as_str()];
        let rows = query(&connection, sql::GROUP_LAG, &params)
            .await
            .map_err(|error| refused(error, &format!("describe group {group} on node {node}")))?;
        rows.iter().map(read_cursor).collect()
    }

    /// Deletes a group: its cursors on all nodes, then what the control database has of it. A
    /// consumer that joins a group of that name later begins anew, where it is told to
    /// [start](crate::Start).
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] while a consumer lives; one that was killed does for as long as its
    /// lease. [`ErrorKind::NotFound`] where nobody knows the group. Where a node can't be reached,
    /// or another transaction has locked one of the cursors for 5 s, the other nodes have deleted
    /// the group, and the control database still has it: call it again.
    pub async fn delete_group(&self, topic: &str, group: &str) -> Result<()> {
        let (topic, group) = (TopicName::new(topic)?, GroupName::new(group)?);
        let nodes = self.topology(&topic).await?.by_node();
        if self.members_of(&topic, &group).await?.iter().any(|member| member.live) {
            return Err(still_live(&topic, &group));
        }
        let deleted = nodes.into_keys().map(|node| self.delete_group_on(node, &topic, &group));
        let deleted: Vec<Deleted> =
            join_all(deleted).await.into_iter().collect::<Result<Vec<_>>>()?;
        if deleted.contains(&Deleted::Live) {
            return Err(still_live(&topic, &group));
        }
        let connection = self.inner.control.get().await?;
        let forgotten = group_admin::forget(connection, &topic, &group)
            .await
            .map_err(|error| refused(error, &format!("delete group {group} of topic {topic}")))?;
        if forgotten.live {
            return Err(still_live(&topic, &group));
        }
        if !forgotten.known && !deleted.contains(&Deleted::Yes) {
            return Err(self.unknown_group(&topic, &group).await);
        }
        Ok(())
    }

    async fn delete_group_on(
        &self,
        node: NodeId,
        topic: &TopicName,
        group: &GroupName,
    ) -> Result<Deleted> {
        let what = format!("delete group {group} of topic {topic} on node {node}");
        in_time(DELETE, &what, async {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let deleted = group_admin::delete(connection, topic, group).await;
            deleted.map_err(|error| refused(error, &what))
        })
        .await
    }

    async fn known_groups(
        &self,
        topic: Option<&TopicName>,
        group: Option<&GroupName>,
    ) -> Result<Vec<GroupRow>> {
        in_time(ANSWER, "list the groups", async {
            let connection = self.inner.control.get().await?;
            let known = group_admin::groups(&connection, topic, group).await;
            known.map_err(|error| refused(error, "list the groups"))
        })
        .await
    }

    async fn members_of(&self, topic: &TopicName, group: &GroupName) -> Result<Vec<MemberRow>> {
        let what = format!("list the consumers of group {group}");
        in_time(ANSWER, &what, async {
            let connection = self.inner.control.get().await?;
            let members = group_admin::members(&connection, topic, group).await;
            members.map_err(|error| refused(error, &what))
        })
        .await
    }

    /// Says that there is no such group, and which ones have the nearest names.
    pub(super) async fn unknown_group(&self, topic: &TopicName, group: &GroupName) -> Error {
        match self.known_groups(Some(topic), None).await {
            Ok(known) => {
                let names = known.into_iter().map(|known| known.group).collect();
                let hint = nearest(group.as_str(), names);
                let what = format!("group {group} of topic {topic} does not exist; {hint}");
                Error::new(ErrorKind::NotFound, what)
            }
            Err(error) => error,
        }
    }
}

fn still_live(topic: &TopicName, group: &GroupName) -> Error {
    let what = format!("group {group} of topic {topic} has live consumers");
    Error::new(ErrorKind::Conflict, what)
}

fn summary(row: GroupRow, lags: &Lags) -> Result<GroupSummary> {
    let (topic, group) = (TopicName::new(&row.topic)?, GroupName::new(&row.group)?);
    let lags = lags.get(&(row.topic, row.group)).map_or(&[][..], Vec::as_slice);
    let partitions = usize::try_from(row.partitions).unwrap_or(0);
    Ok(GroupSummary {
        topic,
        group,
        broadcast: row.broadcast,
        start_at: row.start_at,
        members: usize::try_from(row.members).unwrap_or(0),
        partitions,
        unknown: partitions.saturating_sub(lags.len()),
        lag: lags.iter().map(|lag| lag.lag).sum(),
        lag_secs: lags.iter().filter_map(|lag| lag.lag_secs).reduce(f64::max),
    })
}

fn read_cursor(row: &Row) -> Result<GroupPartition> {
    let lag = read_lag(row)?;
    let state = match (&lag.member, row.get(10)) {
        (None, _) => CursorState::Free,
        (Some(_), true) => CursorState::Owned,
        (Some(_), false) => CursorState::LeaseOver,
    };
    Ok(GroupPartition {
        partition: lag.partition,
        node: lag.partition.node(),
        state,
        member: lag.member,
        epoch: row.get(8),
        reset_epoch: row.get(9),
        acked_id: lag.acked_id,
        last_id: lag.last_id,
        lag: Some(lag.lag),
        lag_secs: lag.lag_secs,
    })
}

/// What a node said of a partition, or that it did not.
fn described(partition: PartitionId, found: Option<&[GroupPartition]>) -> GroupPartition {
    let known = found.and_then(|found| found.iter().find(|known| known.partition == partition));
    let state = if found.is_some() { CursorState::New } else { CursorState::Unreachable };
    known.cloned().unwrap_or_else(|| GroupPartition {
        partition,
        node: partition.node(),
        state,
        member: None,
        epoch: None,
        reset_epoch: None,
        acked_id: None,
        last_id: None,
        lag: None,
        lag_secs: None,
    })
}

fn described_member(row: MemberRow, partitions: &[GroupPartition]) -> MemberInfo {
    let member = row.member.to_string();
    let own = partitions.iter().filter(|p| p.member.as_ref() == Some(&member));
    let partitions = own.map(|p| p.partition).collect();
    MemberInfo {
        member,
        host: row.host,
        pid: row.pid,
        started_at: row.started_at,
        heartbeat_secs: row.heartbeat_secs,
        live: row.live,
        partitions,
        unreachable: row.unreachable,
    }
}
