//! What became of each value: all that is known of it, side by side.
//!
//! Rows are `[value, what << 8 | flags, id, extra]`; the stored copies of a value come first. The extra is
//! a uid, or of a sending its lane, of an acknowledgement its time. A sending has its time for an id.

use std::rc::Rc;

use crate::error::Result;
use crate::verify::findings::{Example, Findings, shown};
use crate::verify::history::History;
use crate::verify::lanes::Lanes;
use crate::verify::losses::Losses;
use crate::verify::moved::Moved;
use crate::verify::overtaken::Sends;
use crate::verify::record::{Kind, Record, partition_of};
use crate::verify::report::AnomalyKind;
use crate::verify::sort::{Sorter, Workspace};
use crate::verify::survey::Survey;

/// Copies of one value whose ids are kept; with more, the ids of receipts are not judged.
const MOST_COPIES: usize = 8;

const STORED: u64 = 0;
const SENDING: u64 = 1;
const ACKNOWLEDGED: u64 = 2;
const REFUSED: u64 = 3;
const UNKNOWN: u64 = 4;
const DELIVERED: u64 = 5;

const FLAG: u64 = 1;

/// Judges every value. Returns the ids from which messages moved.
pub(super) fn check(
    history: &History,
    survey: &Survey,
    space: &Rc<Workspace<'_>>,
    findings: &mut Findings,
) -> Result<Moved> {
    let mut sorter = Sorter::new(space, 2);
    history.scan(|_, record| row(&record).map_or(Ok(()), |row| sorter.push(row)))?;
    let rows = sorter.sorted()?;
    let mut lanes = Lanes::new(space);
    let mut pass = Pass::new(survey, findings);
    let mut fate = Fate::default();
    for row in rows {
        let [value, what, id, extra] = row?;
        if value != fate.value {
            pass.settle(&fate, &mut lanes)?;
            fate = Fate { value, ..Fate::default() };
        }
        fate.learn(what, id.cast_signed(), extra);
    }
    pass.settle(&fate, &mut lanes)?;
    let Pass { losses, sends, moved, .. } = pass;
    losses.finish(&mut findings.report);
    let (send, stall) = sends.finish();
    findings.report.longest_keyless_send_ms = send / 1_000_000;
    findings.report.longest_keyless_stall_ms = stall / 1_000_000;
    lanes.check(findings)?;
    Ok(moved)
}

fn row(record: &Record) -> Option<[u64; 4]> {
    let id = record.id.cast_unsigned();
    let (what, flag, id, extra) = match record.kind {
        Kind::Stored => (STORED, record.is_marked(), id, record.uid()),
        Kind::Sending => {
            (SENDING, record.lane().is_some(), record.time, record.lane().unwrap_or(0))
        }
        Kind::Acknowledged => (ACKNOWLEDGED, false, id, record.time),
        Kind::Refused => (REFUSED, false, id, 0),
        Kind::Unknown => (UNKNOWN, false, id, 0),
        Kind::Delivered => (DELIVERED, false, id, record.uid()),
        _ => return None,
    };
    Some([record.value()?, what << 8 | u64::from(flag), id, extra])
}

/// What is known of one value.
#[derive(Debug, Default)]
struct Fate {
    value: u64,
    sent: bool,
    sent_at: u64,
    lane: Option<u64>,
    acknowledged: Option<i64>,
    acknowledged_at: Option<u64>,
    refused: bool,
    delivered: Option<i64>,
    unmarked: u64,
    marked: u64,
    /// Ids of the copies, the first few.
    copies: Vec<i64>,
    uid: Option<u64>,
    uid_changed: bool,
    /// An id of a receipt that none of the copies has.
    stray_receipt: Option<i64>,
    /// Ids of deliveries that none of the copies has, the first few.
    stray_deliveries: Vec<i64>,
    /// How often it was delivered under an id that a copy has.
    in_place: u64,
}

impl Fate {
    fn learn(&mut self, what: u64, id: i64, extra: u64) {
        match what >> 8 {
            STORED => {
                let copy_is_new = self.copies.last() != Some(&id);
                let counter =
                    if what & FLAG == FLAG { &mut self.marked } else { &mut self.unmarked };
                *counter += u64::from(copy_is_new);
                if copy_is_new && self.copies.len() < MOST_COPIES {
                    self.copies.push(id);
                }
                self.learn_uid(extra);
            }
            SENDING => {
                self.sent = true;
                self.sent_at = id.cast_unsigned();
                self.lane = (what & FLAG == FLAG).then_some(extra);
            }
            ACKNOWLEDGED => {
                self.acknowledged = Some(id);
                self.acknowledged_at = Some(extra);
                if !self.copies.contains(&id) {
                    self.stray_receipt = Some(id);
                }
            }
            REFUSED => self.refused = true,
            DELIVERED => {
                self.delivered = Some(id);
                self.learn_delivery(id);
                self.learn_uid(extra);
            }
            _ => self.sent = true,
        }
    }

    fn learn_uid(&mut self, uid: u64) {
        self.uid_changed |= *self.uid.get_or_insert(uid) != uid;
    }

    fn learn_delivery(&mut self, id: i64) {
        let is_known = self.stray_deliveries.last() == Some(&id);
        if self.copies.contains(&id) {
            self.in_place += 1;
        } else if !is_known && self.stray_deliveries.len() < MOST_COPIES {
            self.stray_deliveries.push(id);
        }
    }

    /// Whether it was sent again after it had been delivered under an id that nobody was promised.
    fn has_moved(&self) -> bool {
        let few = self.stray_deliveries.len() < MOST_COPIES && self.copies.len() < MOST_COPIES;
        let promised = self.stray_receipt.is_some_and(|id| self.stray_deliveries.contains(&id));
        few && self.in_place > 0 && !self.uid_changed && !promised
    }

    fn is_stored(&self) -> bool {
        self.unmarked + self.marked > 0
    }

    /// Not sent by anybody, or certainly not stored.
    fn is_impossible(&self) -> bool {
        self.acknowledged.is_none() && (!self.sent || self.refused)
    }

    fn is_nothing(&self) -> bool {
        let seen = self.is_stored() || self.delivered.is_some();
        !(self.sent || self.refused || self.acknowledged.is_some() || seen)
    }

    fn example(&self, id: i64, text: String) -> Example {
        let others = self.copies.iter().copied().filter(|copy| *copy != id);
        Example {
            ids: std::iter::once(id).chain(others).collect(),
            values: vec![self.value],
            text,
            ..Example::default()
        }
    }
}

struct Pass<'a> {
    survey: &'a Survey,
    findings: &'a mut Findings,
    losses: Losses,
    sends: Sends,
    moved: Moved,
}

impl<'a> Pass<'a> {
    fn new(survey: &'a Survey, findings: &'a mut Findings) -> Self {
        let (losses, sends, moved) = (Losses::default(), Sends::default(), Moved::default());
        Self { survey, findings, losses, sends, moved }
    }

    fn settle(&mut self, fate: &Fate, lanes: &mut Lanes<'_>) -> Result<()> {
        if fate.is_nothing() {
            return Ok(());
        }
        self.count_outcome(fate);
        if fate.sent && fate.lane.is_none() {
            self.sends.note(fate.value, fate.sent_at, fate.acknowledged_at);
        }
        self.judge_absence(fate);
        if fate.is_impossible() {
            self.judge_phantom(fate);
            return Ok(());
        }
        self.judge_copies(fate);
        match (fate.lane, fate.copies.as_slice(), fate.marked) {
            (Some(lane), [id], 0) => lanes.push(fate.value, lane, *id),
            _ => Ok(()),
        }
    }

    fn count_outcome(&mut self, fate: &Fate) {
        let report = &mut self.findings.report;
        if fate.acknowledged.is_some() {
            report.acknowledged += 1;
        } else if fate.refused {
            report.refused += 1;
        } else if fate.sent {
            report.unknown += 1;
            if fate.is_stored() {
                report.unknown_found += 1;
            } else {
                report.unknown_missing += 1;
            }
        }
    }

    fn judge_absence(&mut self, fate: &Fate) {
        match (fate.acknowledged, fate.is_stored(), fate.delivered) {
            (Some(_), true, _) => self.losses.kept(fate.value, &mut self.findings.report),
            (Some(id), false, _) => self.judge_loss(fate, id),
            (None, false, Some(id)) if !fate.is_impossible() => self.judge_vanished(fate, id),
            _ => {}
        }
    }

    fn judge_loss(&mut self, fate: &Fate, id: i64) {
        let (value, partition) = (shown(fate.value), partition_of(id));
        if self.survey.went_with_tail(partition, id, fate.sent_at) {
            let text = format!("{value} was acknowledged as {id} and went with a lost tail");
            self.findings.lost_with_tail(id);
            let example = || fate.example(id, text);
            return self.findings.add(AnomalyKind::TailLost, 1, example);
        }
        let text = format!("{value} was acknowledged as {id} and is not in the final read");
        self.findings.add(AnomalyKind::Lost, 1, || fate.example(id, text));
        let report = &mut self.findings.report;
        if self.survey.was_read_to(partition, id) {
            report.lost_write += 1;
        } else {
            report.lost_tail += 1;
        }
        self.losses.lost(fate.value, report);
    }

    fn judge_vanished(&mut self, fate: &Fate, id: i64) {
        if self.survey.is_in_lost_tail(partition_of(id), id) {
            return;
        }
        let value = shown(fate.value);
        let text = format!("{value} was delivered as {id} and is not in the final read");
        self.findings.add(AnomalyKind::Vanished, 1, || fate.example(id, text));
    }

    fn judge_phantom(&mut self, fate: &Fate) {
        let Some(id) = fate.copies.first().copied().or(fate.delivered) else {
            return;
        };
        let why = if fate.refused { "its send was refused" } else { "nobody sent it" };
        let text = format!("{} is there as {id}, but {why}", shown(fate.value));
        self.findings.add(AnomalyKind::Phantom, 1, || fate.example(id, text));
    }

    fn judge_copies(&mut self, fate: &Fate) {
        let value = shown(fate.value);
        let first = fate.copies.first().copied().unwrap_or(0);
        let too_many = fate.unmarked.saturating_sub(1);
        if too_many > 0 {
            let text = format!("{value} is stored {} times without a mark", fate.unmarked);
            let example = || fate.example(first, text);
            self.findings.add(AnomalyKind::Duplicated, too_many, example);
        }
        let original = u64::from(fate.unmarked == 0);
        self.findings.report.duplicated_marked += fate.marked.saturating_sub(original);
        if fate.uid_changed && too_many == 0 {
            let text = format!("{value} came with more than one uid");
            self.findings.add(AnomalyKind::UidChanged, 1, || fate.example(first, text));
        }
        self.judge_stray(fate);
    }

    /// A receipt may name a copy that a lost tail took; a marked one may have been evacuated.
    fn judge_stray(&mut self, fate: &Fate) {
        let moved = self.note_moved(fate);
        let delivery = fate.stray_deliveries.first().copied().filter(|_| !moved);
        let stray = fate.stray_receipt.or(delivery);
        let Some(id) = stray.filter(|_| fate.is_stored() && fate.marked == 0) else {
            return;
        };
        let forgiven = self.survey.is_in_lost_tail(partition_of(id), id);
        if !forgiven && fate.copies.len() < MOST_COPIES {
            let text = format!("{} was seen as {id}, where it is not", shown(fate.value));
            self.findings.add(AnomalyKind::WrongId, 1, || fate.example(id, text));
        }
    }

    fn note_moved(&mut self, fate: &Fate) -> bool {
        let strays = &fate.stray_deliveries;
        let moved =
            !strays.is_empty() && fate.has_moved() && strays.iter().all(|id| self.moved.note(*id));
        self.findings.report.moved += u64::from(moved);
        moved
    }
}
