//! How long sends without a lane take: each by itself, and until it or a later one was acknowledged.
//!
//! The two are told apart because one message may be stuck where its node hangs while those after it go
//! elsewhere: then it alone is late, and its producer does not stall.

use std::collections::VecDeque;

use crate::verify::event::Value;

/// Fed with sends in order of their values. Keeps those that are under way at a time.
#[derive(Debug, Default)]
pub(super) struct Sends {
    writer: u16,
    /// Sends that stalled: of all that ended with the same acknowledgement, the first. Both times rise.
    stalled: VecDeque<Stalled>,
    /// The writer's last event.
    last: u64,
    longest_send: u64,
    longest_stall: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stalled {
    since: u64,
    until: u64,
}

impl Sends {
    /// The next value was sent, and acknowledged or not.
    pub(super) fn note(&mut self, value: u64, sent: u64, acknowledged: Option<u64>) {
        let writer = Value::from_number(value).writer();
        if writer != self.writer {
            self.end_writer();
            self.writer = writer;
        }
        if let Some(acknowledged) = acknowledged {
            self.longest_send = self.longest_send.max(acknowledged.saturating_sub(sent));
        }
        self.last = self.last.max(acknowledged.unwrap_or(sent));
        // Nothing that is sent from now on is acknowledged earlier.
        while let Some(first) = self.stalled.front().copied().filter(|s| s.until <= sent) {
            self.stalled.pop_front();
            self.end(first);
        }
        let (mut since, until) = (sent, acknowledged.unwrap_or(u64::MAX));
        while let Some(longer) = self.stalled.back().copied().filter(|s| s.until >= until) {
            self.stalled.pop_back();
            since = longer.since;
        }
        self.stalled.push_back(Stalled { since, until });
    }

    /// The longest send that was acknowledged, and the longest stall.
    pub(super) fn finish(mut self) -> (u64, u64) {
        self.end_writer();
        (self.longest_send, self.longest_stall)
    }

    fn end_writer(&mut self) {
        let last = std::mem::take(&mut self.last);
        for stalled in std::mem::take(&mut self.stalled) {
            self.end(Stalled { until: stalled.until.min(last), ..stalled });
        }
    }

    fn end(&mut self, stalled: Stalled) {
        self.longest_stall = self.longest_stall.max(stalled.until.saturating_sub(stalled.since));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn measured(sends: &[(u64, Option<u64>)]) -> (u64, u64) {
        let mut measure = Sends::default();
        for (counter, (sent, acknowledged)) in (1..).zip(sends) {
            measure.note(Value::new(1, counter).unwrap().number(), *sent, *acknowledged);
        }
        measure.finish()
    }

    #[test]
    fn one_that_is_stuck_while_later_ones_pass_is_late_but_no_stall() {
        assert_eq!(measured(&[]), (0, 0));
        assert_eq!(measured(&[(10, Some(15)), (20, Some(3_000)), (30, Some(37))]), (2_980, 17));
    }

    #[test]
    fn a_stall_is_that_of_the_first_and_ends_with_any_later_one() {
        assert_eq!(measured(&[(10, Some(900)), (20, Some(800)), (30, Some(950))]), (920, 920));
        // Never acknowledged: up to the last event.
        assert_eq!(measured(&[(10, None), (500, None)]), (0, 490));
        assert_eq!(measured(&[(10, None), (500, Some(510))]), (10, 500));
    }

    #[test]
    fn each_writer_has_stalls_of_its_own() {
        let mut measure = Sends::default();
        measure.note(Value::new(1, 1).unwrap().number(), 10, Some(2_000));
        measure.note(Value::new(2, 1).unwrap().number(), 10, Some(20));
        assert_eq!(measure.finish(), (1_990, 1_990));
    }

    proptest! {
        #[test]
        fn it_is_what_a_look_at_all_later_ones_finds(
            steps in prop::collection::vec((0_u64..50, 0_u64..400, prop::bool::weighted(0.8)), 0..60)
        ) {
            let mut now = 0;
            let sends: Vec<_> = steps.iter().map(|(pause, takes, is_acknowledged)| {
                now += pause;
                (now, is_acknowledged.then_some(now + takes))
            }).collect();
            let last = sends.iter().map(|(sent, end)| end.unwrap_or(*sent)).max().unwrap_or(0);
            let until = |from: usize| {
                sends[from..].iter().filter_map(|(_, end)| *end).min().unwrap_or(last)
            };
            let stalls = sends.iter().enumerate().map(|(at, (sent, _))| until(at) - sent);
            let takes = sends.iter().filter_map(|(sent, end)| Some((*end)? - sent));
            let expected = (takes.max().unwrap_or(0), stalls.max().unwrap_or(0));
            prop_assert_eq!(measured(&sends), expected);
        }
    }
}
