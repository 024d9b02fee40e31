//! The statements that a session keeps prepared: pure.
//!
//! Each partition and day has statements of its own, so that there are always new ones. A kept plan
//! takes memory of the server, about 100 bytes for each byte of its text: statements are counted by
//! that, and the ones that were used the longest time ago go first. With that go those of
//! yesterday's tables.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// All texts that a session keeps, in bytes: some 40 MB in the server. Room for the statements of
/// 99 partitions that are both produced to and consumed.
const MAX_BYTES: usize = 400_000;
/// A statement that nobody has used for so long goes in any case.
const MAX_IDLE: Duration = Duration::from_hours(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Kept<S> {
    all: HashMap<String, Entry<S>>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<S> {
    statement: S,
    bytes: usize,
    used: Instant,
}

impl<S> Default for Kept<S> {
    fn default() -> Self {
        Self { all: HashMap::new(), bytes: 0 }
    }
}

impl<S: Clone> Kept<S> {
    /// The statement with this text, which is used now.
    pub(super) fn get(&mut self, text: &str, now: Instant) -> Option<S> {
        let entry = self.all.get_mut(text)?;
        entry.used = now;
        Some(entry.statement.clone())
    }

    /// Keeps a statement, which is used now. Returns those that go.
    pub(super) fn add(&mut self, text: &str, statement: S, now: Instant) -> Vec<S> {
        let bytes = size_of(text);
        let before = self.all.insert(text.to_owned(), Entry { statement, bytes, used: now });
        self.bytes += bytes;
        let mut gone = Vec::new();
        if let Some(before) = before {
            self.bytes -= before.bytes;
            gone.push(before.statement);
        }
        if self.bytes > MAX_BYTES || self.all.values().any(|entry| is_idle(entry, now)) {
            self.shrink(text, now, &mut gone);
        }
        gone
    }

    /// Lets the oldest go, but for the one that was added: those that are idle, and as many as are
    /// too many.
    fn shrink(&mut self, added: &str, now: Instant, gone: &mut Vec<S>) {
        let mut by_age: Vec<(Instant, String)> =
            self.all.iter().map(|(text, entry)| (entry.used, text.clone())).collect();
        by_age.sort_unstable();
        for (_, text) in by_age {
            let goes = |entry: &Entry<S>| self.bytes > MAX_BYTES || is_idle(entry, now);
            if text == added || !self.all.get(&text).is_some_and(goes) {
                continue;
            }
            if let Some(entry) = self.all.remove(&text) {
                self.bytes -= entry.bytes;
                gone.push(entry.statement);
            }
        }
    }
}

fn is_idle<S>(entry: &Entry<S>, now: Instant) -> bool {
    now.duration_since(entry.used) > MAX_IDLE
}

/// How long a text is, without its comment.
fn size_of(text: &str) -> usize {
    text.lines().filter(|line| !line.starts_with("--")).map(str::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Day, PartitionId};
    use crate::store::sql;

    const MINUTE: Duration = Duration::from_mins(1);

    fn texts(day: u32, partitions: u8) -> Vec<String> {
        let day = Day::from_yymmdd(260_100 + day).unwrap();
        let of = |partition| {
            let partition = PartitionId::new(1, partition).unwrap();
            [sql::APPEND_INSERT, sql::FETCH, sql::OVERLAP]
                .map(|text| sql::for_day(text, partition, day))
        };
        (1..=partitions).flat_map(of).collect()
    }

    /// Uses statements as a session does: keeps what it lacks. Returns how many those were.
    fn use_all(kept: &mut Kept<()>, texts: &[String], now: Instant) -> usize {
        let lacks = |text: &&String| {
            let lacks = kept.get(text, now).is_none();
            if lacks {
                kept.add(text, (), now);
            }
            lacks
        };
        texts.iter().filter(lacks).count()
    }

    #[test]
    fn a_day_of_all_partitions_of_a_node_is_kept_whole_beside_all_other_statements() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        let others: Vec<String> = sql::ALL.iter().map(|all| all.1.to_owned()).collect();
        let day = texts(1, 99);
        use_all(&mut kept, &others, now);
        assert_eq!(use_all(&mut kept, &day, now + MINUTE), 3 * 99);
        assert_eq!(use_all(&mut kept, &day, now + 2 * MINUTE), 0);
    }

    #[test]
    fn what_is_kept_does_not_grow_with_the_days_that_are_worked_off() {
        let (mut kept, mut now) = (Kept::default(), Instant::now());
        let mut counts = Vec::new();
        for day in 1..=30 {
            use_all(&mut kept, &texts(day, 99), now);
            now += MINUTE;
            assert!(kept.bytes <= MAX_BYTES);
            counts.push(kept.all.len());
        }
        assert!(counts[29] <= 2 * counts[0], "{counts:?}");
        // The last day is there, and of those before only what there is room for.
        assert_eq!(use_all(&mut kept, &texts(30, 99), now), 0);
        assert!(use_all(&mut kept, &texts(28, 99), now) > 0);
    }

    #[test]
    fn the_oldest_go_one_by_one_and_those_that_are_idle_go_at_once() {
        let (mut kept, mut now) = (Kept::default(), Instant::now());
        let hot = String::from("select 1");
        let large = |n: u32| format!("select {n}{}", " ".repeat(MAX_BYTES / 8));
        for n in 0..30 {
            now += Duration::from_secs(1);
            use_all(&mut kept, &[large(n), hot.clone()], now);
        }
        assert!(kept.get(&hot, now).is_some());
        assert!(kept.get(&large(29), now).is_some() && kept.get(&large(24), now).is_some());
        assert!(kept.get(&large(20), now).is_none());
        now += MAX_IDLE + MINUTE;
        assert_eq!(kept.add("select 2", (), now).len(), 8);
        assert_eq!(kept.all.len(), 1);
    }
}
