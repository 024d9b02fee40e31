//! One group in one partition: its cursor, its holdings, and what it has finished.
//!
//! Clocks tell when calls began and when they had ended, not when the server did what they asked for.
//! So nothing is judged by two calls that overlap: a commit counts from its confirmation on, and is
//! measured by what had been confirmed when it was asked for; a seek makes both positions possible
//! from its begin to its end.

use crate::verify::findings::{Example, Findings};
use crate::verify::holding::Holdings;
use crate::verify::ranges::Ranges;
use crate::verify::record::Kind;
use crate::verify::report::AnomalyKind;
use crate::verify::stall::Wait;
use crate::verify::step::Step;
use crate::verify::survey::Survey;

/// Ranges that are kept of what is finished; with more, the lowest gap is taken as finished too.
const MOST_RANGES: usize = 10_000;

#[derive(Debug)]
pub(super) struct Reading {
    group: u16,
    /// The group records acknowledgements: what is committed must be acknowledged.
    acking: bool,
    /// A promotion may have rolled back the cursor and its fence.
    rolled_back: bool,
    /// Places that were acknowledged, committed, or left out by a seek.
    covered: Ranges,
    /// The highest id that was delivered.
    highest: i64,
    /// The highest id that a seek left out.
    released: i64,
    /// The highest commit since the last seek.
    cursor: Option<Cursor>,
    seeks_open: u32,
    /// Commits asked for earlier may be older than a seek.
    settled_at: u64,
    /// Tokens that committed and that none has followed yet, with when their first commit was
    /// confirmed: one, or a few whose commits overlapped.
    in_force: Vec<(u64, u64)>,
    holdings: Holdings,
    wait: Wait,
    drained: bool,
}

#[derive(Debug, Clone, Copy)]
struct Cursor {
    token: u64,
    upto: i64,
    confirmed_at: u64,
}

impl Reading {
    pub(super) fn new(group: u16, partition: u32, survey: &Survey) -> Self {
        Self {
            group,
            acking: survey.is_acking(group),
            rolled_back: survey.may_lack_tail(partition),
            covered: Ranges::default(),
            highest: 0,
            released: 0,
            cursor: None,
            seeks_open: 0,
            settled_at: 0,
            in_force: Vec::new(),
            holdings: Holdings::default(),
            wait: Wait::default(),
            drained: false,
        }
    }

    /// An id is acknowledged to its producer: it is waited for until it is delivered.
    pub(super) fn expect(&mut self, acknowledged: i64, time: u64) {
        if !self.drained && acknowledged > self.highest.max(self.released) {
            self.wait.begin(time);
        }
    }

    /// Judges what happened.
    pub(super) fn take(&mut self, step: &Step, findings: &mut Findings) {
        match step.kind {
            Kind::Owned | Kind::Lost => drop(self.holdings.of(step, findings)),
            Kind::Delivered => self.deliver(step, findings),
            Kind::Acked => self.ack(step, findings),
            Kind::Committed => self.commit(step, findings),
            Kind::SeekStarted => self.start_seek(step),
            Kind::SeekDone => self.end_seek(step.time),
            Kind::Drained => {
                self.wait.end(step.time);
                self.drained = true;
            }
            _ => {}
        }
    }

    fn deliver(&mut self, step: &Step, findings: &mut Findings) {
        self.wait.end(step.time);
        self.highest = self.highest.max(step.id);
        let by_other = |cursor: &Cursor| cursor.token != step.token && cursor.upto >= step.id;
        let cursor = self.cursor.filter(by_other);
        let holding = self.holdings.of(step, findings);
        holding.deliver(step, &self.covered, findings);
        if let Some(cursor) = cursor {
            holding.suspect(step, cursor.upto, cursor.confirmed_at);
        }
    }

    fn ack(&mut self, step: &Step, findings: &mut Findings) {
        self.holdings.of(step, findings);
        if step.stored && !step.ghost {
            self.cover(step.place, step.place_after(), findings);
        }
    }

    fn commit(&mut self, step: &Step, findings: &mut Findings) {
        let in_lost_tail = self.rolled_back && (step.ghost || !step.stored);
        self.judge_overrun(step, in_lost_tail, findings);
        if !(in_lost_tail && self.acking) {
            self.cover(0, step.place_after(), findings);
        }
        self.holdings.of(step, findings);
        if self.rolled_back {
            return;
        }
        self.judge_order(step, findings);
        self.judge_fence(step, findings);
        self.holdings.of(step, findings).prove(step, findings);
        let is_higher = self.cursor.is_none_or(|cursor| step.id > cursor.upto);
        if is_higher && self.is_settled(step.asked) {
            self.cursor =
                Some(Cursor { token: step.token, upto: step.id, confirmed_at: step.time });
        }
    }

    fn judge_overrun(&self, step: &Step, in_lost_tail: bool, findings: &mut Findings) {
        let unseen = step.id > self.highest.max(self.released);
        let unacked =
            self.acking && !in_lost_tail && !self.covered.covers(&(0..step.place_after()));
        if unseen || unacked {
            let what = if unseen {
                "which nobody in the group was delivered"
            } else {
                "which covers messages that nobody in the group acknowledged"
            };
            findings.add(AnomalyKind::CursorOverrun, 1, || Example {
                text: format!("member {} committed {}, {what}", step.member, step.id),
                ..self.example(step)
            });
        }
    }

    fn judge_order(&self, step: &Step, findings: &mut Findings) {
        let is_later = |cursor: &Cursor| step.asked > cursor.confirmed_at;
        let Some(cursor) = self.cursor.filter(is_later) else {
            return;
        };
        if step.id < cursor.upto && self.is_settled(step.asked) {
            findings.add(AnomalyKind::CursorRegressed, 1, || Example {
                ids: vec![step.id, cursor.upto],
                text: format!("the cursor went back from {} to {}", cursor.upto, step.id),
                ..self.example(step)
            });
        }
    }

    /// Tokens are drawn anew, so one that another has followed is over. The other has followed if a
    /// commit of its was asked for after one of the first had been confirmed.
    fn judge_fence(&mut self, step: &Step, findings: &mut Findings) {
        let ended = self.holdings.superseded(step.token);
        if ended.is_some_and(|ended| step.asked > ended) {
            findings.add(AnomalyKind::TwoOwners, 1, || Example {
                text: format!(
                    "member {} committed {} after another owner had followed it and committed",
                    step.member, step.id
                ),
                ..self.example(step)
            });
            return;
        }
        let Self { in_force, holdings, .. } = self;
        in_force.retain(|(token, confirmed_at)| {
            let is_over = *token != step.token && *confirmed_at < step.asked;
            if is_over {
                holdings.supersede(*token, step.time);
            }
            !is_over
        });
        let is_known = in_force.iter().any(|(token, _)| *token == step.token);
        if ended.is_none() && !is_known {
            in_force.push((step.token, step.time));
        }
    }

    fn start_seek(&mut self, step: &Step) {
        self.seeks_open += 1;
        self.cursor = None;
        if step.has_id() {
            self.released = self.released.max(step.id - 1);
            self.covered.insert(0..step.place);
        } else {
            self.released = i64::MAX;
            self.covered.insert(0..u64::MAX);
        }
    }

    fn end_seek(&mut self, time: u64) {
        self.seeks_open = self.seeks_open.saturating_sub(1);
        self.settled_at = time;
        self.cursor = None;
    }

    /// Whether what was asked for at a time is not older than a seek.
    fn is_settled(&self, asked: u64) -> bool {
        self.seeks_open == 0 && asked >= self.settled_at
    }

    fn cover(&mut self, from: u64, to: u64, findings: &mut Findings) {
        self.covered.insert(from..to);
        if self.covered.len() > MOST_RANGES {
            self.covered.close_lowest_gap();
            findings.report.weakened += 1;
        }
    }

    fn example(&self, step: &Step) -> Example {
        Example {
            group: Some(self.group),
            ids: vec![step.id],
            time: Some(step.time),
            ..Example::default()
        }
    }

    /// Judges what can only be said at the end.
    pub(super) fn finish(&self, findings: &mut Findings) {
        self.holdings.finish(self.group, findings);
    }

    /// The longest time, in nanoseconds, without a delivery while one was due.
    pub(super) fn longest_wait(&self, now: u64) -> u64 {
        self.wait.longest_until(now)
    }
}
