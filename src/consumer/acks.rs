//! What is acknowledged in a partition: a watermark, and runs above it. Pure.

use std::collections::{BTreeMap, VecDeque};

/// Acknowledgements of one holding of a partition, in any order.
///
/// ```text
/// read:   [1 .. 9]   [101 .. 104]        (two days)
/// acked:   1 2 3   5      102            watermark 3, ahead {5, 102}
/// ```
///
/// Ids are dense inside a day and leap between days, so the watermark steps along what was read.
///
/// What is kept is bounded: nobody reads on while too much lies between the watermark and what was read
/// last, nor hands out while there are too many runs.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    acked_id: i64,
    /// What was read and is not below the watermark, in order: first and last of dense runs.
    read: VecDeque<(i64, i64)>,
    /// How many ids those runs have.
    read_count: i64,
    /// Acknowledged above the watermark: first to last, apart from each other.
    ahead: BTreeMap<i64, i64>,
    /// Rises with every change.
    version: u64,
    flushed: u64,
}

/// What is to be committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pending {
    pub(crate) acked_id: i64,
    /// First and last of each run above it.
    pub(crate) acked_ahead: Vec<(i64, i64)>,
    /// To report back.
    pub(crate) version: u64,
}

impl Tracker {
    /// From what is committed.
    pub(crate) fn new(acked_id: i64, ahead: impl IntoIterator<Item = (i64, i64)>) -> Self {
        Self { acked_id, ahead: ahead.into_iter().collect(), ..Self::default() }
    }

    /// A run of ids was read, later than all before. Says whether parts of it are acknowledged
    /// already, since an earlier holding: asked later, the watermark may have passed them.
    pub(crate) fn read(&mut self, first: i64, last: i64) -> bool {
        let run = self.ahead.range(..=last).next_back();
        let patchy = first <= self.acked_id || run.is_some_and(|(_, end)| *end >= first);
        // Below the watermark where it was read before, and is read again.
        let first = first.max(self.acked_id + 1);
        if first > last {
            return true;
        }
        match self.read.back_mut() {
            Some(run) if run.1 + 1 == first => run.1 = last,
            _ => self.read.push_back((first, last)),
        }
        self.read_count += last - first + 1;
        self.advance();
        patchy
    }

    /// What was read after an id is read again later: none of it was handed out.
    pub(crate) fn rewind(&mut self, position: i64) {
        while let Some(run) = self.read.back_mut().filter(|run| run.1 > position) {
            let kept = position.max(run.0 - 1);
            self.read_count -= run.1 - kept;
            run.1 = kept;
            if run.1 < run.0 {
                self.read.pop_back();
            }
        }
        self.step_to(self.acked_id);
    }

    /// How many ids lie between the watermark and what was read last.
    pub(crate) fn span(&self) -> usize {
        let passed = self.read.front().map_or(0, |(first, _)| (self.acked_id - first + 1).max(0));
        usize::try_from(self.read_count - passed).unwrap_or(0)
    }

    /// How many runs are acknowledged above the watermark.
    pub(crate) fn runs(&self) -> usize {
        self.ahead.len()
    }

    /// An id is acknowledged; again does no harm.
    pub(crate) fn ack(&mut self, id: i64) {
        if self.is_acked(id) {
            return;
        }
        self.version += 1;
        if self.next() == Some(id) && self.ahead.is_empty() {
            self.step_to(id);
        } else {
            self.insert(id);
            self.advance();
        }
    }

    /// Whether an id is the first that was read and is not acknowledged.
    pub(crate) fn is_next(&self, id: i64) -> bool {
        self.next() == Some(id)
    }

    /// Whether an id is acknowledged.
    pub(crate) fn is_acked(&self, id: i64) -> bool {
        id <= self.acked_id
            || self.ahead.range(..=id).next_back().is_some_and(|(_, last)| *last >= id)
    }

    /// Everything up to here is acknowledged.
    #[cfg(test)]
    pub(crate) fn acked_id(&self) -> i64 {
        self.acked_id
    }

    /// What is to be committed; none where nothing changed.
    pub(crate) fn pending(&self) -> Option<Pending> {
        let ahead = self.ahead.iter().map(|(first, last)| (*first, *last));
        (self.version > self.flushed).then(|| Pending {
            acked_id: self.acked_id,
            acked_ahead: ahead.collect(),
            version: self.version,
        })
    }

    /// That version is committed.
    pub(crate) fn flushed(&mut self, version: u64) {
        self.flushed = self.flushed.max(version);
    }

    /// The first id that was read and is not acknowledged.
    fn next(&self) -> Option<i64> {
        self.read.front().map(|(first, _)| (*first).max(self.acked_id + 1))
    }

    fn step_to(&mut self, id: i64) {
        self.acked_id = id;
        while let Some((first, last)) = self.read.front().copied().filter(|(_, last)| *last <= id) {
            self.read_count -= last - first + 1;
            self.read.pop_front();
        }
    }

    fn insert(&mut self, id: i64) {
        let before = self.ahead.range(..id).next_back().map(|(first, last)| (*first, *last));
        let first = before.filter(|(_, last)| last + 1 == id).map_or(id, |(first, _)| first);
        let last = self.ahead.remove(&(id + 1)).unwrap_or(id);
        self.ahead.insert(first, last);
    }

    /// Moves the watermark over runs that have joined it.
    fn advance(&mut self) {
        while let Some(next) = self.next() {
            let run = self.ahead.range(..=next).next_back().map(|(first, last)| (*first, *last));
            let Some((first, last)) = run.filter(|(_, last)| *last >= next) else {
                break;
            };
            let end = self.read.front().map_or(last, |(_, end)| last.min(*end));
            self.ahead.remove(&first);
            if last > end {
                self.ahead.insert(end + 1, last);
            }
            self.version += 1;
            self.step_to(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_watermark_steps_over_the_gap_between_days() {
        let mut tracker = Tracker::new(0, []);
        tracker.read(101, 103);
        tracker.read(1001, 1002);
        for id in [1001, 103, 101] {
            tracker.ack(id);
        }
        assert_eq!(tracker.acked_id(), 101);
        tracker.ack(102);
        assert_eq!(tracker.acked_id(), 1001);
        assert_eq!(tracker.pending().map(|p| (p.acked_id, p.acked_ahead)), Some((1001, vec![])));
    }

    #[test]
    fn nothing_is_pending_until_something_changed_and_after_it_was_flushed() {
        let mut tracker = Tracker::new(5, []);
        tracker.read(6, 10);
        assert!(tracker.pending().is_none());
        tracker.ack(6);
        let first = tracker.pending().unwrap();
        tracker.ack(8);
        tracker.flushed(first.version);
        let second = tracker.pending().unwrap();
        assert_eq!((second.acked_id, second.acked_ahead), (6, vec![(8, 8)]));
        tracker.flushed(second.version);
        assert!(tracker.pending().is_none());
    }

    #[test]
    fn what_is_read_again_counts_once() {
        let mut tracker = Tracker::new(0, [(14, 15)]);
        tracker.read(1, 3);
        tracker.read(11, 16);
        tracker.ack(1);
        assert_eq!(tracker.span(), 8);
        tracker.rewind(12);
        assert_eq!(tracker.span(), 4);
        assert!(tracker.read(13, 16));
        assert_eq!(tracker.span(), 8);
        // The watermark may have passed what is read again.
        (2..=15).for_each(|id| tracker.ack(id));
        tracker.rewind(13);
        assert!(tracker.read(14, 16));
        assert_eq!(tracker.span(), 1);
        let mut tracker = Tracker::new(0, []);
        tracker.read(1, 3);
        tracker.ack(1);
        tracker.rewind(2);
        assert_eq!(tracker.span(), 1);
        tracker.rewind(0);
        assert_eq!(tracker.span(), 0);
        tracker.read(2, 3);
        tracker.read(11, 16);
        (2..=16).for_each(|id| tracker.ack(id));
        assert_eq!((tracker.acked_id(), tracker.span(), tracker.runs()), (16, 0, 0));
    }

    #[test]
    fn what_is_read_again_below_the_watermark_does_not_stop_it_at_the_end_of_a_day() {
        let mut tracker = Tracker::new(0, [(3, 10)]);
        tracker.read(1, 5);
        tracker.read(6, 10);
        tracker.ack(1);
        tracker.ack(2);
        tracker.rewind(5);
        assert!(tracker.read(6, 10));
        tracker.read(101, 103);
        (101..=103).for_each(|id| tracker.ack(id));
        assert_eq!((tracker.acked_id(), tracker.span(), tracker.runs()), (103, 0, 0));
    }

    #[test]
    fn what_was_acknowledged_ahead_before_is_passed_when_it_is_read() {
        let mut tracker = Tracker::new(2, [(3, 4), (6, 7)]);
        assert!(tracker.is_acked(4) && !tracker.is_acked(5));
        assert!(tracker.read(3, 7));
        assert!(!tracker.read(8, 9));
        assert_eq!(tracker.acked_id(), 4);
        tracker.ack(5);
        assert_eq!(tracker.acked_id(), 7);
    }

    proptest! {
        /// Against a set of ids: any runs, any order of acknowledgements, some twice.
        #[test]
        fn the_watermark_is_the_last_id_before_the_first_gap(
            runs in proptest::collection::vec(1_i64..12, 1..6),
            seed in any::<u64>(),
        ) {
            let mut tracker = Tracker::new(0, []);
            let mut ids = Vec::new();
            for (run, length) in runs.iter().enumerate() {
                let first = 1_000 * (i64::try_from(run).unwrap() + 1);
                tracker.read(first, first + length - 1);
                ids.extend(first..first + length);
            }
            let mut order = ids.clone();
            order.sort_by_key(|id| id.unsigned_abs().wrapping_mul(seed | 1).rotate_left(17));
            let mut acked = BTreeSet::new();
            for id in order {
                tracker.ack(id);
                tracker.ack(id);
                acked.insert(id);
                let watermark = ids.iter().take_while(|id| acked.contains(id)).last().copied();
                prop_assert_eq!(tracker.acked_id(), watermark.unwrap_or(0));
                let beyond = ids.iter().filter(|id| **id > watermark.unwrap_or(0)).count();
                prop_assert_eq!(tracker.span(), beyond);
                for id in &ids {
                    prop_assert_eq!(tracker.is_acked(*id), acked.contains(id));
                }
            }
        }
    }
}
