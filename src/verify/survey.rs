//! The first look at a history: what has to be known before anything is judged. Its size goes by the
//! number of partitions, groups and recorders.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use crate::error::Result;
use crate::verify::findings::{Example, Findings};
use crate::verify::history::History;
use crate::verify::record::{Kind, Record};
use crate::verify::report::AnomalyKind;
use crate::verify::sort::Workspace;
use crate::verify::tails::Tails;

#[derive(Debug, Default)]
pub(super) struct Survey {
    /// The last id of the final read, by partition.
    last_stored: HashMap<u32, i64>,
    tails: Tails,
    /// Groups that record acknowledgements.
    acking: BTreeSet<u16>,
    /// Where which groups have read to the end; without those that seek there.
    drained: BTreeMap<u32, BTreeSet<u16>>,
    seeking: BTreeSet<(u32, u16)>,
    /// The id read last, by recorder and partition.
    reading: HashMap<(u32, u32), i64>,
}

impl Survey {
    /// Reads through a history; counts its events, and judges the order of the final read.
    pub(super) fn of(
        history: &History,
        space: &Rc<Workspace<'_>>,
        findings: &mut Findings,
    ) -> Result<Self> {
        let mut survey = Self::default();
        history.scan(|recorder, record| {
            survey.note(recorder, &record, findings);
            Ok(())
        })?;
        survey.tails.find(history, space)?;
        for (partition, group) in &survey.seeking {
            if let Some(groups) = survey.drained.get_mut(partition) {
                groups.remove(group);
            }
        }
        Ok(survey)
    }

    fn note(&mut self, recorder: u32, record: &Record, findings: &mut Findings) {
        let partition = record.partition();
        findings.report.work.events += 1;
        match record.kind {
            Kind::Stored => self.note_stored(recorder, record, findings),
            Kind::Delivered => findings.report.delivered += 1,
            Kind::Acked => drop(self.acking.insert(record.group)),
            Kind::SeekStarted => drop(self.seeking.insert((partition, record.group))),
            Kind::Drained => {
                self.drained.entry(partition).or_default().insert(record.group);
            }
            Kind::TailLost | Kind::TailNoticed => self.tails.note(record),
            _ => {}
        }
        let carries = matches!(record.kind, Kind::Stored | Kind::Delivered);
        if carries && record.value().is_none() {
            findings.add(AnomalyKind::Corrupt, 1, || Example {
                group: (record.kind == Kind::Delivered).then_some(record.group),
                ids: vec![record.id],
                time: Some(record.time),
                text: format!("the payload of {} is damaged", record.id),
                ..Example::default()
            });
        }
    }

    fn note_stored(&mut self, recorder: u32, record: &Record, findings: &mut Findings) {
        let partition = record.partition();
        findings.report.stored += 1;
        let last = self.last_stored.entry(partition).or_default();
        *last = record.id.max(*last);
        let read = self.reading.entry((recorder, partition)).or_default();
        let before = std::mem::replace(read, record.id);
        if before >= record.id {
            findings.add(AnomalyKind::ReadOrder, 1, || Example {
                ids: vec![record.id, before],
                values: record.value().into_iter().collect(),
                text: format!("the final read got {} after {before}", record.id),
                ..Example::default()
            });
        }
    }

    /// Whether the final read went to this id of its partition, or beyond.
    pub(super) fn was_read_to(&self, partition: u32, id: i64) -> bool {
        self.last_stored.get(&partition).is_some_and(|last| id <= *last)
    }

    /// Whether an id may have gone with a lost tail.
    pub(super) fn is_in_lost_tail(&self, partition: u32, id: i64) -> bool {
        self.tails.has(partition, id)
    }

    /// Whether a message that was sent at a time and acknowledged under an id may have gone with one.
    pub(super) fn went_with_tail(&self, partition: u32, id: i64, sent_at: u64) -> bool {
        self.tails.took(partition, id, sent_at)
    }

    /// Whether a partition's tail may be lost, cursors included.
    pub(super) fn may_lack_tail(&self, partition: u32) -> bool {
        self.tails.may_lack(partition)
    }

    /// Whether a group records acknowledgements.
    pub(super) fn is_acking(&self, group: u16) -> bool {
        self.acking.contains(&group)
    }

    /// The groups that should have got everything of a partition.
    pub(super) fn drained(&self, partition: u32) -> impl Iterator<Item = u16> + '_ {
        self.drained.get(&partition).into_iter().flatten().copied()
    }
}
