//! When a process asks next for a lease of which each node has one: pure.
//!
//! Processes that find it taken share the asking. So a node answers about two and a half of them a second
//! however many there are, and a lease that is over is found as soon. A process that has no other use for the
//! node asks less and less, so that it keeps no connection there.

use std::time::Duration;

/// Sessions up to which each process asks at each beat.
const FEW: u32 = 20;

/// What a process found that asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// It holds the lease.
    Ours,
    /// Another process holds it. Whether anything else of this process has used the node since the last beat,
    /// and how many sessions there are.
    Anothers { is_used: bool, sessions: u32 },
    /// The node did not answer.
    Failed,
}

/// How long the waits are at present.
#[derive(Debug)]
pub(crate) struct Pace {
    beat: Duration,
    longest: Duration,
    /// The last wait, while the node was of no use, or failed.
    last: Option<Duration>,
}

impl Pace {
    /// `beat`: between two attempts of a few processes; `longest`: how long one without a use for the node
    /// waits at most.
    pub(crate) fn new(beat: Duration, longest: Duration) -> Self {
        Self { beat, longest, last: None }
    }

    /// How long to wait after a beat.
    pub(crate) fn after(&mut self, beat: Beat) -> Duration {
        let wait = match beat {
            Beat::Ours => self.beat,
            Beat::Anothers { is_used: true, sessions } => {
                (self.beat * sessions.div_ceil(FEW).max(1)).min(self.longest)
            }
            Beat::Anothers { is_used: false, .. } => self.doubled(self.longest),
            Beat::Failed => self.doubled(self.beat * 4),
        };
        let grows = matches!(beat, Beat::Anothers { is_used: false, .. } | Beat::Failed);
        self.last = grows.then_some(wait);
        wait
    }

    fn doubled(&self, most: Duration) -> Duration {
        self.last.map_or(self.beat, |last| last * 2).min(most)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BEAT: Duration = Duration::from_secs(8);

    fn pace() -> Pace {
        Pace::new(BEAT, Duration::from_mins(10))
    }

    #[test]
    fn a_process_without_a_use_for_the_node_asks_less_and_less() {
        let mut pace = pace();
        let idle = Beat::Anothers { is_used: false, sessions: 3 };
        let waits: Vec<u64> = (0..8).map(|_| pace.after(idle).as_secs()).collect();
        assert_eq!(waits, [8, 16, 32, 64, 128, 256, 512, 600]);
        assert_eq!(pace.after(Beat::Anothers { is_used: true, sessions: 3 }), BEAT);
        assert_eq!(pace.after(idle), BEAT);
        let failures: Vec<u64> = (0..4).map(|_| pace.after(Beat::Failed).as_secs()).collect();
        assert_eq!(failures, [16, 32, 32, 32]);
    }

    proptest! {
        /// However many ask, the node answers some two and a half a second.
        #[test]
        fn the_questions_to_a_node_do_not_grow_with_the_processes(sessions in 1_u32..1_400) {
            let wait = pace().after(Beat::Anothers { is_used: true, sessions });
            let asked_per_second = f64::from(sessions) / wait.as_secs_f64();
            prop_assert!(asked_per_second <= 2.51, "{asked_per_second}");
        }
    }
}
