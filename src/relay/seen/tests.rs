use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A database in which transactions draw ids and end, and a relay that looks.
struct Model {
    next_xid: u64,
    /// The highest transaction that has ended: a snapshot knows none beyond it.
    completed: u64,
    last_id: i64,
    /// Transactions under way, with the ids that they have published.
    open: BTreeMap<u64, Vec<i64>>,
    /// Committed and not taken.
    there: BTreeSet<i64>,
    /// For each id the highest one that was committed before it was drawn.
    before: BTreeMap<i64, BTreeSet<i64>>,
    committed: BTreeSet<i64>,
    taken: Vec<i64>,
    seen: Seen,
}

#[derive(Debug, Clone)]
enum Act {
    Begin,
    Publish(usize),
    Commit(usize),
    Rollback(usize),
    Look(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => Just(Act::Begin),
        6 => any::<usize>().prop_map(Act::Publish),
        3 => any::<usize>().prop_map(Act::Commit),
        1 => any::<usize>().prop_map(Act::Rollback),
        4 => (1..6_usize).prop_map(Act::Look),
    ]
}

impl Model {
    fn snapshot(&self) -> Snapshot {
        let next = self.completed + 1;
        Snapshot { next, open: self.open.keys().copied().filter(|xid| *xid < next).collect() }
    }

    fn nth(&self, nth: usize) -> Option<u64> {
        let count = self.open.len();
        (count > 0).then(|| *self.open.keys().nth(nth % count).unwrap())
    }

    fn end(&mut self, nth: usize, commits: bool) {
        let Some(xid) = self.nth(nth) else { return };
        let ids = self.open.remove(&xid).unwrap();
        self.completed = self.completed.max(xid);
        if commits {
            self.committed.extend(&ids);
            self.there.extend(ids);
        }
    }

    fn look(&mut self, limit: usize) {
        let scope = self.seen.scope();
        let own = scope.draws.then(|| {
            self.next_xid += 1;
            self.next_xid
        });
        let within = |id: &i64| {
            *id > scope.after
                || scope.ranges.iter().any(|(first, last)| (first..=last).contains(&id))
        };
        let ids: Vec<i64> = self.there.iter().copied().filter(within).take(limit).collect();
        let (snapshot, is_full) = (self.snapshot(), ids.len() == limit);
        let sight = Sight { snapshot: &snapshot, own, last_id: self.last_id, ids: &ids, is_full };
        let upto = self.seen.observe(&scope, &sight);
        if let Some(own) = own {
            self.completed = self.completed.max(own);
        }
        for id in ids.into_iter().filter(|id| *id <= upto) {
            let earlier = &self.before[&id];
            let missing = earlier.iter().find(|earlier| self.there.contains(earlier));
            assert_eq!(missing, None, "taken after {id}, which was published later");
            assert!(self.there.remove(&id), "{id} is taken twice");
            self.taken.push(id);
        }
    }

    fn run(&mut self, act: &Act) {
        match act {
            Act::Begin => {
                self.next_xid += 1;
                self.open.insert(self.next_xid, Vec::new());
            }
            Act::Publish(nth) => {
                if let Some(xid) = self.nth(*nth) {
                    self.last_id += 1;
                    self.before.insert(self.last_id, self.committed.clone());
                    self.open.get_mut(&xid).unwrap().push(self.last_id);
                }
            }
            Act::Commit(nth) => self.end(*nth, true),
            Act::Rollback(nth) => self.end(*nth, false),
            Act::Look(limit) => self.look(*limit),
        }
    }
}

fn check(acts: &[Act], gaps_are_long: bool, few: bool) {
    let mut model = Model {
        next_xid: 0,
        completed: 0,
        last_id: 0,
        open: BTreeMap::new(),
        there: BTreeSet::new(),
        before: BTreeMap::new(),
        committed: BTreeSet::new(),
        taken: Vec::new(),
        seen: Seen::new(),
    };
    if gaps_are_long {
        model.seen.limits.long = 0;
    }
    if few {
        model.seen.limits = Limits { long: 2, gaps: 2, ids: 3, span: 4 };
    }
    for act in acts {
        model.run(act);
    }
    while !model.open.is_empty() {
        model.end(0, true);
    }
    for _ in 0..acts.len() * 2 + 10 {
        model.look(3);
    }
    assert!(model.seen.is_settled(), "{:?}", model.seen);
    let mut taken = model.taken.clone();
    taken.sort_unstable();
    assert_eq!(taken, model.committed.into_iter().collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn what_is_committed_is_taken_once_and_in_order(
        acts in prop::collection::vec(act(), 0..120),
        gaps_are_long: bool,
        few: bool,
    ) {
        check(&acts, gaps_are_long, few);
    }
}

#[test]
fn a_look_reads_nothing_of_a_long_gap_until_a_transaction_has_ended() {
    let mut seen = Seen::new();
    let open = Snapshot { next: 11, open: vec![5] };
    let sight = |ids, own| Sight { snapshot: &open, own, last_id: 5_000, ids, is_full: false };
    let scope = seen.scope();
    assert_eq!(seen.observe(&scope, &sight(&[4_000], None)), i64::MAX);
    let scope = seen.scope();
    assert_eq!(scope.ranges, [(1, 3_999), (4_001, 5_000)]);
    assert!(scope.draws && seen.is_due());
    seen.observe(&scope, &sight(&[], Some(11)));
    assert!(!seen.is_settled() && !seen.is_due());
    // The short one is looked at each time.
    let scope = seen.scope();
    assert_eq!(scope, Scope { after: 5_000, ranges: vec![(4_001, 5_000)], draws: false });
    // What has ended may have published in the long one: nothing above it is believed.
    let over = Snapshot { next: 12, open: vec![] };
    let sight = Sight { snapshot: &over, own: None, last_id: 6_000, ids: &[6_000], is_full: false };
    assert_eq!(seen.observe(&scope, &sight), 0);
    let scope = seen.scope();
    assert!(scope.ranges.contains(&(1, 3_999)), "{scope:?}");
    assert_eq!(scope.after, 5_000);
}

/// Every other id of so many, seen while a transaction is open that stays so.
fn alternating(seen: &mut Seen, from: i64, to: i64) {
    let open = Snapshot { next: 11, open: vec![5] };
    let ids: Vec<i64> = (from..to).filter(|id| id % 2 == 0).collect();
    let sight = |ids, own| Sight { snapshot: &open, own, last_id: to - 1, ids, is_full: false };
    seen.observe(&seen.scope(), &sight(&ids, None));
    while seen.is_due() {
        seen.observe(&seen.scope(), &sight(&[], Some(11)));
    }
}

#[test]
fn many_gaps_become_long_ones_that_are_not_read_again_while_nothing_has_ended() {
    let mut seen = Seen::new();
    for nth in 0..50 {
        alternating(&mut seen, 1 + nth * 2_200, 1 + (nth + 1) * 2_200);
        let read: i64 = seen.scope().ranges.iter().map(|range| range.1 - range.0 + 1).sum();
        assert!(read <= 3_300, "after {nth}: {read}");
        assert!(!seen.is_settled());
    }
    let over = Snapshot { next: 12, open: vec![] };
    let sight = Sight { snapshot: &over, own: None, last_id: 110_000, ids: &[], is_full: false };
    while !seen.is_settled() {
        seen.observe(&seen.scope(), &sight);
    }
}

#[test]
fn many_ranges_to_look_at_again_are_few_at_the_next_look() {
    let mut seen = Seen::new();
    seen.again_all(&(0..100_000).map(|n| n * 150).collect::<Vec<_>>());
    let nothing = Snapshot { next: 11, open: vec![] };
    let mut looks = 0;
    while !seen.is_settled() {
        let scope = seen.scope();
        let sight = Sight {
            snapshot: &nothing,
            own: Some(11),
            last_id: 20_000_000,
            ids: &[],
            is_full: false,
        };
        seen.observe(&scope, &sight);
        looks += 1;
        assert!(looks == 1 || scope.ranges.len() <= MAX_GAPS, "{}", scope.ranges.len());
        assert!(looks < 200);
        assert!(scope.ranges.iter().all(|range| range.1 - range.0 < SPAN));
    }
}
