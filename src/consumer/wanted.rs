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

/// How many leases after it was told that a node does not answer its partitions should be others'. All that
/// also can't reach it have told so by then.
const AVOID: u32 = 3;

/// Which nodes do not answer, and since when.
///
/// ```text
///        no answer               for a lease              told for three leases
/// (known to answer) ──> failing ─────────────> unreachable ────────────────────> to be avoided
///        ^                                          │ answers                        │ answers
///        └────────── for a lease ── answering <─────┴────────────────────────────────┘
/// ```
///
/// What answers again counts as unreachable for a while: whoever had its partitions finds that out too,
/// and they need not move.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    failing: Mutex<HashMap<NodeId, Failing>>,
}

#[derive(Debug, Clone, Copy)]
struct Failing {
    since: Instant,
    answers_since: Option<Instant>,
    /// The control database has it since then.
    told_since: Option<Instant>,
}

impl Reach {
    pub(crate) fn note(&self, node: NodeId, answers: bool) {
        let mut failing = self.lock();
        let now = Instant::now();
        if answers {
            if let Some(failing) = failing.get_mut(&node) {
                failing.answers_since.get_or_insert(now);
            }
        } else {
            let new = Failing { since: now, answers_since: None, told_since: None };
            failing.entry(node).or_insert(new).answers_since = None;
        }
    }

    pub(crate) fn is_failing(&self, node: NodeId) -> bool {
        self.lock().get(&node).is_some_and(|failing| failing.answers_since.is_none())
    }

    /// The nodes that are unreachable, and those to be avoided.
    pub(crate) fn out_of_reach(&self, lease: Duration) -> (Vec<i32>, Vec<i32>) {
        let mut failing = self.lock();
        failing.retain(|_, failing| {
            let short = failing.answers_since.is_some_and(|since| since - failing.since < lease);
            !short && failing.answers_since.is_none_or(|since| since.elapsed() < lease)
        });
        let list = |which: &dyn Fn(&Failing) -> bool| {
            let found = failing.iter().filter(|(_, failing)| which(failing));
            let mut nodes: Vec<i32> = found.map(|(node, _)| i32::from(node.number())).collect();
            nodes.sort_unstable();
            nodes
        };
        let unreachable = list(&|failing| failing.since.elapsed() >= lease);
        let avoid = list(&|failing| {
            let told = failing.told_since.is_some_and(|since| since.elapsed() >= lease * AVOID);
            told && failing.answers_since.is_none()
        });
        (unreachable, avoid)
    }

    /// The control database has it that these nodes are unreachable; with a break before where it was away:
    /// then what others could not tell is not known either.
    pub(crate) fn told(&self, unreachable: &[i32], after_break: bool) {
        for (node, failing) in self.lock().iter_mut() {
            if after_break || !unreachable.contains(&i32::from(node.number())) {
                failing.told_since = None;
            }
            if unreachable.contains(&i32::from(node.number())) {
                failing.told_since.get_or_insert_with(Instant::now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_is_unreachable_after_a_lease_avoided_after_four_and_well_after_another() {
        let lease = Duration::from_secs(10);
        let (reach, node) = (Reach::default(), NodeId::new(7).unwrap());
        let after = async |time: Duration, answers| {
            tokio::time::advance(time).await;
            reach.note(node, answers);
            let (unreachable, avoid) = reach.out_of_reach(lease);
            reach.told(&unreachable, false);
            (unreachable, avoid)
        };
        assert_eq!(after(Duration::ZERO, false).await, (vec![], vec![]));
        assert_eq!(after(lease, false).await, (vec![7], vec![]));
        assert_eq!(after(3 * lease, false).await, (vec![7], vec![7]));
        reach.told(&[7], true);
        assert_eq!(after(lease, false).await, (vec![7], vec![]), "told anew");
        assert_eq!(after(2 * lease, false).await, (vec![7], vec![7]));
        assert_eq!(after(lease, true).await, (vec![7], vec![]));
        assert!(!reach.is_failing(node));
        assert_eq!(after(lease / 2, true).await, (vec![7], vec![]));
        assert_eq!(after(lease / 2, true).await, (vec![], vec![]));
        // A short failure is none.
        assert_eq!(after(lease, false).await, (vec![], vec![]));
        assert_eq!(after(lease / 2, true).await, (vec![], vec![]));
        assert_eq!(after(lease, false).await, (vec![], vec![]));
    }
}
