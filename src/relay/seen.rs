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
//! is known of what is below, only when one of its transactions has ended. Where short gaps are too many,
//! neighbours become a long one, which any of their transactions may fill: they were looked at already. And of
//! one range a look reads so much that it ends soon.

use std::collections::BTreeSet;

use crate::store::outbox::Snapshot;

/// A gap of so many ids, and more, is long.
const LONG: i64 = 1_000;
/// Where there are more short gaps, or ids in them, neighbours are merged; and so are long ones.
const MAX_GAPS: usize = 1_000;
const MAX_IDS: i64 = 50_000;
/// So many ids of a range are read at once.
const SPAN: i64 = 200_000;

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
    /// The last id that is to be looked at again.
    again_upto: i64,
    limits: Limits,
}

/// The constants above; smaller in tests.
#[derive(Debug, Clone, Copy)]
struct Limits {
    long: i64,
    gaps: usize,
    ids: i64,
    span: i64,
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
        self.due || !self.is_long(long)
    }

    fn is_long(&self, long: i64) -> bool {
        self.range.1 - self.range.0 >= long
    }

    /// One gap in the place of two, the other above.
    fn extend(&mut self, other: Self) {
        self.range.1 = self.range.1.max(other.range.1);
        self.open.extend(other.open);
        self.due |= other.due;
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
        let limits = Limits { long: LONG, gaps: MAX_GAPS, ids: MAX_IDS, span: SPAN };
        Self { next: 0, fresh: Vec::new(), gaps: Vec::new(), again_upto: 0, limits }
    }

    /// What the next look has to read.
    pub(super) fn scope(&self) -> Scope {
        let mut ranges: Vec<Range> = self.looked_at().map(|range| self.begin(range)).collect();
        ranges.sort_unstable();
        Scope { after: self.next, ranges, draws: !self.fresh.is_empty() }
    }

    fn looked_at(&self) -> impl Iterator<Item = Range> {
        let gaps = self.gaps.iter().filter(|gap| gap.is_looked_at(self.limits.long));
        self.fresh.iter().copied().chain(gaps.map(|gap| gap.range))
    }

    /// What a look reads of a range.
    fn begin(&self, (first, last): Range) -> Range {
        (first, last.min(first.saturating_add(self.limits.span - 1)))
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
        self.again_upto = self.again_upto.max(range.1);
    }

    /// Whether something is left of what was to be looked at again.
    pub(super) fn is_looking_again(&self) -> bool {
        self.again_upto > 0
    }

    /// The same of single ones. Those that lie near to each other become one range.
    pub(super) fn again_all(&mut self, ids: &[i64]) {
        let mut ranges: Vec<Range> = ids.iter().map(|id| (*id, *id)).collect();
        ranges.sort_unstable();
        for range in joined(&ranges, NEAR) {
            self.again(range);
        }
    }

    /// Takes over what a look of this scope saw. Returns up to which id it is to be believed: what is above
    /// is left for the next look, which sees what is below it too.
    pub(super) fn observe(&mut self, scope: &Scope, sight: &Sight<'_>) -> i64 {
        let last = sight.ids.last().copied().unwrap_or(0);
        let is_cut = |range: &Range| self.begin(*range) != *range;
        let cut = self.looked_at().filter(is_cut).map(|range| self.begin(range).1).min();
        let full = if sight.is_full { last } else { i64::MAX };
        let upto = self.end_transactions(sight.snapshot).min(cut.unwrap_or(i64::MAX)).min(full);
        if upto >= self.again_upto {
            self.again_upto = 0;
        }
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
        let (mut upto, long) = (i64::MAX, self.limits.long);
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
            if scope.ranges.binary_search(&self.begin(gap.range)).is_err() {
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

    /// Where ranges are too many, neighbours become one. Nothing has to be looked at for that.
    fn merge(&mut self) {
        let Limits { long, gaps: most, ids: most_ids, span } = self.limits;
        let mut near = NEAR;
        while self.fresh.len() > most {
            self.fresh.sort_unstable();
            self.fresh = joined(&self.fresh, near);
            near = near.saturating_mul(8);
        }
        let short = || self.gaps.iter().filter(|gap| !gap.is_long(long));
        let ids: i64 = short().map(|gap| gap.range.1 - gap.range.0 + 1).sum();
        if short().count() > most || ids > most_ids {
            let fits = |last: &Gap, next: &Gap| {
                !last.is_long(long) && !next.is_long(long) && next.range.1 - last.range.0 < span
            };
            self.merge_gaps(fits);
        }
        if self.gaps.iter().filter(|gap| gap.is_long(long)).count() > most {
            let mut nth = 0_u32;
            self.merge_gaps(|_, _| {
                nth += 1;
                nth % 2 == 1
            });
        }
    }

    fn merge_gaps(&mut self, mut fits: impl FnMut(&Gap, &Gap) -> bool) {
        let mut merged: Vec<Gap> = Vec::new();
        self.gaps.sort_unstable_by_key(|gap| gap.range);
        for gap in self.gaps.drain(..) {
            match merged.last_mut() {
                Some(last) if fits(last, &gap) => last.extend(gap),
                _ => merged.push(gap),
            }
        }
        self.gaps = merged;
    }
}

/// Ranges in rising order, as one where they are near.
fn joined(ranges: &[Range], near: i64) -> Vec<Range> {
    let mut all: Vec<Range> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.0.saturating_sub(last.1) <= near => last.1 = last.1.max(range.1),
            _ => all.push(*range),
        }
    }
    all
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
