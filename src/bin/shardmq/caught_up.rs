//! When a group has consumed what was there when somebody began to look.
//!
//! A partition counts as done when this process has had its last message of that time, when the group
//! has acknowledged it, or when another member has had the partition for so long without finishing it
//! that it can't be a dead one whose lease is about to end.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use shardmq::{Cluster, MessageId, PartitionId, PartitionLag, Result};
use tokio::time::Instant;

use crate::output::note;

/// A dead member's lease of ten seconds, and what it takes others to notice.
const PATIENCE: Duration = Duration::from_secs(20);
const FIRST_LOOK: Duration = Duration::from_millis(100);
const NEXT_LOOK: Duration = Duration::from_millis(250);

/// What is still to come of the messages that were there at the beginning.
pub(crate) struct CaughtUp {
    cluster: Cluster,
    topic: String,
    group: String,
    own: String,
    /// The last message of each partition that is not done.
    open: HashMap<PartitionId, MessageId>,
    /// Partitions whose nodes did not say at the beginning what their last message is.
    unknown: BTreeSet<PartitionId>,
    /// The last message that was handed out here.
    passed: HashMap<PartitionId, MessageId>,
    /// Partitions of other members, since when.
    others: HashMap<PartitionId, (String, Instant)>,
    failing_since: Option<Instant>,
    look_at: Instant,
}

impl CaughtUp {
    /// All that is in the topic now is to be consumed.
    pub(crate) async fn begin(cluster: &Cluster, topic: &str, group: &str) -> Result<Self> {
        let info = cluster.topic(topic).await?;
        let (mut open, mut unknown) = (HashMap::new(), BTreeSet::new());
        for partition in info.partitions {
            if partition.state == "unreachable" {
                unknown.insert(partition.partition);
            }
            if let Some(last) = partition.last_id {
                open.insert(partition.partition, last);
            }
        }
        Ok(Self {
            cluster: cluster.clone(),
            topic: topic.to_owned(),
            group: group.to_owned(),
            own: String::new(),
            open,
            unknown,
            passed: HashMap::new(),
            others: HashMap::new(),
            failing_since: None,
            look_at: Instant::now() + FIRST_LOOK,
        })
    }

    /// Says which member of the group we are.
    pub(crate) fn joined(&mut self, member: &impl ToString) {
        self.own = member.to_string();
    }

    /// A message was handed out here.
    pub(crate) fn passed(&mut self, id: MessageId) {
        let partition = id.partition();
        self.passed.insert(partition, id);
        if self.open.get(&partition).is_some_and(|last| id >= *last) {
            self.open.remove(&partition);
        }
    }

    /// Whether everything was consumed.
    pub(crate) fn is_done(&self) -> bool {
        self.open.is_empty() && self.unknown.is_empty()
    }

    /// When to call [`look`](Self::look) next.
    pub(crate) fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Asks the nodes how far the group is. Fails where they don't answer for long.
    pub(crate) async fn look(&mut self) -> Result<()> {
        let asked = Instant::now();
        let outcome = match self.cluster.lag(&self.topic).await {
            Ok(lags) => {
                self.failing_since = None;
                let of_group = lags.into_iter().filter(|lag| lag.group == self.group);
                of_group.collect::<Vec<_>>().iter().for_each(|lag| self.learn(lag));
                Ok(())
            }
            Err(error) if !error.is_transient() => Err(error),
            Err(error) => {
                let since = *self.failing_since.get_or_insert(asked);
                if since.elapsed() > PATIENCE { Err(error) } else { Ok(()) }
            }
        };
        self.look_at = Instant::now() + NEXT_LOOK.max(asked.elapsed() * 10);
        outcome
    }

    fn learn(&mut self, lag: &PartitionLag) {
        let partition = lag.partition;
        if self.unknown.remove(&partition)
            && let Some(last) = lag.last_id
        {
            self.open.insert(partition, last);
        }
        let Some(last) = self.open.get(&partition) else {
            return;
        };
        let position = lag.acked_id.max(self.passed.get(&partition).copied());
        if position.is_some_and(|position| position >= *last) {
            self.open.remove(&partition);
            return;
        }
        match lag.member.as_deref() {
            Some(member) if member != self.own => self.leave_to(partition, member),
            _ => drop(self.others.remove(&partition)),
        }
    }

    /// Leaves a partition to the member that has had it for long.
    fn leave_to(&mut self, partition: PartitionId, member: &str) {
        let now = Instant::now();
        let entry = self.others.entry(partition);
        let (known, since) = entry.or_insert_with(|| (member.to_owned(), now));
        if known != member {
            (*known, *since) = (member.to_owned(), now);
        }
        if since.elapsed() > PATIENCE {
            note(&format!("partition {partition} is left to member {member}, which is not done"));
            self.open.remove(&partition);
        }
    }
}
