//! What was frozen and waits for its partition: in order for each, different ones side by side.
//! Pure.
//!
//! What a lane has in memory is bounded; the rest stays in the table and is read when it is its
//! turn. A node that can't be reached makes its own lanes wait, and is tried by one of them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::routes::Fares;
use crate::error::Error;
use crate::id::{NodeId, PartitionId};
use crate::store::outbox::Frozen;
use crate::trouble::Trouble;

/// What a lane keeps in memory, in batches, and all of them, in bytes.
const LANE: usize = 4;
const MEMORY: usize = 32 << 20;
/// Between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// How often trouble that lasts is told.
const REMIND: Duration = Duration::from_mins(1);

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Frozen>,
    /// Whether there is more in the table, behind the queue and behind what is being read.
    more: bool,
    /// Whether the table is being read. What is frozen meanwhile may not be among what that brings.
    loading: bool,
    /// The last batch that was in the queue.
    last: i64,
    busy: bool,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Lane {
    /// What begins with this batch is read of the table when it is its turn. Returns the bytes that
    /// were in memory.
    fn leave_in_table(&mut self, id: i64) -> usize {
        (self.more, self.last) = (true, id - 1);
        self.queue.drain(..).map(|frozen| frozen.size()).sum()
    }
}

/// How a node fares.
#[derive(Debug)]
struct Fare {
    busy: usize,
    /// The partition that was served last: those behind it have their turn first.
    served: Option<PartitionId>,
    failures: u32,
    retry_at: Option<Instant>,
    trouble: Trouble,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Lanes {
    waiting: BTreeMap<PartitionId, Lane>,
    nodes: HashMap<NodeId, Fare>,
    /// Of all queues and of what is under way.
    bytes: usize,
    /// How many batches may be under way to a node.
    by_node: usize,
    /// Whether some lane is reading: one at a time, since the relay's own looks need a connection
    /// too.
    loading: bool,
}

/// What a lane needs next.
#[derive(Debug)]
pub(super) enum Next {
    /// The batches behind this one, from the table.
    Load(PartitionId, i64),
    /// To be appended.
    Send(Box<Frozen>),
}

impl Lanes {
    pub(super) fn new(by_node: usize) -> Self {
        Self { waiting: BTreeMap::new(), nodes: HashMap::new(), bytes: 0, by_node, loading: false }
    }

    /// The table has batches for this partition.
    pub(super) fn has_more(&mut self, partition: PartitionId) {
        self.waiting.entry(partition).or_default().more = true;
    }

    /// A batch was frozen.
    pub(super) fn push(&mut self, frozen: Frozen) {
        let is_away = self.is_away(frozen.partition.node());
        let lane = self.waiting.entry(frozen.partition).or_default();
        let fits = lane.queue.len() < LANE && (self.bytes < MEMORY || lane.queue.is_empty());
        if lane.more || lane.loading || !fits || is_away {
            lane.more = true;
            return;
        }
        self.bytes += frozen.size();
        lane.last = frozen.id;
        lane.queue.push_back(frozen);
    }

    /// What was read of the table for a lane.
    pub(super) fn loaded(&mut self, partition: PartitionId, batches: Vec<Frozen>) {
        self.loading = false;
        let lane = self.waiting.entry(partition).or_default();
        (lane.loading, lane.more) = (false, lane.more || !batches.is_empty());
        for frozen in batches {
            self.bytes += frozen.size();
            lane.last = lane.last.max(frozen.id);
            lane.queue.push_back(frozen);
        }
        self.forget_if_idle(partition);
    }

    /// What can be done now, one at a time.
    pub(super) fn next(&mut self, now: Instant) -> Option<Next> {
        let (by_node, loading) = (self.by_node, self.loading);
        let nodes = &self.nodes;
        let is_ready = |(partition, lane): &(&PartitionId, &mut Lane)| {
            let has = !lane.queue.is_empty() || (lane.more && !loading);
            let is_due = |at: Option<Instant>| at.is_none_or(|at| at <= now);
            let node_is = nodes.get(&partition.node()).is_none_or(|node| {
                let most = if node.failures > 0 { 1 } else { by_node };
                node.busy < most && is_due(node.retry_at)
            });
            has && !lane.busy && is_due(lane.retry_at) && node_is
        };
        let turn = |(partition, _): &(&PartitionId, &mut Lane)| {
            let served = nodes.get(&partition.node()).and_then(|node| node.served);
            (served.is_some_and(|served| **partition <= served), **partition)
        };
        let (partition, lane) = self.waiting.iter_mut().filter(is_ready).min_by_key(turn)?;
        let Some(frozen) = lane.queue.pop_front() else {
            (self.loading, lane.loading, lane.more) = (true, true, false);
            return Some(Next::Load(*partition, lane.last));
        };
        lane.busy = true;
        let node = self.nodes.entry(partition.node()).or_insert_with(Fare::new);
        (node.busy, node.served) = (node.busy + 1, Some(*partition));
        Some(Next::Send(Box::new(frozen)))
    }

    /// A batch is there, or elsewhere: the lane goes on. True: its node was in trouble before.
    pub(super) fn done(&mut self, partition: PartitionId, size: usize, worked: bool) -> bool {
        self.bytes = self.bytes.saturating_sub(size);
        if let Some(lane) = self.waiting.get_mut(&partition) {
            (lane.busy, lane.failures, lane.retry_at) = (false, 0, None);
        }
        let node = self.nodes.entry(partition.node()).or_insert_with(Fare::new);
        node.busy = node.busy.saturating_sub(1);
        if worked {
            (node.failures, node.retry_at) = (0, None);
        }
        let was_in_trouble = worked && node.trouble.end();
        self.forget_if_idle(partition);
        was_in_trouble
    }

    /// A batch is not there any more, or is another relay's matter: what the table has is read
    /// anew.
    pub(super) fn gone(&mut self, frozen: &Frozen) {
        let partition = frozen.partition;
        self.done(partition, frozen.size(), false);
        let lane = self.waiting.entry(partition).or_default();
        self.bytes = self.bytes.saturating_sub(lane.leave_in_table(frozen.id));
    }

    /// A batch is to be tried again: after a pause for its lane, or for its node. True: that is to
    /// be told.
    pub(super) fn failed(
        &mut self,
        frozen: Frozen,
        of_node: Option<&Error>,
        pause: Option<Duration>,
        now: Instant,
    ) -> bool {
        let partition = frozen.partition;
        let lane = self.waiting.entry(partition).or_default();
        lane.busy = false;
        if of_node.is_some() {
            // Who waits for a node has nothing in memory.
            let dropped = frozen.size() + lane.leave_in_table(frozen.id);
            self.bytes = self.bytes.saturating_sub(dropped);
        } else {
            lane.queue.push_front(frozen);
        }
        lane.failures += 1;
        lane.retry_at = Some(now + pause.unwrap_or_else(|| backoff(lane.failures)));
        let node = self.nodes.entry(partition.node()).or_insert_with(Fare::new);
        node.busy = node.busy.saturating_sub(1);
        if of_node.is_none() {
            return false;
        }
        node.failures += 1;
        node.retry_at = Some(now + backoff(node.failures + 3));
        node.trouble.meet(now)
    }

    /// Whether so much is on its way, and getting there, that no more should be frozen.
    pub(super) fn are_full(&self) -> bool {
        let moves = |node: &Fare| node.failures == 0 && node.busy > 0;
        self.bytes >= MEMORY && self.nodes.values().any(moves)
    }

    /// Whether nothing waits for a partition.
    pub(super) fn is_idle(&self, partition: PartitionId) -> bool {
        !self.waiting.contains_key(&partition)
    }

    /// When a lane may be tried again that waits.
    pub(super) fn retry_at(&self, now: Instant) -> Option<Instant> {
        let retry = |(partition, lane): (&PartitionId, &Lane)| {
            let node = self.nodes.get(&partition.node()).and_then(|node| node.retry_at);
            if lane.busy { None } else { lane.retry_at.max(node) }
        };
        self.waiting.iter().filter_map(retry).filter(|at| *at > now).min()
    }

    fn forget_if_idle(&mut self, partition: PartitionId) {
        let idle = |lane: &Lane| lane.queue.is_empty() && !lane.more && !lane.busy && !lane.loading;
        if self.waiting.get(&partition).is_some_and(idle) {
            self.waiting.remove(&partition);
        }
    }
}

impl Fare {
    fn new() -> Self {
        Self { busy: 0, served: None, failures: 0, retry_at: None, trouble: Trouble::new(REMIND) }
    }
}

impl Fares for Lanes {
    fn is_away(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.failures > 0)
    }

    fn is_busy(&self, partition: PartitionId) -> bool {
        self.waiting.contains_key(&partition)
    }
}

fn backoff(failures: u32) -> Duration {
    (BACKOFF.0 * 2_u32.saturating_pow(failures.min(10))).min(BACKOFF.1)
}

#[cfg(test)]
mod tests;
