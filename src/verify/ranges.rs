//! Sets of numbers that are mostly dense, kept as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of numbers; memory goes by its number of ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    /// Start to end (not included), apart from each other.
    ranges: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds all numbers of a range.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.ranges.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.ranges.insert(start, end);
    }

    /// Takes one number out; says whether it was there.
    pub(super) fn remove(&mut self, number: u64) -> bool {
        let Some((&from, &to)) = self.ranges.range(..=number).next_back() else {
            return false;
        };
        if number >= to {
            return false;
        }
        self.ranges.remove(&from);
        self.insert(from..number);
        self.insert(number + 1..to);
        true
    }

    /// The parts of a range that are not in the set.
    pub(super) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        if let Some((_, &to)) = self.ranges.range(..=range.start).next_back() {
            at = at.max(to);
        }
        for (&from, &to) in self.ranges.range(range.start..) {
            if from >= range.end {
                break;
            }
            if from > at {
                gaps.push(at..from);
            }
            at = at.max(to);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Whether all of a range is in the set; an empty one is.
    pub(super) fn covers(&self, range: &Range<u64>) -> bool {
        let held = self.ranges.range(..=range.start).next_back();
        range.is_empty() || held.is_some_and(|(_, to)| *to >= range.end)
    }

    /// Whether any of a range is in the set.
    pub(super) fn touches(&self, range: &Range<u64>) -> bool {
        let before = self.ranges.range(..range.end).next_back();
        !range.is_empty() && before.is_some_and(|(_, to)| *to > range.start)
    }

    /// How many numbers are in it.
    pub(super) fn count(&self) -> u64 {
        self.ranges.iter().map(|(from, to)| to - from).sum()
    }

    /// How many ranges it takes.
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Joins its two lowest ranges, by adding what is between them.
    pub(super) fn close_lowest_gap(&mut self) {
        let mut ends = self.ranges.values();
        if let (Some(&low), Some(&high)) = (ends.next(), ends.next()) {
            self.insert(low..high);
        }
    }

    /// Takes its lowest range out.
    pub(super) fn pop_lowest(&mut self) -> Option<Range<u64>> {
        self.ranges.pop_first().map(|(from, to)| from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64, u64),
        Remove(u64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u64..60, 0_u64..12).prop_map(|(start, len)| Step::Insert(start, start + len)),
            (0_u64..72).prop_map(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            steps in prop::collection::vec(any_step(), 0..40), from in 0_u64..70, len in 0_u64..30,
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Insert(start, end) => {
                        ranges.insert(start..end);
                        model.extend(start..end);
                    }
                    Step::Remove(number) => {
                        prop_assert_eq!(ranges.remove(number), model.remove(&number));
                    }
                }
            }
            let asked = from..from + len;
            let missing: Vec<_> = asked.clone().filter(|n| !model.contains(n)).collect();
            let gaps: Vec<_> = ranges.gaps(asked.clone()).into_iter().flatten().collect();
            prop_assert_eq!(&gaps, &missing);
            prop_assert_eq!(ranges.covers(&asked), missing.is_empty());
            prop_assert_eq!(ranges.touches(&asked), missing.len() as u64 != len);
            prop_assert_eq!(ranges.count(), model.len() as u64);
            let starts = model.iter().filter(|n| **n == 0 || !model.contains(&(**n - 1))).count();
            prop_assert_eq!(ranges.len(), starts);
        }
    }

    #[test]
    fn ranges_are_given_up_from_below() {
        let mut ranges = Ranges::default();
        for range in [1..3, 5..6, 9..12] {
            ranges.insert(range);
        }
        ranges.close_lowest_gap();
        assert_eq!((ranges.len(), ranges.count()), (2, 8));
        assert_eq!(ranges.pop_lowest(), Some(1..6));
        assert_eq!(ranges.pop_lowest(), Some(9..12));
        assert_eq!(ranges.pop_lowest(), None);
    }
}
