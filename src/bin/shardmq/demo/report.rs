//! What the demo found.

use serde::Serialize;

use super::record::Record;
use super::workload::Workload;
use crate::failure::{FAILED, Failure};
use crate::output::{Out, counted};

/// The one object that `--json` prints.
#[derive(Serialize)]
pub(super) struct Report {
    nodes: usize,
    partitions: usize,
    messages: u64,
    lost: u64,
    duplicated: u64,
    redelivered: u64,
    out_of_order: u64,
    produce_per_s: u64,
    consume_per_s: u64,
    latency_ms: Latency,
    #[serde(skip)]
    refused: u64,
}

/// From before the message was made until after it was received.
#[derive(Serialize)]
struct Latency {
    p50: Option<f64>,
    p99: Option<f64>,
}

impl Report {
    pub(super) fn new(
        (nodes, partitions): (usize, usize),
        workload: &Workload,
        in_group: &Record,
        again: &Record,
        (produce_per_s, consume_per_s): (f64, f64),
    ) -> Self {
        let is_lost = |number: &u32| {
            workload.is_acknowledged(*number) && !(in_group.has(*number) && again.has(*number))
        };
        Self {
            nodes,
            partitions,
            messages: workload.acknowledged(),
            lost: (0..workload.total()).filter(is_lost).count() as u64,
            duplicated: again.duplicated(),
            redelivered: in_group.redelivered(),
            out_of_order: in_group.out_of_order() + again.out_of_order(),
            produce_per_s: whole(produce_per_s),
            consume_per_s: whole(consume_per_s),
            latency_ms: Latency {
                p50: in_group.latency_ms(0.50).map(to_microseconds),
                p99: in_group.latency_ms(0.99).map(to_microseconds),
            },
            refused: workload.refused(),
        }
    }

    pub(super) fn print(&self, out: &mut Out) {
        let latency =
            |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2} ms"));
        let rows = [
            (
                "messages",
                self.messages.to_string(),
                "acknowledged by the disk, each with a value of its own",
            ),
            (
                "lost",
                self.lost.to_string(),
                "not seen by the group, or not there when all was read again",
            ),
            ("duplicated", self.duplicated.to_string(), "stored at two places"),
            (
                "out of order",
                self.out_of_order.to_string(),
                "behind a later one of its partition or key",
            ),
            (
                "redelivered",
                self.redelivered.to_string(),
                "seen twice: what the killed member had not committed",
            ),
            ("produced", format!("{}/s", self.produce_per_s), "by four tasks, flushed to disk"),
            (
                "consumed",
                format!("{}/s", self.consume_per_s),
                "by one consumer, when all was read again",
            ),
            (
                "latency p50",
                latency(self.latency_ms.p50),
                "from send to receipt, at 250 messages a second",
            ),
            ("latency p99", latency(self.latency_ms.p99), ""),
        ];
        out.line(&format!(
            "\n{}, {}\n",
            counted(self.nodes as u64, "node"),
            counted(self.partitions as u64, "partition")
        ));
        for (name, value, meaning) in rows {
            out.line(format!("{name:<13} {value:>12}  {meaning}").trim_end());
        }
        let verdict = if self.is_good() {
            "\nNothing was lost, all came in order."
        } else {
            "\nThis must not be."
        };
        out.line(verdict);
    }

    fn is_good(&self) -> bool {
        self.lost == 0 && self.out_of_order == 0 && self.duplicated == 0 && self.refused == 0
    }

    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if self.is_good() {
            return Ok(());
        }
        let Self { lost, duplicated, out_of_order, refused, .. } = self;
        let text = format!(
            "{lost} lost, {duplicated} duplicated, {out_of_order} out of order, {refused} could not be sent"
        );
        Err(Failure::new(FAILED, text))
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(rate: f64) -> u64 {
    rate.round() as u64
}

fn to_microseconds(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}
