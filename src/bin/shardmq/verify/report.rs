//! The report for people.

use shardmq::verify::{AnomalyKind, Report};

use crate::output::{Out, counted, table};

pub(super) fn print(report: &Report, out: &mut Out) {
    let counts = [
        ("acknowledged", report.acknowledged, "sends that returned an id"),
        ("refused", report.refused, "sends that failed, and are not there"),
        ("unknown", report.unknown, "sends whose outcome nobody knows"),
        ("stored", report.stored, "in the final read"),
        ("delivered", report.delivered, "to the group, repeated ones included"),
        ("redelivered", report.redelivered, "delivered before"),
        ("duplicated_marked", report.duplicated_marked, "stored twice, and marked as that"),
        ("tail_lost", report.tail_lost, "acknowledged, and gone with the end of a server's log"),
        ("moved", report.moved, "delivered before they were durable, and stored anew"),
        ("longest_stall_ms", report.longest_stall_ms, "without a send or delivery that was due"),
        (
            "longest_keyless_stall_ms",
            report.longest_keyless_stall_ms,
            "without a key, until it or a later one was acknowledged",
        ),
        (
            "longest_keyless_send_ms",
            report.longest_keyless_send_ms,
            "without a key, each by itself",
        ),
    ];
    let rows = counts.map(|(name, count, meaning)| row(name, count, meaning));
    out.line(&table(&["", "COUNT", ""], &[1], rows.to_vec()));
    out.line("");
    let kinds = AnomalyKind::ALL.into_iter().filter(|kind| kind.is_violation());
    let rows = kinds.map(|kind| row(&name_of(kind), report.count(kind), ""));
    let total = row("violations", report.violations, "");
    out.line(&table(&["VIOLATION", "COUNT", ""], &[1], rows.chain([total]).collect()));
    for anomaly in report.anomalies.iter().filter(|anomaly| anomaly.kind.is_violation()) {
        out.line(&format!("{}: {}", name_of(anomaly.kind), anomaly.text));
    }
    for tail in &report.lost_tails {
        out.line(&format!(
            "tail lost: from {} in partition {}, {}",
            tail.from,
            tail.partition,
            counted(tail.acknowledged, "acknowledged message")
        ));
    }
    if !report.lost_tails.is_empty() && report.violations == 0 {
        out.line("All else is well.");
    }
}

/// What was counted where the check could not be made, in a line.
pub(super) fn measured(report: &Report) -> String {
    let Report { acknowledged, refused, unknown, delivered, .. } = report;
    format!(
        "measured so far: {acknowledged} acknowledged, {refused} refused, {unknown} unknown, \
         {delivered} delivered, longest stalls {} ms without a send and {} ms without a delivery; \
         whether anything is lost is not known",
        report.longest_send_stall_ms, report.longest_delivery_stall_ms
    )
}

fn row(name: &str, count: u64, meaning: &str) -> Vec<String> {
    vec![name.to_owned(), count.to_string(), meaning.to_owned()]
}

/// As the JSON calls it.
fn name_of(kind: AnomalyKind) -> String {
    let json = serde_json::to_value(kind).ok();
    json.as_ref().and_then(|name| name.as_str()).unwrap_or_default().to_owned()
}
