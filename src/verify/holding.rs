//! Holdings of one partition: what each was handed, and what it jumped over.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::verify::findings::{Example, Findings};
use crate::verify::ranges::Ranges;
use crate::verify::report::AnomalyKind;
use crate::verify::step::Step;

/// Ranges that are kept of what was jumped over; with more, the lowest are taken as settled.
const MOST_RANGES: usize = 10_000;
/// Jumps that are kept as examples.
const MOST_JUMPS: usize = 4;

/// The holdings of a group in one partition, by token.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    by_token: BTreeMap<u64, HoldingState>,
}

impl Holdings {
    /// The holding of a step, new if need be; its member is judged.
    pub(super) fn of(&mut self, step: &Step, findings: &mut Findings) -> &mut HoldingState {
        let holding = self.by_token.entry(step.token).or_insert_with(|| {
            findings.report.holdings += 1;
            HoldingState::new(step.member)
        });
        holding.judge_member(step, findings);
        holding
    }

    /// When a commit of another holding was confirmed that shows that this one had ended.
    pub(super) fn superseded(&self, token: u64) -> Option<u64> {
        self.by_token.get(&token)?.superseded
    }

    pub(super) fn supersede(&mut self, token: u64, time: u64) {
        if let Some(holding) = self.by_token.get_mut(&token) {
            holding.superseded = Some(time);
        }
    }

    /// Counts what each jumped over and did not come back to.
    pub(super) fn finish(&self, group: u16, findings: &mut Findings) {
        for holding in self.by_token.values() {
            holding.finish(group, findings);
        }
    }
}

#[derive(Debug)]
pub(super) struct HoldingState {
    member: u32,
    /// The highest id that was delivered.
    top: Option<i64>,
    /// The place after it.
    next: u64,
    missed: Ranges,
    /// What was missed and is not kept any more.
    settled: u64,
    jumps: Vec<Jump>,
    /// It was delivered what went with a lost tail: places say nothing about it.
    stale: bool,
    shared: bool,
    suspects: Option<Suspects>,
    superseded: Option<u64>,
}

#[derive(Debug)]
struct Jump {
    places: Range<u64>,
    from: Option<i64>,
    to: i64,
    time: u64,
}

/// Deliveries of what another holding's commit had covered. They are violations if this holding turns
/// out to be in force later than that commit; if not, it was a stale one, which delivers what it had
/// fetched before.
#[derive(Debug)]
struct Suspects {
    count: u64,
    /// When the last of those commits was confirmed.
    committed_at: u64,
    id: i64,
    upto: i64,
    time: u64,
}

impl HoldingState {
    fn new(member: u32) -> Self {
        Self {
            member,
            top: None,
            next: 0,
            missed: Ranges::default(),
            settled: 0,
            jumps: Vec::new(),
            stale: false,
            shared: false,
            suspects: None,
            superseded: None,
        }
    }

    /// Each fencing token is one member's.
    fn judge_member(&mut self, step: &Step, findings: &mut Findings) {
        if self.member == step.member || self.shared {
            return;
        }
        self.shared = true;
        let (first, second) = (self.member, step.member);
        findings.add(AnomalyKind::TwoOwners, 1, || Example {
            group: Some(step.group),
            ids: vec![step.id],
            time: Some(step.time),
            text: format!(
                "members {first} and {second} use the same fencing token {} of partition {}",
                step.token,
                step.partition()
            ),
            ..Example::default()
        });
    }

    /// Judges a delivery: ids rise, and what is jumped over was `covered` before.
    pub(super) fn deliver(&mut self, step: &Step, covered: &Ranges, findings: &mut Findings) {
        if let Some(top) = self.top.filter(|top| step.id <= *top) {
            self.judge_return(step, top, findings);
            return;
        }
        self.stale |= step.ghost;
        if !self.stale && self.next < step.place {
            for places in covered.gaps(self.next..step.place) {
                self.miss(places, step);
            }
        }
        self.top = Some(step.id);
        self.next = step.place_after();
    }

    fn judge_return(&mut self, step: &Step, top: i64, findings: &mut Findings) {
        if step.stored {
            self.missed.remove(step.place);
        }
        findings.add(AnomalyKind::DeliveryOrder, 1, || Example {
            group: Some(step.group),
            ids: vec![step.id, top],
            time: Some(step.time),
            text: format!(
                "member {} was delivered {} after {top} in one holding",
                step.member, step.id
            ),
            ..Example::default()
        });
    }

    fn miss(&mut self, places: Range<u64>, step: &Step) {
        if self.jumps.len() < MOST_JUMPS {
            self.jumps.push(Jump {
                places: places.clone(),
                from: self.top,
                to: step.id,
                time: step.time,
            });
        }
        self.missed.insert(places);
        if self.missed.len() > MOST_RANGES {
            let lowest = self.missed.pop_lowest();
            self.settled += lowest.map_or(0, |range| range.end - range.start);
        }
    }

    /// It was delivered what another's commit, confirmed at `committed_at`, had covered.
    pub(super) fn suspect(&mut self, step: &Step, upto: i64, committed_at: u64) {
        let suspects = self.suspects.get_or_insert(Suspects {
            count: 0,
            committed_at,
            id: step.id,
            upto,
            time: step.time,
        });
        suspects.count += 1;
        suspects.committed_at = suspects.committed_at.max(committed_at);
    }

    /// It commits what was asked for at `asked`, so that it was in force after that.
    pub(super) fn prove(&mut self, step: &Step, findings: &mut Findings) {
        let Some(suspects) = self.suspects.take_if(|s| s.committed_at < step.asked) else {
            return;
        };
        let kind = AnomalyKind::RedeliveredAfterCommit;
        findings.add(kind, suspects.count, || Example {
            group: Some(step.group),
            ids: vec![suspects.id, suspects.upto],
            time: Some(suspects.time),
            text: format!(
                "member {} was delivered {}, though the cursor had been committed up to {}",
                step.member, suspects.id, suspects.upto
            ),
            ..Example::default()
        });
    }

    fn finish(&self, group: u16, findings: &mut Findings) {
        let skipped = self.settled + self.missed.count();
        if skipped == 0 {
            return;
        }
        let member = self.member;
        let jump = self.jumps.iter().find(|j| self.missed.touches(&j.places));
        findings.add(AnomalyKind::Skipped, skipped, || Example {
            group: Some(group),
            ids: jump.map_or(Vec::new(), |j| std::iter::once(j.to).chain(j.from).collect()),
            time: jump.map(|jump| jump.time),
            text: match jump.map(|jump| (jump.to, jump.from)) {
                Some((to, Some(from))) => {
                    format!("member {member} was delivered {to} after {from}, {skipped} skipped")
                }
                Some((to, None)) => format!("member {member} began at {to}, {skipped} skipped"),
                None => format!("member {member}: {skipped} skipped in one holding"),
            },
            ..Example::default()
        });
    }
}
