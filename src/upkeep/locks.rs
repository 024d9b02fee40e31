//! Locks that last: whoever may log in to a node's database can hold the lock of a partition, and
//! so stop its producers. Who does is told, once, when two looks have seen the same transaction
//! holding it.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::id::NodeId;
use crate::store::upkeep::Holder;

/// How long a lock may be held in silence. An append holds one for less than that.
const LONG: Duration = Duration::from_secs(5);

/// Which lock, whose, and in which transaction.
type Key = (String, Option<i32>, String);

/// The locks of a node as the last look found them.
#[derive(Debug, Default)]
pub(super) struct Locks {
    /// Since when each is known to be held, and whether it was told.
    held: HashMap<Key, (Instant, bool)>,
}

impl Locks {
    /// Takes in the sessions that hold locks now. Returns those that have held one for long, each
    /// of them once, and for how long at least.
    fn look(&mut self, holders: Vec<Holder>, now: Instant) -> Vec<(Holder, Duration)> {
        let before = std::mem::take(&mut self.held);
        let mut long = Vec::new();
        for holder in holders {
            let key = (holder.lock.clone(), holder.pid, holder.transaction.clone());
            let (since, told) = before.get(&key).copied().unwrap_or((now, false));
            let is_long = now - since >= LONG;
            self.held.insert(key, (since, told || is_long));
            if is_long && !told {
                long.push((holder, now - since));
            }
        }
        long
    }

    /// The same, and tells of them.
    pub(super) fn tell(&mut self, node: NodeId, holders: Vec<Holder>) {
        for (holder, held) in self.look(holders, Instant::now()) {
            let Holder { lock, pid, user, application, client, since, .. } = &holder;
            let next = pid.map_or_else(
                || "end it by `rollback prepared`, with its gid of pg_prepared_xacts".to_owned(),
                |pid| {
                    format!(
                        "find out what it does, or end it: `select pg_terminate_backend({pid})`"
                    )
                },
            );
            tracing::warn!(
                %node, lock, pid, user, application, client, since, held_secs = held.as_secs(),
                alert = "lock",
                "a session has held a lock for longer than 5 s, and appends wait for it: {next}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn holder(pid: i32, transaction: &str) -> Holder {
        Holder {
            lock: "partition 10101".to_owned(),
            pid: Some(pid),
            transaction: transaction.to_owned(),
            user: String::new(),
            application: String::new(),
            client: String::new(),
            since: String::new(),
        }
    }

    #[test]
    fn a_lock_that_lasts_is_told_once_and_one_that_is_taken_again_is_not() {
        let (mut locks, start) = (Locks::default(), Instant::now());
        let mut told = Vec::new();
        for beat in 0..5 {
            let now = start + SECOND * 8 * beat;
            // A producer, whose transactions are short, and a session that stays.
            let producer = holder(1, &format!("3/{beat}"));
            told.extend(locks.look(vec![producer, holder(2, "4/7")], now));
        }
        assert_eq!(told, [(holder(2, "4/7"), SECOND * 8)]);
    }

    #[test]
    fn two_looks_in_short_order_tell_nothing_and_a_lock_that_was_free_begins_anew() {
        let (mut locks, start) = (Locks::default(), Instant::now());
        let mut look = |secs: u32, held: bool| {
            let holders = held.then(|| holder(2, "4/7")).into_iter().collect();
            locks.look(holders, start + SECOND * secs).len()
        };
        assert_eq!([look(0, true), look(4, true), look(5, false), look(6, true)], [0; 4]);
        assert_eq!([look(10, true), look(11, true), look(12, true)], [0, 1, 0]);
    }
}
