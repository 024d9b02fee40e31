//! Which members of a group are silent. The control database's clock may leap, and then all members
//! seem silent to the first one that looks. So that clock alone leaves nobody out.
//!
//! ```text
//!            a third of its lease by           a third by this process' clock,
//!            the database's clock               with the same heartbeat
//! heard ─────────────────────────> suspect ─────────────────────────────────> silent
//!   │                                 │ another heartbeat                       ^
//!   ^ ────────────────────────────────┘                                         │
//!   └── two thirds by this process' clock, with the same heartbeat ─────────────┘
//! ```
//!
//! A live member sends a heartbeat every three tenths of a lease, and so within the second third.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use uuid::Uuid;

use crate::store::membership::Seen;

/// What was seen of the other members.
#[derive(Debug, Default)]
pub(super) struct Silence {
    watched: HashMap<Uuid, Watched>,
}

#[derive(Debug)]
struct Watched {
    heartbeat: SystemTime,
    /// Since when that is its last one, as far as this process knows.
    since: Instant,
    suspect_since: Option<Instant>,
    /// It has been heard of while this process looked.
    lived: bool,
    lease: Duration,
}

impl Silence {
    /// Takes in what a heartbeat has answered, and leaves out of it who was gone already when this
    /// process first looked. After a break in that this process was out of touch, nothing is known
    /// of the silence of others.
    pub(super) fn look(&mut self, members: &mut Vec<Seen>, after_break: bool, now: Instant) {
        if after_break {
            for watched in self.watched.values_mut() {
                (watched.since, watched.suspect_since) = (now, None);
            }
        }
        members.retain(|seen| {
            let new = Watched {
                heartbeat: seen.heartbeat_at,
                since: now,
                suspect_since: None,
                lived: !seen.silent,
                lease: seen.lease,
            };
            let watched = self.watched.entry(seen.member).or_insert(new);
            if watched.heartbeat != seen.heartbeat_at {
                (watched.heartbeat, watched.since, watched.lived) = (seen.heartbeat_at, now, true);
                watched.suspect_since = None;
            }
            if seen.silent {
                watched.suspect_since.get_or_insert(now);
            } else {
                watched.suspect_since = None;
            }
            watched.lived || !seen.long_silent
        });
        self.watched.retain(|member, _| members.iter().any(|seen| seen.member == *member));
    }

    /// Whether a member has been silent for two thirds of its lease.
    pub(super) fn is_silent(&self, member: Uuid, now: Instant) -> bool {
        self.watched.get(&member).is_some_and(|watched| {
            let third = watched.lease / 3;
            now - watched.since >= third * 2
                || watched.suspect_since.is_some_and(|since| now - since >= third)
        })
    }

    /// When to look again which of the suspects are silent.
    pub(super) fn look_at(&self) -> Option<Instant> {
        let suspects = self.watched.values();
        suspects.filter_map(|w| Some(w.suspect_since? + w.lease / 3)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::membership::Standing;

    const LEASE: Duration = Duration::from_secs(9);
    const SECOND: Duration = Duration::from_secs(1);

    fn seen(heartbeat: u64, silent: bool, long_silent: bool) -> Vec<Seen> {
        vec![Seen {
            member: Uuid::nil(),
            only: None,
            unreachable: Vec::new(),
            avoid: Vec::new(),
            heartbeat_at: SystemTime::UNIX_EPOCH + Duration::from_secs(heartbeat),
            standing: Standing::Listed,
            silent,
            long_silent,
            missing: false,
            lease: LEASE,
        }]
    }

    #[test]
    fn a_leap_of_the_databases_clock_makes_nobody_silent() {
        let (mut silence, begun) = (Silence::default(), Instant::now());
        for second in 0..30 {
            let now = begun + second * SECOND;
            // A heartbeat every three seconds; between the 10th and the 12th second the clock has
            // leapt by a day.
            let leapt = (10..12).contains(&second);
            let heartbeat = u64::from(second) / 3 * 3 + if second >= 12 { 86_400 } else { 0 };
            let mut members = seen(heartbeat, leapt, leapt);
            silence.look(&mut members, false, now);
            assert!(!silence.is_silent(Uuid::nil(), now), "after {second} s");
            assert_eq!(members.len(), 1, "after {second} s");
        }
    }

    #[test]
    fn it_takes_two_thirds_of_a_lease_by_any_clock() {
        let (mut silence, begun) = (Silence::default(), Instant::now());
        let at = |second| begun + second * SECOND;
        silence.look(&mut seen(1, false, false), false, at(0));
        silence.look(&mut seen(1, true, false), false, at(3));
        assert_eq!(silence.look_at(), Some(at(6)));
        assert!(!silence.is_silent(Uuid::nil(), at(5)));
        assert!(silence.is_silent(Uuid::nil(), at(6)));
        // The database's clock has leapt back: its heartbeats are of the future.
        let mut silence = Silence::default();
        silence.look(&mut seen(9_999, false, false), false, at(0));
        assert!(!silence.is_silent(Uuid::nil(), at(5)) && silence.is_silent(Uuid::nil(), at(6)));
    }

    #[test]
    fn who_was_out_of_touch_knows_nothing_and_who_comes_counts_nobody_who_was_gone_before() {
        let (mut silence, begun) = (Silence::default(), Instant::now());
        let at = |second| begun + second * SECOND;
        silence.look(&mut seen(1, false, false), false, at(0));
        silence.look(&mut seen(1, true, true), true, at(60));
        assert!(!silence.is_silent(Uuid::nil(), at(61)) && silence.is_silent(Uuid::nil(), at(63)));
        let (mut silence, mut members) = (Silence::default(), seen(1, true, true));
        silence.look(&mut members, true, at(0));
        assert!(members.is_empty());
    }
}
