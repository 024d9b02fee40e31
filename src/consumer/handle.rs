//! What can be done with a running consumer from anywhere.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::consumer::member::Command;
use crate::consumer::status::{
    ConsumerEvent, ConsumerEvents, ConsumerPartition, ConsumerStatus, NodeHints,
};
use crate::consumer::{Shared, check_known};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};

/// How much longer than its deadline a shutdown may take, where nodes don't answer.
pub(super) const GRACE: Duration = Duration::from_secs(6);
/// How long a flush may take in all, where nodes don't answer.
const FLUSH: Duration = Duration::from_secs(15);
/// The longest deadline: a clock can't be set for ever.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// Flushes and shuts down a consumer, from any task. Cheap to clone.
#[derive(Clone)]
pub struct ConsumerHandle {
    pub(super) shared: Arc<Shared>,
}

impl ConsumerHandle {
    /// Commits everything that was acknowledged before. When it returns `Ok`, none of that is delivered
    /// again. It waits for up to 5 s where an open transaction keeps a cursor locked
    /// ([`commit_in`](crate::Delivery::commit_in)), and for 15 s at most where a node does not answer;
    /// meanwhile everything else goes on.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] or [`ErrorKind::Reset`] where a partition's acknowledgements were
    /// refused: told by each call under way, and by the first that began after the last of them, [`ErrorKind::Closed`] after a shutdown, or what keeps a node from answering.
    pub async fn flush(&self) -> Result<()> {
        let flush = self.shared.begin_flush();
        // A node that does not answer holds nobody up that has nothing to be committed there.
        let answers = self.shared.tell_nodes(&self.shared.pending_nodes(), Command::Flush);
        let mut outcome = Ok(());
        let late =
            || Error::new(ErrorKind::Timeout, "commit cursors: a node did not answer in time");
        let answers =
            timeout(FLUSH, join_all(answers)).await.unwrap_or_else(|_| vec![Ok(Err(late()))]);
        for answer in answers {
            outcome = outcome.and(answer.unwrap_or_else(|_| Err(self.shared.closed())));
        }
        outcome = outcome.and(self.shared.take_uncommitted(flush));
        if self.shared.left.is_cancelled() {
            return Err(self.shared.closed());
        }
        outcome
    }

    /// Ends consuming: nothing new is handed out; deliveries in hand may be answered until the deadline;
    /// then acknowledgements are committed, the partitions given back, and the stream ends.
    /// A deadline of more than a year is one of a year. Idempotent: a second call waits for the first,
    /// which alone says what went wrong.
    ///
    /// # Errors
    /// Those of [`flush`](Self::flush); the consumer has ended all the same.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let shared = &self.shared;
        let deadline = deadline.min(LONGEST);
        let Some(answers) = shared.stop(Instant::now() + deadline) else {
            shared.left.cancelled().await;
            return Ok(());
        };
        let ended = async {
            let mut outcome = Ok(());
            for answer in join_all(answers).await {
                outcome = outcome.and(answer.unwrap_or(Ok(())));
            }
            shared.left.cancelled().await;
            outcome.and(shared.take_uncommitted(shared.begin_flush()))
        };
        if let Ok(outcome) = timeout(deadline + GRACE, ended).await {
            return outcome;
        }
        shared.leave().await;
        let what = "commit acknowledgements at shutdown: a node did not answer";
        Err(Error::new(ErrorKind::Timeout, what))
    }

    /// This consumer's name in the group, as [`PartitionLag::member`](crate::PartitionLag::member) shows it.
    pub fn member(&self) -> Uuid {
        self.shared.member
    }

    /// The partitions that this consumer owns now.
    pub fn held_partitions(&self) -> usize {
        self.shared.holdings().values().filter(|holding| holding.is_held()).count()
    }

    /// Hands out nothing of these partitions from now on, whether they are owned now or later, until they
    /// are resumed. Others go on. They stay this consumer's; what is in hand can be acknowledged, and
    /// messages that were fetched are dropped, and fetched again later; by key, those that wait for a key
    /// in hand are kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is not of the topic; nothing is paused then.
    pub fn pause(&self, partitions: impl IntoIterator<Item = PartitionId>) -> Result<()> {
        let partitions: Vec<_> = partitions.into_iter().collect();
        check_known(&self.shared.topology, &partitions)?;
        let mut paused = self.shared.paused();
        paused.extend(&partitions);
        let holdings = self.shared.holdings();
        partitions.iter().filter_map(|p| holdings.get(p)).for_each(|holding| holding.pause());
        Ok(())
    }

    /// Hands messages of these partitions out again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is not of the topic; nothing is resumed then.
    pub fn resume(&self, partitions: impl IntoIterator<Item = PartitionId>) -> Result<()> {
        let partitions: Vec<_> = partitions.into_iter().collect();
        check_known(&self.shared.topology, &partitions)?;
        let mut paused = self.shared.paused();
        paused.retain(|partition| !partitions.contains(partition));
        let holdings = self.shared.holdings();
        partitions.iter().filter_map(|p| holdings.get(p)).for_each(|holding| holding.resume());
        Ok(())
    }

    /// The partitions that this consumer owns now, in rising order, and whether each is paused.
    pub fn partitions(&self) -> Vec<(PartitionId, bool)> {
        let holdings = self.shared.holdings();
        let held = holdings.values().filter(|holding| holding.is_held());
        let mut held: Vec<_> = held.map(|h| (h.partition, h.is_paused())).collect();
        held.sort_unstable();
        held
    }

    /// How the consumer stands.
    pub fn status(&self) -> ConsumerStatus {
        let held = self.partitions();
        let nodes: BTreeSet<NodeId> = held.iter().map(|(partition, _)| partition.node()).collect();
        let health = |node| self.shared.cluster.inner.notifier.health(node);
        let hints = |node| NodeHints { node, health: health(node) };
        let owned = |(partition, paused)| ConsumerPartition { partition, paused };
        ConsumerStatus {
            partitions: held.into_iter().map(owned).collect(),
            notifier: nodes.into_iter().map(hints).collect(),
            prefetched_bytes: self.shared.budget.taken(),
            is_shutting_down: self.is_shutting_down(),
        }
    }

    /// What happens to the consumer from now on, after how hints arrive now. Who is slow misses events beyond
    /// 256. Ends when the consumer and its handles are dropped.
    pub fn events(&self) -> ConsumerEvents {
        let event =
            |hints: NodeHints| ConsumerEvent::Notifier { node: hints.node, health: hints.health };
        self.shared.told.listen_after(|| self.status().notifier.into_iter().map(event).collect())
    }

    /// Whether a shutdown has begun, also by dropping the stream: nothing is handed out any more.
    pub fn is_shutting_down(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Nobody reads the stream any more: gives everything back, and waits for nothing.
    pub(super) fn abandon(&self) {
        drop(self.shared.stop(Instant::now()));
    }
}

impl fmt::Debug for ConsumerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.shared;
        f.debug_struct("ConsumerHandle")
            .field("member", &shared.member)
            .field("group", &shared.group)
            .field("held", &self.held_partitions())
            .finish_non_exhaustive()
    }
}
