//! The last pass: what producers and groups did, in order of time.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::verify::damaged;
use crate::verify::findings::Findings;
use crate::verify::reading::Reading;
use crate::verify::record::Kind;
use crate::verify::sort::Sorter;
use crate::verify::stall::Sends;
use crate::verify::step::{STEP_WORDS, Step};
use crate::verify::survey::Survey;

/// Judges the steps. Memory goes by groups, partitions and holdings.
pub(super) fn check(
    steps: Sorter<'_, STEP_WORDS>,
    survey: &Survey,
    findings: &mut Findings,
) -> Result<()> {
    let mut timeline =
        Timeline { survey, findings, sends: Sends::default(), partitions: BTreeMap::new(), now: 0 };
    for row in steps.sorted()? {
        let step = Step::from_words(row?).ok_or_else(damaged)?;
        timeline.take(&step);
    }
    timeline.finish();
    Ok(())
}

struct Timeline<'a> {
    survey: &'a Survey,
    findings: &'a mut Findings,
    sends: Sends,
    partitions: BTreeMap<u32, Partition>,
    now: u64,
}

#[derive(Default)]
struct Partition {
    /// The highest id that was acknowledged and can be delivered.
    acknowledged: i64,
    groups: BTreeMap<u16, Reading>,
}

impl Timeline<'_> {
    fn take(&mut self, step: &Step) {
        match step.kind {
            Kind::Sending | Kind::Refused | Kind::Unknown => self.produced(step),
            Kind::Acknowledged => {
                self.produced(step);
                if step.stored {
                    self.acknowledged(step);
                }
            }
            Kind::TailLost | Kind::TailNoticed | Kind::Stored => {}
            _ => self.consumed(step),
        }
    }

    fn produced(&mut self, step: &Step) {
        self.now = step.time;
        self.sends.note(step.kind, step.time);
    }

    fn acknowledged(&mut self, step: &Step) {
        let partition = self.partitions.entry(step.partition()).or_default();
        partition.acknowledged = partition.acknowledged.max(step.id);
        for reading in partition.groups.values_mut() {
            reading.expect(step.id, step.time);
        }
    }

    fn consumed(&mut self, step: &Step) {
        self.now = step.time;
        let number = step.partition();
        let partition = self.partitions.entry(number).or_default();
        let acknowledged = partition.acknowledged;
        let reading = partition.groups.entry(step.group).or_insert_with(|| {
            let mut reading = Reading::new(step.group, number, self.survey);
            reading.expect(acknowledged, step.time);
            reading
        });
        reading.take(step, self.findings);
        reading.expect(acknowledged, step.time);
    }

    fn finish(self) {
        let mut longest = 0;
        for reading in self.partitions.values().flat_map(|p| p.groups.values()) {
            reading.finish(self.findings);
            longest = longest.max(reading.longest_wait(self.now));
        }
        let report = &mut self.findings.report;
        report.longest_delivery_stall_ms = longest / 1_000_000;
        report.longest_send_stall_ms = self.sends.longest() / 1_000_000;
    }
}
