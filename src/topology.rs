//! Which partition a key belongs to, and where partitions are. Pure: the I/O is in
//! [`crate::store`].

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};

use crc::{CRC_16_XMODEM, Crc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::name::TopicName;

/// How many key slots there are. A key belongs to a slot for ever, a slot to a partition by a map.
pub const SLOTS: u16 = 16_384;

const CRC: Crc<u16> = Crc::<u16>::new(&CRC_16_XMODEM);

/// The key slot of a key, 0 to 16,383: CRC-16/XMODEM of its UTF-8 bytes, modulo 16,384. The same
/// for ever, in every language.
///
/// ```
/// assert_eq!(shardmq::key_slot("123456789"), 0x31C3);
/// ```
pub fn key_slot(key: &str) -> u16 {
    CRC.checksum(key.as_bytes()) % SLOTS
}

/// A version of the topology. The number alone does not tell two versions apart where the control
/// database was restored, or promoted without its end: it gives the same number to another version
/// then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) number: i64,
    /// Drawn with it.
    pub(crate) token: Uuid,
    /// The tokens of the versions before, as many as are kept, the latest first.
    pub(crate) history: Vec<Uuid>,
}

/// How a version of the topology that was found relates to the one that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    Same,
    Later,
    /// The control database lacks changes that were made, and nothing was changed in it since.
    Earlier,
    /// It lacks changes that were made, and others were made in it since.
    Branched,
}

impl Version {
    /// How this one, which was found, relates to the one that is known.
    pub(crate) fn after(&self, known: &Self) -> Relation {
        let apart = self.number.abs_diff(known.number);
        let kept = |of: &Self| apart <= u64::try_from(of.history.len()).unwrap_or(0);
        match self.number.cmp(&known.number) {
            Ordering::Equal if self.token == known.token => Relation::Same,
            Ordering::Greater if self.token == known.token => Relation::Later,
            Ordering::Less if self.token == known.token => Relation::Earlier,
            // Of a version that is too far away to be in the history nothing else is known.
            Ordering::Greater if !kept(self) => Relation::Later,
            Ordering::Less if !kept(known) => Relation::Earlier,
            Ordering::Greater if self.history.contains(&known.token) => Relation::Later,
            Ordering::Less if known.history.contains(&self.token) => Relation::Earlier,
            _ => Relation::Branched,
        }
    }
}

/// A topic as its producers and consumers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Topology {
    pub(crate) topic: TopicName,
    /// Drawn when it was made: a topic of the same name that is made later is another one.
    pub(crate) id: Uuid,
    pub(crate) generation: i32,
    /// In rising order.
    pub(crate) partitions: Vec<PartitionId>,
    /// Ranges of slots: first, last, partition. In order, without gaps.
    pub(crate) slots: Vec<(u16, u16, PartitionId)>,
}

impl Topology {
    /// Its name, and its id: which topic of that name it is.
    pub(crate) fn identity(&self) -> (&TopicName, Uuid) {
        (&self.topic, self.id)
    }

    /// The index into `partitions` for every slot.
    pub(crate) fn slot_table(&self) -> Vec<u16> {
        let mut table = vec![0; usize::from(SLOTS)];
        for (first, last, partition) in &self.slots {
            let index = self.partitions.binary_search(partition).unwrap_or(0);
            let index = u16::try_from(index).unwrap_or(0);
            table[usize::from(*first)..=usize::from(*last)].fill(index);
        }
        table
    }

    /// The partitions by node.
    pub(crate) fn by_node(&self) -> BTreeMap<NodeId, Vec<PartitionId>> {
        let mut nodes: BTreeMap<NodeId, Vec<PartitionId>> = BTreeMap::new();
        for partition in &self.partitions {
            nodes.entry(partition.node()).or_default().push(*partition);
        }
        nodes
    }
}

/// Splits the slots evenly over partitions: ranges of 16,384 / n slots, one more for some.
pub(crate) fn even_slots(partitions: &[PartitionId]) -> Vec<(u16, u16, PartitionId)> {
    let count = u32::try_from(partitions.len()).unwrap_or(u32::MAX).max(1);
    let start = |index: u32| u16::try_from(u32::from(SLOTS) * index / count).unwrap_or(SLOTS);
    partitions
        .iter()
        .zip(0..)
        .map(|(partition, index)| (start(index), start(index + 1) - 1, *partition))
        .collect()
}

/// How many of `count` new partitions each node gets, so that all nodes end with as equal numbers
/// as can be; no node has more than 99.
pub(crate) fn spread(
    count: usize,
    nodes: &[NodeId],
    taken: &HashMap<NodeId, usize>,
) -> Result<BTreeMap<NodeId, usize>> {
    let mut given: BTreeMap<NodeId, usize> = BTreeMap::new();
    // First an even share of this topic on each node, then the emptier ones.
    let used = |node: &NodeId| taken.get(node).copied().unwrap_or(0);
    for _ in 0..count {
        let free = |given: &BTreeMap<NodeId, usize>, node: &NodeId| {
            used(node) + given.get(node).copied().unwrap_or(0) < 99
        };
        let next = nodes
            .iter()
            .filter(|node| free(&given, node))
            .min_by_key(|node| (given.get(node).copied().unwrap_or(0), used(node), **node));
        let Some(node) = next else {
            return Err(Error::new(
                ErrorKind::Full,
                format!(
                    "{count} partitions do not fit: a node has 99, and there are {} nodes",
                    nodes.len()
                ),
            ));
        };
        *given.entry(*node).or_default() += 1;
    }
    Ok(given)
}

/// Takes one partition of each node in turn, so that neighbours in the list are on different nodes.
pub(crate) fn interleave(by_node: &BTreeMap<NodeId, Vec<PartitionId>>) -> Vec<PartitionId> {
    let longest = by_node.values().map(Vec::len).max().unwrap_or(0);
    (0..longest)
        .flat_map(|turn| by_node.values().filter_map(move |list| list.get(turn).copied()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn partitions(count: u32) -> Vec<PartitionId> {
        (0..count).map(|n| PartitionId::try_from(10_101 + n / 99 * 100 + n % 99).unwrap()).collect()
    }

    #[test]
    fn key_slots_have_fixed_values() {
        let vectors = [
            ("", 0),
            ("123456789", 12_739),
            ("a", 15_495),
            ("customer-42", 5_299),
            ("订单", 4_529),
        ];
        for (key, slot) in vectors {
            assert_eq!(key_slot(key), slot, "{key}");
        }
    }

    #[test]
    fn keys_spread_over_a_thousand_partitions_within_five_percent_of_their_slots() {
        let slots = even_slots(&partitions(1_000));
        let mean = f64::from(SLOTS) / 1_000.0;
        for (first, last, _) in &slots {
            assert!((f64::from(last - first + 1) / mean - 1.0).abs() < 0.05);
        }
    }

    /// A control database that draws tokens.
    #[derive(Clone)]
    struct Control(Version);

    impl Control {
        fn change(&mut self) -> Version {
            let Version { number, token, history } = self.0.clone();
            let history = std::iter::once(token).chain(history).take(32).collect();
            self.0 = Version { number: number + 1, token: Uuid::new_v4(), history };
            self.0.clone()
        }
    }

    #[test]
    fn a_version_that_was_lost_is_told_from_the_next_of_the_same_number() {
        let first = Version { number: 1, token: Uuid::new_v4(), history: Vec::new() };
        let mut control = Control(first.clone());
        let versions: Vec<Version> = (0..50).map(|_| control.change()).collect();
        let (known, found) = (&versions[20], &versions[21]);
        assert_eq!((known.after(known), found.after(known)), (Relation::Same, Relation::Later));
        assert_eq!(
            (known.after(found), versions[49].after(found)),
            (Relation::Earlier, Relation::Later)
        );
        assert_eq!(
            (first.after(&versions[49]), versions[49].after(&first)),
            (Relation::Earlier, Relation::Later)
        );
        // Two changes are lost, and then one, two and three others are made.
        let mut restored = Control(versions[19].clone());
        assert_eq!(restored.0.after(found), Relation::Earlier);
        for _ in 0..3 {
            assert_eq!(restored.change().after(found), Relation::Branched);
        }
    }

    proptest! {
        #[test]
        fn slots_are_covered_once(count in 1_u32..=9_801) {
            let slots = even_slots(&partitions(count));
            let mut next = 0;
            for (first, last, _) in &slots {
                prop_assert_eq!(*first, next);
                next = last + 1;
            }
            prop_assert_eq!(next, SLOTS);
        }

        #[test]
        fn new_partitions_are_spread_evenly(count in 1_usize..200, nodes in 1_u8..=20) {
            let nodes: Vec<NodeId> = (1..=nodes).map(|n| NodeId::new(n).unwrap()).collect();
            let Ok(given) = spread(count, &nodes, &HashMap::new()) else {
                prop_assert!(count > nodes.len() * 99);
                return Ok(());
            };
            prop_assert_eq!(given.values().sum::<usize>(), count);
            let per_node = |node| given.get(node).copied().unwrap_or(0);
            let most = nodes.iter().map(per_node).max().unwrap();
            prop_assert!(most - nodes.iter().map(per_node).min().unwrap() <= 1);
        }
    }
}
