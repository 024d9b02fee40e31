//! Looking after a cluster: nodes, topics, groups, lag, and messages for people. The command prints
//! what is defined here.

use std::collections::BTreeMap;
use std::time::SystemTime;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::admin::partitions::NewTopic;
use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, NodeId, PartitionId};
use crate::message::Headers;
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::node::{Connection, Unfinished, query};
use crate::store::{control, sql, upkeep};
use crate::topology::{Topology, even_slots, interleave, spread};

mod copies;
mod dead;
mod groups;
mod nodes;
mod notifier;
mod partitions;
mod repair;
mod rows;
mod seek;

pub use copies::{Moved, adopt, moved};
pub use dead::{DeadLetter, DeadLetterFilter, DeadLetterId, DeadLetters, DeadLettersMoved};
pub use groups::{CursorState, GroupInfo, GroupPartition, GroupSummary, MemberInfo};
pub use nodes::NodeInfo;
pub use notifier::NotifierSetting;
pub use repair::Repaired;
use rows::{read_lag, read_message, read_partition};
pub use seek::Sought;

/// The most partitions of a cluster: 99 nodes of 99.
pub const MAX_PARTITIONS: usize = 9_801;

/// How a topic is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicOptions {
    partitions: usize,
    nodes: Option<Vec<NodeId>>,
    if_missing: bool,
    retention: Retention,
}

/// How long a topic's messages are kept: whole days, dropped some time after the last of them is so
/// old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// How many days a day is kept after its end, 1 to 3,650.
    pub days: u16,
    /// Whether a day is dropped that some group has not finished. If not, it is kept, however old,
    /// and an alert opens.
    pub drop_unread: bool,
    /// How many days a dead letter is kept, 1 to 3,650.
    pub dead_letter_days: u16,
}

impl Default for Retention {
    /// Seven days, and longer while a group needs them; dead letters for thirty.
    fn default() -> Self {
        Self { days: 7, drop_unread: false, dead_letter_days: 30 }
    }
}

impl TopicOptions {
    /// A topic of so many partitions, 1 to 9,801, spread evenly over all nodes. Each takes up to
    /// 99,999,999 messages a day, is written by one commit at a time, and is consumed by one member
    /// of a group.
    pub fn partitions(partitions: usize) -> Self {
        Self { partitions, nodes: None, if_missing: false, retention: Retention::default() }
    }

    /// Only on these nodes.
    pub fn nodes(mut self, nodes: impl IntoIterator<Item = NodeId>) -> Self {
        self.nodes = Some(nodes.into_iter().collect());
        self
    }

    /// How long its messages are kept: seven days by default, and longer while a group needs them.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }

    /// Takes a topic of that name that is there already, whatever its partitions.
    pub fn if_missing(mut self) -> Self {
        self.if_missing = true;
        self
    }
}

/// A topic as lists show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicSummary {
    /// Its name.
    pub topic: TopicName,
    /// How many partitions it has.
    pub partitions: usize,
    /// The version of its map from key slots to partitions.
    pub generation: i32,
    /// When it was made.
    pub created_at: SystemTime,
}

/// A topic with its partitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicInfo {
    /// Its name.
    pub topic: TopicName,
    /// The version of its map from key slots to partitions.
    pub generation: i32,
    /// When it was made.
    pub created_at: SystemTime,
    /// Its partitions, in rising order.
    pub partitions: Vec<PartitionInfo>,
}

/// A partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionInfo {
    /// Its number.
    pub partition: PartitionId,
    /// The node that stores it.
    pub node: NodeId,
    /// `open`, `sealed`, or `unreachable` where the node did not answer.
    pub state: String,
    /// The last message, none where there is none.
    pub last_id: Option<MessageId>,
    /// Messages that are kept.
    pub messages: u64,
}

/// How far a group is in one partition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartitionLag {
    /// The group.
    pub group: String,
    /// The partition.
    pub partition: PartitionId,
    /// Everything up to this id is acknowledged; none at the very beginning.
    pub acked_id: Option<MessageId>,
    /// The partition's last message.
    pub last_id: Option<MessageId>,
    /// Messages that are not acknowledged.
    pub lag: u64,
    /// The age of the oldest of them, in seconds.
    pub lag_secs: Option<f64>,
    /// The consumer that owns it.
    pub member: Option<String>,
}

/// A message as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMessage {
    /// Where it is.
    pub id: MessageId,
    /// Its identity.
    pub uid: String,
    /// Its topic.
    pub topic: TopicName,
    /// The key it was sent with.
    pub key: Option<String>,
    /// The headers it was sent with.
    pub headers: Headers,
    /// The payload.
    pub payload: Vec<u8>,
    /// When it was appended.
    pub appended_at: SystemTime,
}

impl Cluster {
    /// Makes a topic: its partitions are taken on their nodes first, then recorded in the control
    /// database. One that was cut off in between is taken up again by the next call.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the topic exists (but see [`TopicOptions::if_missing`]),
    /// [`ErrorKind::Full`] where the nodes have no room, [`ErrorKind::Unavailable`] where one of
    /// them can't be reached.
    pub async fn create_topic(&self, topic: &str, options: TopicOptions) -> Result<TopicInfo> {
        let topic = TopicName::new(topic)?;
        let count = options.partitions;
        if !(1..=MAX_PARTITIONS).contains(&count) {
            let what = format!("{count} partitions is not between 1 and {MAX_PARTITIONS}");
            return Err(Error::invalid(what));
        }
        check_retention(options.retention)?;
        // Dropped on an error, the connection is closed and the change is off.
        let change = Unfinished::new(self.inner.control.get().await?);
        let exists = self.change_topology(change.connection(), &topic, &options).await?;
        change.finished();
        if exists && !options.if_missing {
            return Err(Error::new(ErrorKind::Conflict, format!("topic {topic} exists already")));
        }
        if !exists {
            self.set_retention(topic.as_str(), options.retention).await?;
        }
        self.topic(topic.as_str()).await
    }

    /// Makes the topic inside a change of the topology; true where it was there.
    async fn change_topology(
        &self,
        change: &Connection,
        topic: &TopicName,
        options: &TopicOptions,
    ) -> Result<bool> {
        let what = format!("create topic {topic}");
        let refused = |error| refused(error, &what);
        let (_, version) = control::begin_change(change).await.map_err(refused)?;
        if control::topic(change, topic).await.map_err(refused)?.is_some() {
            control::confirm(change).await.map_err(refused)?;
            return Ok(true);
        }
        let known = control::nodes(change).await.map_err(refused)?;
        let nodes: Vec<NodeId> = known.into_iter().map(|(node, _)| node).collect();
        let chosen = choose_nodes(&nodes, options.nodes.as_deref())?;
        let taken = control::partition_counts(change).await.map_err(refused)?;
        let shares = spread(options.partitions, &chosen, &taken)?;
        self.refuse_unknown_messages(topic, &chosen, &nodes).await?;
        let given = control::known_partitions(change).await.map_err(refused)?;
        let topic = NewTopic { name: topic, id: Uuid::new_v4(), generation: 1, version };
        let by_node = self.claim_all(change, topic, shares, &given).await?;
        let slots = even_slots(&interleave(&by_node));
        control::record_topic(change, topic.identity(), &slots).await.map_err(refused)?;
        control::commit_change(change).await.map_err(refused)?;
        Ok(false)
    }

    /// Changes how long a topic's messages are kept, on all its nodes.
    ///
    /// # Errors
    /// Where a node can't be reached the others have the new retention all the same: call it again.
    pub async fn set_retention(&self, topic: &str, retention: Retention) -> Result<()> {
        check_retention(retention)?;
        let name = TopicName::new(topic)?;
        let nodes = self.topology(&name).await?.by_node();
        let Retention { days, drop_unread, dead_letter_days } = retention;
        let kept = (i32::from(days), drop_unread, i32::from(dead_letter_days));
        let told = nodes.into_keys().map(|id| {
            let name = &name;
            async move {
                let connection = self.inner.nodes.node(id).await?.get().await?;
                upkeep::set_retention(connection, name, kept)
                    .await
                    .map_err(|error| refused(error, &format!("set the retention on node {id}")))
            }
        });
        join_all(told).await.into_iter().collect()
    }

    /// Looks after the nodes at once, rather than when it is due: makes day tables ahead, drops
    /// days whose time is over. Any client does so in the background; see [`Retention`].
    pub async fn look_after_nodes(&self) -> Result<()> {
        self.look_after_nodes_at(SystemTime::now).await
    }

    /// The same, by another clock than this machine's: for tests.
    #[doc(hidden)]
    pub async fn look_after_nodes_at(&self, clock: impl Fn() -> SystemTime) -> Result<()> {
        self.inner.nodes.refresh().await?;
        let clock = &clock;
        let rounds = self.inner.nodes.known().into_iter().map(|node| async move {
            crate::upkeep::round(&self.inner.nodes, node, clock).await.map(drop)
        });
        join_all(rounds).await.into_iter().collect()
    }

    /// All topics, by name.
    pub async fn topics(&self) -> Result<Vec<TopicSummary>> {
        let connection = self.inner.control.get().await?;
        let rows = control::topics(&connection).await.map_err(|e| refused(e, "list the topics"))?;
        let summary = |row: control::TopicRow| {
            Ok(TopicSummary {
                topic: TopicName::new(&row.topic)?,
                partitions: usize::try_from(row.partitions).unwrap_or(0),
                generation: row.generation,
                created_at: row.created_at,
            })
        };
        rows.into_iter().map(summary).collect()
    }

    /// A topic with its partitions, as their nodes know them.
    pub async fn topic(&self, topic: &str) -> Result<TopicInfo> {
        let name = TopicName::new(topic)?;
        let topology = self.topology(&name).await?;
        let connection = self.inner.control.get().await?;
        let what = format!("describe topic {topic}");
        let found = control::topic(&connection, &name).await.map_err(|e| refused(e, &what))?;
        drop(connection);
        let created_at = found.map_or(SystemTime::UNIX_EPOCH, |found| found.created_at);
        let by_node = topology.by_node();
        let asked = by_node.iter().map(|(node, partitions)| async move {
            let known = self.partitions_on(*node, topic).await;
            partitions
                .iter()
                .map(|partition| described(*partition, known.as_deref().ok()))
                .collect()
        });
        let described: Vec<Vec<PartitionInfo>> = join_all(asked).await;
        let partitions = described.into_iter().flatten().collect();
        Ok(TopicInfo { topic: name, generation: topology.generation, created_at, partitions })
    }

    async fn partitions_on(&self, node: NodeId, topic: &str) -> Result<Vec<PartitionInfo>> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let rows = query(&connection, sql::PARTITIONS_OF_TOPIC, &[&topic])
            .await
            .map_err(|error| refused(error, &format!("describe topic {topic} on node {node}")))?;
        rows.iter().map(|row| read_partition(row, node)).collect()
    }

    /// Deletes a topic with all its messages and cursors.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where a group has messages left to consume and `force` is not set.
    pub async fn delete_topic(&self, topic: &str, force: bool) -> Result<()> {
        let name = TopicName::new(topic)?;
        let topology = self.topology(&name).await?;
        if !force {
            self.refuse_if_lagging(&topology).await?;
        }
        let what = format!("delete topic {topic}");
        let change = Unfinished::new(self.inner.control.get().await?);
        let connection = change.connection();
        control::begin_change(connection).await.map_err(|error| refused(error, &what))?;
        // As it is inside the change: another topic of that name may have been made since it was
        // looked up.
        let now = control::topic(connection, &name).await.map_err(|error| refused(error, &what))?;
        if now.is_none_or(|now| now.id != topology.id) {
            let what = format!("topic {topic} was deleted by somebody else meanwhile");
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        self.drop_all(connection, &topology).await?;
        let forgotten = control::forget_topic(connection, topology.id).await;
        forgotten.map_err(|error| refused(error, &what))?;
        control::commit_change(connection).await.map_err(|error| refused(error, &what))?;
        change.finished();
        Ok(())
    }

    async fn refuse_if_lagging(&self, topology: &Topology) -> Result<()> {
        let topic = topology.topic.as_str();
        let mut lags: BTreeMap<String, u64> = BTreeMap::new();
        for lag in self.lags(topology).await? {
            *lags.entry(lag.group).or_default() += lag.lag;
        }
        lags.retain(|_, lag| *lag > 0);
        let Some((group, lag)) = lags.first_key_value() else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Conflict,
            format!("group {group} has {lag} messages of topic {topic} left to consume"),
        ))
    }

    /// How far all groups are in a topic's partitions, by arithmetic: no message is counted.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such topic, or where a node has lost partitions of
    /// it: see [`repair`](Self::repair). [`ErrorKind::Unavailable`] where a node does not answer.
    pub async fn lag(&self, topic: &str) -> Result<Vec<PartitionLag>> {
        let name = TopicName::new(topic)?;
        let topology = self.topology(&name).await?;
        let by_node = topology.by_node();
        let looked = by_node.iter().map(|(node, of)| self.refuse_lost(*node, of, topology.id));
        join_all(looked).await.into_iter().collect::<Result<()>>()?;
        self.lags(&topology).await
    }

    async fn lags(&self, topology: &Topology) -> Result<Vec<PartitionLag>> {
        let topic = topology.topic.as_str();
        let asked = topology.by_node().into_keys().map(|node| self.lag_on(node, topic));
        let mut lags = Vec::new();
        for on_node in join_all(asked).await {
            lags.extend(on_node?);
        }
        lags.sort_by(|a, b| (&a.group, a.partition).cmp(&(&b.group, b.partition)));
        Ok(lags)
    }

    async fn lag_on(&self, node: NodeId, topic: &str) -> Result<Vec<PartitionLag>> {
        let connection = self.inner.nodes.node(node).await?.get().await?;
        let rows = query(&connection, sql::LAG, &[&topic])
            .await
            .map_err(|error| refused(error, &format!("read the lag on node {node}")))?;
        rows.iter().map(read_lag).collect()
    }

    /// A message by its id; none where there is none. Reads the partition's node.
    pub async fn message(&self, id: MessageId) -> Result<Option<StoredMessage>> {
        let connection = self.inner.nodes.node(id.partition().node()).await?.get().await?;
        let rows = query(&connection, sql::MESSAGE, &[&id.number()])
            .await
            .map_err(|error| refused(error, &format!("read message {id}")))?;
        rows.first().map(read_message).transpose()
    }

    /// Messages of a partition after an id (none: from the first), in order, at most so many. Moves
    /// no cursor.
    pub async fn peek(
        &self,
        partition: PartitionId,
        after: Option<MessageId>,
        max: u32,
    ) -> Result<Vec<StoredMessage>> {
        let connection = self.inner.nodes.node(partition.node()).await?.get().await?;
        let after = after.map_or(0, MessageId::number);
        let max = i32::try_from(max).unwrap_or(i32::MAX);
        let rows = query(&connection, sql::PEEK, &[&partition.as_i32(), &after, &max])
            .await
            .map_err(|error| refused(error, &format!("read partition {partition}")))?;
        rows.iter().map(read_message).collect()
    }
}

fn check_retention(retention: Retention) -> Result<()> {
    let all = [retention.days, retention.dead_letter_days];
    all.iter().find(|days| !(1..=3650).contains(*days)).map_or(Ok(()), |days| {
        Err(Error::invalid(format!("a retention of {days} days is not between 1 and 3650")))
    })
}

fn choose_nodes(known: &[NodeId], wanted: Option<&[NodeId]>) -> Result<Vec<NodeId>> {
    if known.is_empty() {
        let what = "the cluster has no node yet: register one with `shardmq node add`";
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    let wanted = wanted.unwrap_or(known);
    match wanted.iter().find(|node| !known.contains(node)) {
        Some(node) => {
            Err(Error::new(ErrorKind::NotFound, format!("node {node} is not registered")))
        }
        None => Ok(wanted.to_vec()),
    }
}

/// What a node said of a partition, or that it did not.
fn described(partition: PartitionId, known: Option<&[PartitionInfo]>) -> PartitionInfo {
    let found = known.and_then(|known| known.iter().find(|info| info.partition == partition));
    let state = if known.is_some() { "missing" } else { "unreachable" };
    found.cloned().unwrap_or_else(|| PartitionInfo {
        partition,
        node: partition.node(),
        state: state.to_owned(),
        last_id: None,
        messages: 0,
    })
}
