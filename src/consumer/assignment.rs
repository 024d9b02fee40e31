//! Which member of a group consumes which partition. Pure: every member computes the same.
//!
//! ```text
//! members, what they take and reach ─┐
//! partitions                         ├─> keep ─> fill up ─> level out ─> an owner for each partition
//! the assignment before ─────────────┘
//! ```
//!
//! 1. **Keep.** A partition stays with its owner, if that is still there and may have it.
//! 2. **Fill up.** Free partitions go to members that have less than an even share, node by node: who
//!    owns partitions of a node needs a lease, connections and a listener there.
//! 3. **Level out.** While one member has at least two more than another that may have one of them, one
//!    moves.
//!
//! So loads differ by at most one where everybody may have everything, and no fewer partitions could
//! move: a member that gives one in step 3 never takes one, since the highest load only falls there
//! and the lowest only rises.
//!
//! Partitions on a list that a member was told to take belong to members with such lists, while there are
//! any, and are not part of what the others share.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use uuid::Uuid;

use crate::id::{NodeId, PartitionId};

/// A live member, as the others see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) member: Uuid,
    /// What it was told to take; none where it takes a share of all.
    pub(crate) only: Option<BTreeSet<PartitionId>>,
    /// Nodes that it can't reach.
    pub(crate) avoid: BTreeSet<NodeId>,
}

/// The owner of each partition that has one.
pub(crate) type Owners = BTreeMap<PartitionId, Uuid>;

/// Divides partitions among members. Members must be in the order that all see them in.
pub(crate) fn assign(partitions: &[PartitionId], peers: &[Peer], before: &Owners) -> Owners {
    let (listed, shared) = divide(partitions, peers);
    let mut owners = Owners::new();
    for (takers, partitions) in listed {
        Round::new(&partitions, takers, before).settle(&mut owners);
    }
    let sharing = peers.iter().filter(|peer| peer.only.is_none()).collect();
    Round::new(&shared, sharing, before).settle(&mut owners);
    owners
}

type Listed<'a> = Vec<(Vec<&'a Peer>, Vec<PartitionId>)>;

/// Partitions that the same members have on their lists, and those that are on none.
fn divide<'a>(partitions: &[PartitionId], peers: &'a [Peer]) -> (Listed<'a>, Vec<PartitionId>) {
    let mut listed: BTreeMap<Vec<usize>, Vec<PartitionId>> = BTreeMap::new();
    let lists = |peer: &Peer, partition| peer.only.as_ref().is_some_and(|o| o.contains(partition));
    for partition in partitions {
        let takers = peers.iter().enumerate().filter(|(_, peer)| lists(peer, partition));
        listed.entry(takers.map(|(place, _)| place).collect()).or_default().push(*partition);
    }
    let shared = listed.remove(&Vec::new()).unwrap_or_default();
    let of = |places: Vec<usize>| places.into_iter().map(|place| &peers[place]).collect();
    (listed.into_iter().map(|(places, partitions)| (of(places), partitions)).collect(), shared)
}

/// Some partitions that some members divide, counted by places in `peers`.
struct Round<'a> {
    peers: Vec<&'a Peer>,
    /// Nodes that nobody reaches: their partitions stay where they are until the node is back.
    dark: BTreeSet<NodeId>,
    /// By member and node, what it has.
    owned: Vec<BTreeMap<NodeId, BTreeSet<PartitionId>>>,
    loads: Vec<usize>,
    /// By node, what nobody has.
    free: BTreeMap<NodeId, BTreeSet<PartitionId>>,
}

impl<'a> Round<'a> {
    fn new(partitions: &[PartitionId], peers: Vec<&'a Peer>, before: &Owners) -> Self {
        let nodes: BTreeSet<NodeId> = partitions.iter().map(|p| p.node()).collect();
        let dark = nodes.into_iter().filter(|node| peers.iter().all(|p| p.avoid.contains(node)));
        let mut round = Self {
            dark: dark.collect(),
            owned: vec![BTreeMap::new(); peers.len()],
            loads: vec![0; peers.len()],
            free: BTreeMap::new(),
            peers,
        };
        let places: HashMap<Uuid, usize> =
            round.peers.iter().enumerate().map(|(place, peer)| (peer.member, place)).collect();
        for partition in partitions {
            let owner = before.get(partition).and_then(|member| places.get(member)).copied();
            match owner.filter(|owner| round.may_have(*owner, partition.node())) {
                Some(owner) => round.give(owner, *partition),
                None => round.put_back(*partition),
            }
        }
        round
    }

    /// Divides all, and adds the outcome to `owners`.
    fn settle(mut self, owners: &mut Owners) {
        if self.peers.is_empty() {
            return;
        }
        self.fill_up();
        self.level_out();
        for (peer, owned) in self.peers.iter().zip(&self.owned) {
            owners.extend(owned.values().flatten().map(|partition| (*partition, peer.member)));
        }
    }

    fn may_have(&self, place: usize, node: NodeId) -> bool {
        !self.peers[place].avoid.contains(&node) || self.dark.contains(&node)
    }

    fn give(&mut self, place: usize, partition: PartitionId) {
        self.owned[place].entry(partition.node()).or_default().insert(partition);
        self.loads[place] += 1;
    }

    fn take(&mut self, place: usize, partition: PartitionId) {
        let node = partition.node();
        if let Some(there) = self.owned[place].get_mut(&node) {
            there.remove(&partition);
            if there.is_empty() {
                self.owned[place].remove(&node);
            }
        }
        self.loads[place] -= 1;
    }

    fn put_back(&mut self, partition: PartitionId) {
        self.free.entry(partition.node()).or_default().insert(partition);
    }

    fn on(&self, place: usize, node: NodeId) -> usize {
        self.owned[place].get(&node).map_or(0, BTreeSet::len)
    }

    /// Gives away what is free: first everybody up to the even share that all have, then the rest.
    fn fill_up(&mut self) {
        let free: usize = self.free.values().map(BTreeSet::len).sum();
        let even = (free + self.loads.iter().sum::<usize>()) / self.peers.len();
        for place in 0..self.peers.len() {
            while self.loads[place] < even
                && let Some(partition) = self.next_free(place)
            {
                self.give(place, partition);
            }
        }
        for partition in std::mem::take(&mut self.free).into_values().flatten() {
            let node = partition.node();
            let takers = (0..self.peers.len()).filter(|place| self.may_have(*place, node));
            let least = takers.min_by_key(|place| {
                (self.loads[*place], std::cmp::Reverse(self.on(*place, node)), *place)
            });
            if let Some(place) = least {
                self.give(place, partition);
            }
        }
    }

    /// Takes a free partition: on a node where the member has most already, else where most are free.
    fn next_free(&mut self, place: usize) -> Option<PartitionId> {
        let nodes = self.free.iter().filter(|(node, _)| self.may_have(place, **node));
        let (node, _) = nodes.max_by_key(|(node, there)| {
            (self.on(place, **node), there.len(), std::cmp::Reverse(**node))
        })?;
        let node = *node;
        let there = self.free.get_mut(&node)?;
        let partition = there.pop_first();
        if there.is_empty() {
            self.free.remove(&node);
        }
        partition
    }

    fn level_out(&mut self) {
        while let Some((giver, taker, partition)) = self.next_move() {
            self.take(giver, partition);
            self.give(taker, partition);
        }
    }

    /// From whoever has most, to whoever has least, of those who may.
    fn next_move(&self) -> Option<(usize, usize, PartitionId)> {
        let mut places: Vec<usize> = (0..self.peers.len()).collect();
        places.sort_by_key(|place| (self.loads[*place], *place));
        for giver in places.iter().rev().copied() {
            for taker in places.iter().copied() {
                if self.loads[giver] < self.loads[taker] + 2 {
                    break;
                }
                if let Some(partition) = self.movable(giver, taker) {
                    return Some((giver, taker, partition));
                }
            }
        }
        None
    }

    /// What moves: of a node where the taker has most already, and the giver fewest.
    fn movable(&self, giver: usize, taker: usize) -> Option<PartitionId> {
        let nodes = self.owned[giver].iter().filter(|(node, _)| self.may_have(taker, **node));
        // Of a node that nobody reaches nothing moves: it would not get anywhere.
        let nodes = nodes.filter(|(node, _)| !self.dark.contains(node));
        let (_, there) = nodes.max_by_key(|(node, there)| {
            let has = std::cmp::Reverse(there.len());
            (self.on(taker, **node), has, std::cmp::Reverse(**node))
        })?;
        there.last().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn partitions(count: u32, nodes: u32) -> Vec<PartitionId> {
        let id = |n: u32| PartitionId::try_from(10_101 + n % nodes * 100 + n / nodes).unwrap();
        (0..count).map(id).collect()
    }

    fn peer(number: u128) -> Peer {
        Peer { member: Uuid::from_u128(number), ..Peer::default() }
    }

    fn peers(numbers: impl IntoIterator<Item = u128>) -> Vec<Peer> {
        numbers.into_iter().map(peer).collect()
    }

    fn loads(owners: &Owners, peers: &[Peer]) -> Vec<usize> {
        let of = |peer: &Peer| owners.values().filter(|member| **member == peer.member).count();
        peers.iter().map(of).collect()
    }

    fn nodes_of(owners: &Owners, peer: &Peer) -> usize {
        let own = owners.iter().filter(|(_, member)| **member == peer.member);
        own.map(|(partition, _)| partition.node()).collect::<BTreeSet<_>>().len()
    }

    #[test]
    fn members_have_whole_nodes_where_that_can_be() {
        let (all, members) = (partitions(99 * 9, 99), peers(1..=11));
        let fresh = assign(&all, &members, &Owners::new());
        assert!(members.iter().all(|peer| nodes_of(&fresh, peer) == 9));
        let one = assign(&all, &members[..1], &Owners::new());
        let two = assign(&all, &members[..2], &one);
        assert_eq!(loads(&two, &members[..2]), [446, 445]);
        assert!(nodes_of(&two, &members[1]) <= 50);
    }

    #[test]
    fn a_list_is_its_members_and_the_others_share_the_rest() {
        let all = partitions(8, 2);
        let listed: BTreeSet<_> = all[..3].iter().copied().collect();
        let mut members = peers([1, 2, 3, 4]);
        members[0].only = Some(listed.clone());
        members[1].only = Some([all[0]].into());
        let before = assign(&all, &members[2..], &Owners::new());
        let owners = assign(&all, &members, &before);
        assert_eq!(owners.len(), 8);
        assert!(all[1..3].iter().all(|p| owners[p] == members[0].member));
        assert!(members[..2].iter().any(|peer| peer.member == owners[&all[0]]));
        assert_eq!(loads(&owners, &members[2..]).iter().sum::<usize>(), 5);
        // Whoever has one of two lists' partitions keeps it.
        let again = assign(&all, &members, &owners);
        assert_eq!(again, owners);
        // With the lists' members gone the others have all.
        assert_eq!(loads(&assign(&all, &members[2..], &owners), &members[2..]), [4, 4]);
    }

    #[test]
    fn a_node_that_one_member_cannot_reach_is_another_s_and_one_that_nobody_reaches_stays() {
        let all = partitions(8, 2);
        let mut members = peers([1, 2]);
        let before = assign(&all, &members, &Owners::new());
        let node = NodeId::new(1).unwrap();
        members[0].avoid = [node].into();
        let owners = assign(&all, &members, &before);
        assert!(owners.iter().all(|(p, m)| p.node() != node || *m == members[1].member));
        assert_eq!(owners.len(), 8);
        assert_eq!(loads(&owners, &members), [4, 4]);
        members[1].avoid = [node].into();
        assert_eq!(assign(&all, &members, &owners), owners);
    }

    /// The fewest partitions that must move from one set of members to another.
    fn least_moves(before: &Owners, after: &[Peer]) -> usize {
        let mut kept = loads(before, after);
        kept.sort_unstable_by(|a, b| b.cmp(a));
        let (even, more) = (before.len() / after.len(), before.len() % after.len());
        let may = |place: usize| even + usize::from(place < more);
        let stays: usize = kept.iter().enumerate().map(|(at, load)| (*load).min(may(at))).sum();
        before.len() - stays
    }

    proptest! {
        #[test]
        fn members_come_and_go_and_nothing_moves_that_need_not(
            (count, nodes) in (1_u32..8).prop_flat_map(|nodes| (1..=nodes * 40, Just(nodes))),
            steps in proptest::collection::vec((any::<bool>(), 0_usize..64), 1..24),
        ) {
            let all = partitions(count, nodes);
            let (mut members, mut next) = (peers([1]), 2);
            let mut owners = assign(&all, &members, &Owners::new());
            for (joins, place) in steps {
                if joins || members.len() == 1 {
                    members.push(peer(next));
                    next += 1;
                } else {
                    members.remove(place % members.len());
                }
                let after = assign(&all, &members, &owners);
                prop_assert_eq!(after.len(), all.len());
                let loads = loads(&after, &members);
                prop_assert_eq!(loads.iter().sum::<usize>(), all.len());
                prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1);
                let moved = after.iter().filter(|(p, m)| owners[*p] != **m).count();
                prop_assert_eq!(moved, least_moves(&owners, &members));
                // Computed again from its own outcome nothing moves at all.
                prop_assert_eq!(&assign(&all, &members, &after), &after);
                owners = after;
            }
        }

        #[test]
        fn every_partition_has_one_owner_that_may_have_it(
            count in 1_u32..100,
            members in 1_u128..8,
            avoid in proptest::collection::vec(proptest::collection::btree_set(1_u8..5, 0..4), 8),
            lists in proptest::collection::vec(proptest::option::of(0_usize..100), 8),
        ) {
            let all = partitions(count, 4);
            let mut members = peers(1..=members);
            for ((peer, avoid), list) in members.iter_mut().zip(&avoid).zip(&lists) {
                peer.avoid = avoid.iter().map(|n| NodeId::new(*n).unwrap()).collect();
                peer.only = list.map(|n| all.iter().copied().skip(n % 7).step_by(n % 5 + 1).collect());
            }
            let owners = assign(&all, &members, &Owners::new());
            let shares = members.iter().any(|peer| peer.only.is_none());
            for partition in &all {
                let takers = |listed: bool| members.iter().filter(move |peer| match &peer.only {
                    Some(only) => listed && only.contains(partition),
                    None => !listed,
                });
                let listed = takers(true).count() > 0;
                match owners.get(partition) {
                    None => prop_assert!(!listed && !shares),
                    Some(owner) => {
                        let reached = |peer: &&Peer| !peer.avoid.contains(&partition.node());
                        let owner = takers(listed).find(|peer| peer.member == *owner);
                        prop_assert!(owner.is_some(), "not one of those that take it");
                        prop_assert!(takers(listed).find(reached).is_none() || owner.as_ref().is_some_and(reached));
                    }
                }
            }
            prop_assert_eq!(&assign(&all, &members, &owners), &owners);
        }
    }
}
