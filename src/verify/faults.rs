//! Which faults are done to a cluster while a workload is checked, when, and to whom. Pure: the same seed
//! gives the same plan.
//!
//! ```text
//! nodes     kill .... lock ........ roll  clock ... pause .... | kill ....     one at a time
//! members      kill      pause ................. | pause ......                one at a time
//! topic     every 20 s                                                         beside the others
//! ```
//!
//! Each row goes through its kinds in rounds, shuffled, so that none comes more than one time more often
//! than another. Faults of one row never overlap: of nodes, and of members, one at most is away at a time.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use crate::error::Error;
use crate::verify::record::mix;

/// Between two times that the other topic is made anew.
const TOPIC_EVERY: Duration = Duration::from_secs(20);
/// Before it is made anew for the first time.
const TOPIC_FIRST: Duration = Duration::from_secs(3);
/// The most that a clock is moved, in seconds, in either direction: under the hour by which clocks may
/// differ where a day begins.
const MOST_AHEAD_SECS: u64 = 50 * 60;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FaultKind {
    /// A node's server gets SIGKILL, and is started again.
    KillNode,
    /// All processes of a node's server are suspended.
    PauseNode,
    /// The day table of a partition is locked against everybody.
    LockTable,
    /// All partitions of a node move to the next day.
    RollDay,
    /// A node's clock is wrong.
    MoveClock,
    /// A consumer's process gets SIGKILL.
    KillMember,
    /// A consumer's process is suspended.
    PauseMember,
    /// Another topic of the same nodes is deleted and made anew.
    RemakeTopic,
}

use FaultKind::{
    KillMember, KillNode, LockTable, MoveClock, PauseMember, PauseNode, RemakeTopic, RollDay,
};

impl FaultKind {
    /// Every kind.
    pub const ALL: [Self; 8] =
        [KillNode, PauseNode, LockTable, RollDay, MoveClock, KillMember, PauseMember, RemakeTopic];

    /// How long it lasts: from, to.
    fn lasts(self) -> (u64, u64) {
        match self {
            KillNode => (100, 2_000),
            PauseNode => (200, 4_500),
            LockTable => (200, 3_500),
            MoveClock => (500, 3_500),
            // Beyond the lease of ten seconds too.
            PauseMember => (500, 14_000),
            RollDay | KillMember | RemakeTopic => (0, 0),
        }
    }
}

/// A fault of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// What is done.
    pub kind: FaultKind,
    /// When it begins, from the beginning. Later by as much as those before it in its row took longer.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// To which node or member, counted from 0.
    pub target: usize,
    /// What a clock is moved by, in seconds; for a lock, the number of the partition.
    pub amount: i64,
}

/// What a plan is made of.
#[derive(Debug, Clone)]
pub struct FaultOptions {
    /// Plans of the same seed and options are the same.
    pub seed: u64,
    /// Which kinds; those of one row take turns.
    pub kinds: Vec<FaultKind>,
    /// How many nodes there are, at least one.
    pub nodes: usize,
    /// How many members there are, at least one.
    pub members: usize,
    /// Every fault has ended by then, as far as planned.
    pub length: Duration,
}

/// The rows of a plan, each in order of time. What is in different rows may happen at once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FaultPlan {
    /// What is done to nodes.
    pub nodes: Vec<Fault>,
    /// What is done to members.
    pub members: Vec<Fault>,
    /// When the other topic is made anew.
    pub topic: Vec<Fault>,
}

impl FaultPlan {
    /// The plan of these options. Takes microseconds a fault.
    pub fn new(options: &FaultOptions) -> Self {
        let only = |row: &[FaultKind]| -> Vec<FaultKind> {
            row.iter().copied().filter(|kind| options.kinds.contains(kind)).collect()
        };
        let nodes = only(&[KillNode, PauseNode, LockTable, RollDay, MoveClock]);
        let members = only(&[KillMember, PauseMember]);
        let topic = only(&[RemakeTopic]);
        let row = |kinds, targets, pause| Row { kinds, targets, pause, length: options.length };
        Self {
            nodes: row(nodes, options.nodes, (300, 1_500)).plan(Dice(mix(options.seed))),
            members: row(members, options.members, (1_000, 4_000)).plan(Dice(mix(!options.seed))),
            topic: remakes(!topic.is_empty(), options.length),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes.len() + self.members.len() + self.topic.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn remakes(wanted: bool, length: Duration) -> Vec<Fault> {
    let times = (0..).map(|round| TOPIC_FIRST + TOPIC_EVERY * round);
    let of = |at| Fault { kind: RemakeTopic, at, lasts: Duration::ZERO, target: 0, amount: 0 };
    times.take_while(|at| wanted && *at < length).map(of).collect()
}

/// A row to be planned.
struct Row {
    kinds: Vec<FaultKind>,
    targets: usize,
    /// Between two faults, in milliseconds: from, to.
    pause: (u64, u64),
    length: Duration,
}

impl Row {
    fn plan(self, mut dice: Dice) -> Vec<Fault> {
        let (mut planned, mut round) = (Vec::new(), Vec::new());
        let mut at = dice.millis(self.pause);
        while !self.kinds.is_empty() {
            if round.is_empty() {
                round = dice.shuffled(&self.kinds);
            }
            let Some(kind) = round.pop() else { break };
            let fault = self.fault(kind, at, &mut dice);
            if fault.at + fault.lasts > self.length {
                break;
            }
            at = fault.at + fault.lasts + dice.millis(self.pause);
            planned.push(fault);
        }
        planned
    }

    fn fault(&self, kind: FaultKind, at: Duration, dice: &mut Dice) -> Fault {
        let lasts = dice.millis(kind.lasts());
        let target = dice.below(self.targets.max(1) as u64);
        let amount = match kind {
            MoveClock => {
                let ahead = i64::try_from(1 + dice.below(MOST_AHEAD_SECS)).unwrap_or(1);
                if dice.below(2) == 0 { -ahead } else { ahead }
            }
            LockTable => i64::try_from(dice.below(1 << 16)).unwrap_or(0),
            _ => 0,
        };
        Fault { kind, at, lasts, target: usize::try_from(target).unwrap_or(0), amount }
    }
}

/// Numbers that look random and follow from a seed (`SplitMix64`).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % end.max(1)
    }

    fn millis(&mut self, (from, to): (u64, u64)) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }

    fn shuffled(&mut self, kinds: &[FaultKind]) -> Vec<FaultKind> {
        let mut left = kinds.to_vec();
        let mut shuffled = Vec::new();
        while !left.is_empty() {
            let next = usize::try_from(self.below(left.len() as u64)).unwrap_or(0);
            shuffled.push(left.swap_remove(next));
        }
        shuffled
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KillNode => "kill_node",
            PauseNode => "pause_node",
            LockTable => "lock_table",
            RollDay => "roll_day",
            MoveClock => "move_clock",
            KillMember => "kill_member",
            PauseMember => "pause_member",
            RemakeTopic => "remake_topic",
        })
    }
}

/// Kinds as a person names them: `all`, or words such as `kill,lock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultKinds(pub Vec<FaultKind>);

impl FromStr for FaultKinds {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut kinds = Vec::new();
        for word in text.split(',') {
            let of_word: &[FaultKind] = match word.trim() {
                "all" => &FaultKind::ALL,
                "kill" => &[KillNode, KillMember],
                "pause" => &[PauseNode, PauseMember],
                "lock" => &[LockTable],
                "roll" => &[RollDay],
                "clock" => &[MoveClock],
                "topic" => &[RemakeTopic],
                other => {
                    let known = "all, kill, pause, lock, roll, clock, topic";
                    return Err(Error::invalid(format!("no fault is called {other:?}: {known}")));
                }
            };
            kinds.extend_from_slice(of_word);
        }
        kinds.sort_unstable();
        kinds.dedup();
        Ok(Self(kinds))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn options(seed: u64, secs: u64) -> FaultOptions {
        FaultOptions {
            seed,
            kinds: FaultKind::ALL.to_vec(),
            nodes: 3,
            members: 4,
            length: Duration::from_secs(secs),
        }
    }

    fn counts(faults: &[Fault]) -> BTreeMap<FaultKind, u64> {
        let mut counts = BTreeMap::new();
        for fault in faults {
            *counts.entry(fault.kind).or_default() += 1;
        }
        counts
    }

    proptest! {
        #[test]
        fn rows_are_in_order_end_in_time_and_never_overlap(
            seed: u64, secs in 0_u64..900, nodes in 1_usize..5, members in 1_usize..5,
            kinds in prop::sample::subsequence(FaultKind::ALL.to_vec(), 0..=8),
        ) {
            let length = Duration::from_secs(secs);
            let options = FaultOptions { seed, kinds: kinds.clone(), nodes, members, length };
            let plan = FaultPlan::new(&options);
            prop_assert_eq!(&plan, &FaultPlan::new(&options));
            for (row, targets) in [(&plan.nodes, nodes), (&plan.members, members), (&plan.topic, 1)] {
                for pair in row.windows(2) {
                    prop_assert!(pair[0].at + pair[0].lasts < pair[1].at);
                }
                for fault in row {
                    prop_assert!(kinds.contains(&fault.kind) && fault.target < targets);
                    prop_assert!(fault.at + fault.lasts <= length);
                    prop_assert!(fault.amount.abs() <= 1 << 16);
                }
                let counts = counts(row);
                let least = counts.values().min().copied().unwrap_or(0);
                prop_assert!(counts.values().all(|count| *count <= least + 1));
            }
        }

        #[test]
        fn ten_minutes_have_many_of_each(seed: u64) {
            let plan = FaultPlan::new(&options(seed, 600));
            for row in [&plan.nodes, &plan.members, &plan.topic] {
                prop_assert!(counts(row).values().all(|count| *count >= 20), "{:?}", counts(row));
            }
            let kinds: usize = [&plan.nodes, &plan.members, &plan.topic].map(|row| counts(row).len()).iter().sum();
            prop_assert_eq!(kinds, FaultKind::ALL.len());
        }

        #[test]
        fn clocks_go_both_ways_and_less_than_an_hour(seed: u64) {
            let plan = FaultPlan::new(&FaultOptions { kinds: vec![MoveClock], ..options(seed, 600) });
            let moves: Vec<i64> = plan.nodes.iter().map(|fault| fault.amount).collect();
            prop_assert!(moves.iter().any(|by| *by > 0) && moves.iter().any(|by| *by < 0));
            prop_assert!(moves.iter().all(|by| *by != 0 && by.abs() < 3_600));
        }
    }

    #[test]
    fn seeds_differ() {
        assert_ne!(FaultPlan::new(&options(1, 60)), FaultPlan::new(&options(2, 60)));
    }

    #[test]
    fn kinds_are_named_by_words() {
        let kinds = |text: &str| text.parse::<FaultKinds>().map(|kinds| kinds.0);
        assert_eq!(kinds("all").unwrap(), FaultKind::ALL);
        assert_eq!(kinds("topic, kill,kill").unwrap(), [KillNode, KillMember, RemakeTopic]);
        assert!(kinds("kil").unwrap_err().to_string().contains("kil"));
        assert!(kinds("").is_err());
        for kind in FaultKind::ALL {
            let json = serde_json::to_value(kind).unwrap();
            assert_eq!(json.as_str().unwrap(), kind.to_string());
        }
    }
}
