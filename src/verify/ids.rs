//! What is known of each id, side by side; and where each is in the final read, for the last pass.
//!
//! Rows are `[id, class << 32 | group, token, time, sequence, kind | member, value, asked]`: for each
//! id first what is stored, then receipts, then what each holding did, in order of time.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::Result;
use crate::verify::damaged;
use crate::verify::findings::{Example, Findings, shown};
use crate::verify::history::History;
use crate::verify::moved::Moved;
use crate::verify::record::{Kind, Record, partition_of};
use crate::verify::report::AnomalyKind;
use crate::verify::sort::{Sorter, Workspace};
use crate::verify::step::{STEP_WORDS, Step};
use crate::verify::survey::Survey;

const ROW_WORDS: usize = 8;
/// The payload was damaged, there is no value: beside the kind in the head.
const DAMAGED: u64 = 1 << 8;
/// Ids of one day differ below this.
pub(super) const IDS_OF_DAY: i64 = 100_000_000;

/// Judges every id, and returns the steps of the last pass.
pub(super) fn check<'a>(
    history: &History,
    survey: &Survey,
    moved: &Moved,
    space: &Rc<Workspace<'a>>,
    findings: &mut Findings,
) -> Result<Sorter<'a, STEP_WORDS>> {
    let mut sorter = Sorter::new(space, 2);
    let mut steps = Sorter::new(space, 4);
    let mut sequence = 0;
    history.scan(|_, record| {
        sequence += 1;
        if record.id != 0 && record.kind != Kind::TailLost {
            sorter.push(row(&record, sequence))
        } else {
            steps.push(Step::of(&record, sequence).words())
        }
    })?;
    let mut pass = Pass::new(survey, moved, findings);
    for row in sorter.sorted()? {
        if let Some(step) = pass.take(row?)? {
            steps.push(step.words())?;
        }
    }
    pass.close_partition();
    Ok(steps)
}

fn row(record: &Record, sequence: u64) -> [u64; ROW_WORDS] {
    let class: u64 = match record.kind {
        Kind::Stored => 0,
        Kind::Acknowledged => 1,
        _ => 2,
    };
    let (value, damaged) = record.value().map_or((0, DAMAGED), |value| (value, 0));
    [
        record.id.cast_unsigned(),
        class << 32 | u64::from(record.group),
        record.token,
        record.time,
        sequence,
        record.kind as u64 | damaged | u64::from(record.member) << 32,
        value,
        record.asked(),
    ]
}

/// The step of a row, without its place, and the value.
fn parse(row: [u64; ROW_WORDS]) -> Option<(Step, Option<u64>)> {
    let [id, who, token, time, sequence, head, value, asked] = row;
    let step = Step {
        time,
        sequence,
        kind: Kind::of(head & 0xff)?,
        group: u16::try_from(who & 0xffff).ok()?,
        member: u32::try_from(head >> 32).ok()?,
        token,
        id: id.cast_signed(),
        place: 0,
        stored: false,
        ghost: false,
        asked,
    };
    Some((step, (head & DAMAGED == 0).then_some(value)))
}

struct Pass<'a> {
    survey: &'a Survey,
    moved: &'a Moved,
    findings: &'a mut Findings,
    /// How many ids of the partition are stored below this one.
    place: u64,
    here: Here,
    last_stored: i64,
    /// Acknowledged messages since the last that a drained group got, and the first of them.
    unseen: BTreeMap<u16, (u64, i64)>,
}

/// What is known of one id.
#[derive(Default)]
struct Here {
    id: i64,
    stored: bool,
    stored_value: Option<u64>,
    acknowledged: bool,
    /// The first value that was seen here.
    value: Option<u64>,
    other_value: Option<u64>,
    /// Groups that were delivered it, in order.
    groups: Vec<u16>,
    /// The holding that was delivered it last, and whether that was a ghost.
    delivery: Option<(u16, u64, bool)>,
}

impl Here {
    fn see(&mut self, value: Option<u64>) {
        if let Some(value) = value
            && *self.value.get_or_insert(value) != value
        {
            self.other_value = Some(value);
        }
    }

    /// Notes a delivery; whether its group had been delivered this id before.
    fn deliver(&mut self, step: &Step) -> bool {
        self.delivery = Some((step.group, step.token, step.ghost));
        let again = self.groups.last() == Some(&step.group);
        if !again {
            self.groups.push(step.group);
        }
        again && !step.ghost
    }
}

impl<'a> Pass<'a> {
    fn new(survey: &'a Survey, moved: &'a Moved, findings: &'a mut Findings) -> Self {
        Self {
            survey,
            moved,
            findings,
            place: 0,
            here: Here::default(),
            last_stored: 0,
            unseen: BTreeMap::new(),
        }
    }

    /// Takes the next row; returns the step that it becomes, if any.
    fn take(&mut self, row: [u64; ROW_WORDS]) -> Result<Option<Step>> {
        let Some((mut step, value)) = parse(row) else {
            return Err(damaged());
        };
        if step.id != self.here.id {
            self.turn_to(step.id);
        }
        match step.kind {
            Kind::Stored => {
                self.store(step.id, value);
                return Ok(None);
            }
            Kind::Acknowledged => {
                self.here.see(value);
                self.here.acknowledged = true;
            }
            Kind::Delivered => {
                let has_moved = self.has_moved(step.id, value);
                step.ghost = has_moved || self.is_ghost(step.id, value);
                if !has_moved {
                    self.here.see(value);
                }
                self.findings.report.redelivered += u64::from(self.here.deliver(&step));
            }
            Kind::Committed => step.ghost = self.may_be_ghost(&step),
            _ => step.ghost = self.here.delivery == Some((step.group, step.token, true)),
        }
        step.place = self.place;
        step.stored = self.here.stored;
        Ok(Some(step))
    }

    fn store(&mut self, id: i64, value: Option<u64>) {
        self.here.see(value);
        self.here.stored = true;
        self.here.stored_value = value;
        if self.last_stored / IDS_OF_DAY == id / IDS_OF_DAY && id > self.last_stored {
            let missing = u64::try_from(id - self.last_stored - 1).unwrap_or(0);
            self.findings.report.holes += missing;
        }
        self.last_stored = id;
    }

    /// Whether a message that was delivered under this id went with a lost tail.
    fn is_ghost(&self, id: i64, value: Option<u64>) -> bool {
        !self.is_here(value) && self.survey.is_in_lost_tail(partition_of(id), id)
    }

    /// Whether a message that was delivered under this id is stored under another one now.
    fn has_moved(&self, id: i64, value: Option<u64>) -> bool {
        !self.is_here(value) && self.moved.from(id)
    }

    fn is_here(&self, value: Option<u64>) -> bool {
        self.here.stored && (value.is_none() || self.here.stored_value == value)
    }

    /// Whether a commit may name a message that went with a lost tail: its holding did not get the one
    /// that is here now, perhaps because it went on from a cursor that was there already.
    fn may_be_ghost(&self, step: &Step) -> bool {
        let got_it = self.here.delivery == Some((step.group, step.token, false));
        !got_it && self.survey.is_in_lost_tail(step.partition(), step.id)
    }

    fn turn_to(&mut self, id: i64) {
        self.close_id();
        if partition_of(id) != partition_of(self.here.id) {
            self.close_partition();
        }
        self.here = Here { id, ..Here::default() };
    }

    fn close_id(&mut self) {
        self.judge_values();
        let partition = partition_of(self.here.id);
        for group in self.survey.drained(partition) {
            let unseen = self.unseen.entry(group).or_default();
            if self.here.groups.contains(&group) {
                *unseen = (0, 0);
            } else if self.here.stored && self.here.acknowledged {
                *unseen = (unseen.0 + 1, if unseen.0 == 0 { self.here.id } else { unseen.1 });
            }
        }
        self.place += u64::from(self.here.stored);
    }

    fn judge_values(&mut self) {
        let (Some(first), Some(other)) = (self.here.value, self.here.other_value) else {
            return;
        };
        let id = self.here.id;
        let forgiven = self.survey.is_in_lost_tail(partition_of(id), id);
        let kind = if forgiven { AnomalyKind::TailReused } else { AnomalyKind::OffsetReused };
        self.findings.add(kind, 1, || Example {
            ids: vec![id],
            values: vec![first, other],
            text: format!("{id} was seen with {} and {}", shown(first), shown(other)),
            ..Example::default()
        });
    }

    /// Ends the current id and its partition.
    fn close_partition(&mut self) {
        if self.here.id != 0 {
            self.close_id();
        }
        for (group, (count, first)) in std::mem::take(&mut self.unseen) {
            if count > 0 {
                self.findings.add(AnomalyKind::Unseen, count, || Example {
                    group: Some(group),
                    ids: vec![first],
                    text: format!(
                        "group {group} never got {count} acknowledged messages from {first} on"
                    ),
                    ..Example::default()
                });
            }
        }
        self.place = 0;
        self.last_stored = 0;
        self.here = Here::default();
    }
}
