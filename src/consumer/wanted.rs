//! What a member should have, and which nodes it does not reach.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::id::{NodeId, PartitionId};

/// The partitions that a member should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Whatever nobody has: nothing is known of the others.
    Anything,
    /// These, and no others.
    These(BTreeSet<PartitionId>),
}

impl Wanted {
    pub(crate) fn wants(&self, partition: PartitionId) -> bool {
        match self {
            Self::Anything => true,
            Self::These(partitions) => partitions.contains(&partition),
        }
    }
}

/// After how many leases without an answer a node's partitions should be others'. All that also can't
/// reach it have said so by then.
const AVOID: u32 = 3;

/// Which nodes do not answer, and since when.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    failing: Mutex<HashMap<NodeId, Instant>>,
}

impl Reach {
    pub(crate) fn note(&self, node: NodeId, answers: bool) {
        let mut failing = self.lock();
        if answers {
            failing.remove(&node);
        } else {
            failing.entry(node).or_insert_with(Instant::now);
        }
    }

    pub(crate) fn is_failing(&self, node: NodeId) -> bool {
        self.lock().contains_key(&node)
    }

    /// The nodes that did not answer for a lease, and those to be avoided.
    pub(crate) fn out_of_reach(&self, lease: Duration) -> (Vec<i32>, Vec<i32>) {
        let failing = self.lock();
        let since = |time: Duration| {
            let long = failing.iter().filter(|(_, since)| since.elapsed() >= time);
            let mut nodes: Vec<i32> = long.map(|(node, _)| i32::from(node.number())).collect();
            nodes.sort_unstable();
            nodes
        };
        (since(lease), since(lease * AVOID))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Instant>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_is_out_of_reach_after_a_lease_and_avoided_after_three() {
        let (reach, node, lease) =
            (Reach::default(), NodeId::new(7).unwrap(), Duration::from_secs(10));
        reach.note(node, false);
        assert_eq!(reach.out_of_reach(lease), (vec![], vec![]));
        tokio::time::advance(lease).await;
        reach.note(node, false);
        assert_eq!(reach.out_of_reach(lease), (vec![7], vec![]));
        tokio::time::advance(2 * lease).await;
        assert_eq!(reach.out_of_reach(lease), (vec![7], vec![7]));
        reach.note(node, true);
        assert_eq!(reach.out_of_reach(lease), (vec![], vec![]));
    }
}
