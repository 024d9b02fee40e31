//! Partitions that the control database has given to a topic, and that their node does not have: it
//! was restored, or promoted without its end.

use std::time::Duration;

use tokio::time::Instant;

use crate::consumer::member::Member;
use crate::error::Result;
use crate::id::PartitionId;
use crate::store::connect::refused;
use crate::store::partitions;
use crate::trouble::Trouble;

/// How often it is looked whether a node has them, while nothing of it can be taken.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The partitions that one node has lost, as far as is known.
pub(super) struct Lost {
    looked: Option<Instant>,
    /// They were not there in the last look: in between the topic would have ended, had it been
    /// deleted.
    seen: bool,
    trouble: Trouble,
}

impl Lost {
    pub(super) fn new(remind: Duration) -> Self {
        Self { looked: None, seen: false, trouble: Trouble::new(remind) }
    }

    /// Whether it is time to look.
    fn is_due(&mut self, now: Instant) -> bool {
        if self.looked.is_some_and(|looked| now - looked < LOOK_EVERY) {
            return false;
        }
        self.looked = Some(now);
        true
    }

    /// Whether the finding is to be logged.
    fn is_news(&mut self, lost: &[PartitionId], now: Instant) -> bool {
        let again = std::mem::replace(&mut self.seen, !lost.is_empty());
        if lost.is_empty() {
            self.trouble.end();
            return false;
        }
        again && self.trouble.meet(now)
    }
}

impl Member {
    /// Nothing of these could be taken: others may have them, or the node does not know them.
    pub(super) async fn look_for_lost(&mut self, lacking: &[i32]) -> Result<()> {
        if !self.lost.is_due(Instant::now()) {
            return Ok(());
        }
        let topology = &self.shared.topology;
        let what = format!("look for partitions of topic {} on node {}", topology.topic, self.node);
        let lacking: Vec<PartitionId> =
            lacking.iter().filter_map(|number| PartitionId::from_i32(*number).ok()).collect();
        let connection = self.shared.connection(self.node).await?;
        let lost = partitions::lost(&connection, topology.id, &lacking).await;
        let lost = lost.map_err(|error| refused(error, &what))?;
        if !lost.is_empty() {
            self.shared.cluster.inner.topology.doubt(topology.id);
        }
        if self.lost.is_news(&lost, Instant::now()) {
            tracing::error!(
                alert = "lost_partitions", topic = %topology.topic, node = %self.node,
                partitions = ?lost.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "the node has lost partitions that the control database has given to the topic: was it \
                 restored? `shardmq repair` makes them again, without their messages"
            );
        }
        Ok(())
    }
}
