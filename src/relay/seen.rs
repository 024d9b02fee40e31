//! Which ids of an outbox were looked at, and which may still come: pure.
//!
//! Ids are drawn in order and committed in any. So below the highest id that was seen there are gaps:
//! messages whose transaction is open, has been rolled back, or was never about one. Nobody waits for a
//! gap: what is above it is taken, and it is looked at again.
//!
//! ```text
//!   id   1 2 3 . . 6 7 8 . 10 11 │ 12 ..
//!              gap     gap       next: what is above has not been looked at
//! ```
//!
//! Whoever draws an id has a transaction id before. So a gap can only be filled by a transaction that was
//! under way when the gap had been seen. When all of these are over, and a look in a later snapshot finds
//! it empty, it stays empty.
//!
//! A look walks over the dead entries of the ranges that it reads, and while an old snapshot is held these
//! are never cleaned up. So a short gap is looked at each time; a long one, as after a takeover, when nothing
//! is known of what is below, only when one of its transactions has ended.

use std::collections::BTreeSet;

use crate::store::outbox::Snapshot;

/// A gap of so many ids, and more, is long.
const LONG: i64 = 1_000;
/// So many gaps, or ids in short ones, become one long gap.
const MAX_GAPS: usize = 1_000;
const MAX_IDS: i64 = 50_000;

/// Ids that are to be looked at again become one range where there are fewer between them.
const NEAR: i64 = 100;

/// Ids from the first to the last.
pub(super) type Range = (i64, i64);

/// See the module.
#[derive(Debug)]
pub(super) struct Seen {
    /// All ids up to this one were looked at.
    next: i64,
    /// To be looked at, by nobody knows whose transaction.
    fresh: Vec<Range>,
    gaps: Vec<Gap>,
    /// A gap of more ids is long.
    long: i64,
}

/// Ids that were not there, and what may still bring them.
#[derive(Debug)]
struct Gap {
    range: Range,
    open: BTreeSet<u64>,
    /// Some of these have ended since it was looked at.
    due: bool,
}

impl Gap {
    fn is_looked_at(&self, long: i64) -> bool {
        self.due || self.range.1 - self.range.0 < long
    }
}

/// What a look reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) after: i64,
    pub(super) ranges: Vec<Range>,
    /// Whether it needs a transaction id of its own.
    pub(super) draws: bool,
}

/// What it saw.
#[derive(Debug)]
pub(super) struct Sight<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) own: Option<u64>,
    pub(super) last_id: i64,
    /// In rising order.
    pub(super) ids: &'a [i64],
    /// Whether there may be more in the scope, above the last of these.
    pub(super) is_full: bool,
}

impl Seen {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { next: 0, fresh: Vec::new(), gaps: Vec::new(), long: LONG }
    }

    /// What the next look has to read.
    pub(super) fn scope(&self) -> Scope {
        let looked_at =
            self.gaps.iter().filter(|gap| gap.is_looked_at(self.long)).map(|gap| gap.range);
        let mut ranges: Vec<Range> = self.fresh.iter().copied().chain(looked_at).collect();
        ranges.sort_unstable();
        Scope { after: self.next, ranges, draws: !self.fresh.is_empty() }
    }

    /// Whether no id is known that may still come.
    pub(super) fn is_settled(&self) -> bool {
        self.fresh.is_empty() && self.gaps.is_empty()
    }

    /// Whether something is to be looked at without waiting for anything.
    pub(super) fn is_due(&self) -> bool {
        !self.fresh.is_empty() || self.gaps.iter().any(|gap| gap.due)
    }

    /// Whether the database is another than was seen, or an earlier one: ids are used again there.
    pub(super) fn is_ahead_of(&self, last_id: i64) -> bool {
        self.next > last_id
    }

    /// These ids are to be looked at again.
    pub(super) fn again(&mut self, range: Range) {
        self.fresh.push(range);
    }

    /// The same of single ones. Those that lie near to each other become one range.
    pub(super) fn again_all(&mut self, ids: &[i64]) {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        for near in ids.chunk_by(|id, next| next - id <= NEAR) {
            if let (Some(first), Some(last)) = (near.first(), near.last()) {
                self.again((*first, *last));
            }
        }
    }

    /// Takes over what a look of this scope saw. Returns up to which id it is to be believed: what is above
    /// is left for the next look, which sees what is below it too.
    pub(super) fn observe(&mut self, scope: &Scope, sight: &Sight<'_>) -> i64 {
        let last = sight.ids.last().copied().unwrap_or(0);
        let upto =
            self.end_transactions(sight.snapshot).min(if sight.is_full { last } else { i64::MAX });
        let fresh = std::mem::take(&mut self.fresh);
        self.look_at_gaps(scope, sight.ids, upto);
        for range in fresh {
            let (below, above) = split(range, upto);
            self.fresh.extend(above);
            let (Some(below), Some(own)) = (below, sight.own) else {
                self.fresh.extend(below);
                continue;
            };
            let open: BTreeSet<u64> = sight.snapshot.open_before(own).collect();
            if !open.is_empty() {
                let left = without(below, sight.ids).into_iter();
                self.gaps.extend(left.map(|range| Gap { range, open: open.clone(), due: false }));
            }
        }
        let top = if upto == i64::MAX { sight.last_id.max(last) } else { upto };
        if top > self.next {
            self.fresh.extend(without((self.next + 1, top), sight.ids));
            self.next = top;
        }
        self.merge();
        upto
    }

    /// Notes which transactions are over. Returns up to which id the look is to be believed: what has ended
    /// may have been published, in a gap that was passed over, before something that was seen above.
    fn end_transactions(&mut self, snapshot: &Snapshot) -> i64 {
        let (mut upto, long) = (i64::MAX, self.long);
        for gap in &mut self.gaps {
            let (passed_over, before) = (!gap.is_looked_at(long), gap.open.len());
            gap.open.retain(|xid| !snapshot.is_over(*xid));
            if passed_over && gap.open.len() < before {
                gap.due = true;
                upto = upto.min(gap.range.0 - 1);
            }
        }
        upto
    }

    /// Keeps what is left of the gaps that were looked at, where it may still come.
    fn look_at_gaps(&mut self, scope: &Scope, ids: &[i64], upto: i64) {
        let mut kept = Vec::new();
        for gap in std::mem::take(&mut self.gaps) {
            if scope.ranges.binary_search(&gap.range).is_err() {
                kept.push(gap);
                continue;
            }
            let (below, above) = split(gap.range, upto);
            let part = |range, due| Gap { range, open: gap.open.clone(), due };
            kept.extend(above.map(|range| part(range, true)));
            if !gap.open.is_empty() {
                let left = below.into_iter().flat_map(|range| without(range, ids));
                kept.extend(left.map(|range| part(range, false)));
            }
        }
        self.gaps = kept;
    }

    /// Where gaps are too many, one takes the place of all.
    fn merge(&mut self) {
        let short = self.gaps.iter().filter(|gap| gap.range.1 - gap.range.0 < self.long);
        let ids: i64 = short.map(|gap| gap.range.1 - gap.range.0 + 1).sum();
        if self.fresh.len() + self.gaps.len() <= MAX_GAPS && ids <= MAX_IDS {
            return;
        }
        let all = || self.fresh.iter().copied().chain(self.gaps.iter().map(|gap| gap.range));
        let first = all().map(|range| range.0).min().unwrap_or(0);
        let last = all().map(|range| range.1).max().unwrap_or(0);
        self.gaps.clear();
        self.fresh = vec![(first, last)];
    }
}

/// The parts of a range up to an id, and above it.
fn split(range: Range, upto: i64) -> (Option<Range>, Option<Range>) {
    let (first, last) = range;
    let below = (first <= upto).then(|| (first, last.min(upto)));
    let above = (last > upto).then(|| (first.max(upto.saturating_add(1)), last));
    (below, above)
}

/// What is left of a range without these ids, which are in rising order.
fn without((first, last): Range, ids: &[i64]) -> Vec<Range> {
    let from = ids.partition_point(|id| *id < first);
    let mut left = Vec::new();
    let mut at = first;
    for id in ids[from..].iter().copied().take_while(|id| *id <= last) {
        if id > at {
            left.push((at, id - 1));
        }
        at = id + 1;
    }
    if at <= last {
        left.push((at, last));
    }
    left
}

#[cfg(test)]
mod tests;
