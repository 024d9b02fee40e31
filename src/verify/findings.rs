//! Collects what the passes find: counters always, examples up to a number of each kind.

use std::collections::BTreeMap;

use crate::id::{MessageId, PartitionId};
use crate::verify::event::Value;
use crate::verify::record::partition_of;
use crate::verify::report::{Anomaly, AnomalyKind, LostTail, Report};

#[derive(Debug)]
pub(super) struct Findings {
    pub(super) report: Report,
    most: u64,
    /// The first acknowledged message that went with a lost tail, and how many did, by partition.
    tails: BTreeMap<u32, (i64, u64)>,
}

/// What an example is made of; numbers that are no ids are left out.
#[derive(Debug, Clone, Default)]
pub(super) struct Example {
    pub(super) group: Option<u16>,
    pub(super) ids: Vec<i64>,
    pub(super) values: Vec<u64>,
    /// Nanoseconds.
    pub(super) time: Option<u64>,
    pub(super) text: String,
}

impl Findings {
    /// With `most` examples of each kind.
    pub(super) fn new(most: u64) -> Self {
        Self { report: Report::default(), most, tails: BTreeMap::new() }
    }

    /// Counts `times` findings of a kind (at least one), and keeps an example of the first.
    pub(super) fn add(&mut self, kind: AnomalyKind, times: u64, example: impl FnOnce() -> Example) {
        let counter = self.report.counter(kind);
        let before = *counter;
        *counter += times;
        if before < self.most {
            self.report.anomalies.push(anomaly(kind, example()));
        }
    }

    /// An acknowledged message went with a lost tail.
    pub(super) fn lost_with_tail(&mut self, id: i64) {
        let (first, count) = self.tails.entry(partition_of(id)).or_insert((id, 0));
        *first = id.min(*first);
        *count += 1;
    }

    /// The report, examples by kind.
    pub(super) fn finish(mut self) -> Report {
        let tails = self.tails.iter().filter_map(|(partition, (first, count))| {
            Some(LostTail {
                partition: PartitionId::try_from(*partition).ok()?,
                from: MessageId::try_from(*first).ok()?,
                acknowledged: *count,
            })
        });
        self.report.lost_tails = tails.collect();
        self.report.sum_up();
        self.report.anomalies.sort_by_key(|anomaly| anomaly.kind);
        self.report
    }
}

fn anomaly(kind: AnomalyKind, example: Example) -> Anomaly {
    let first = example.ids.first().copied();
    let ids = example.ids.into_iter();
    let values = example.values.into_iter();
    Anomaly {
        kind,
        partition: first.and_then(|id| PartitionId::try_from(partition_of(id)).ok()),
        group: example.group,
        ids: ids.filter_map(|id| MessageId::try_from(id).ok()).collect(),
        values: values.map(Value::from_number).collect(),
        at_ms: example.time.map(|time| time / 1_000_000),
        text: example.text,
    }
}

/// An id or value for people, in a text.
pub(super) fn shown(value: u64) -> Value {
    Value::from_number(value)
}
