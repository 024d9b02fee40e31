//! The benches run, from beginning to end, and say what they found. How fast, is not asked here.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::support::{TestCluster, within};

/// Runs `shardmq bench` with these arguments, and returns what it printed.
async fn bench(arguments: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command.arg("bench").args(arguments.split(' ')).arg("--json").kill_on_drop(true);
    let output = within(Duration::from_secs(90), arguments, command.output()).await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments}: {errors}");
    // Exactly one object.
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Every bench has these fields, and they are numbers above 0.
fn check(report: &Value) {
    let mut paths: Vec<String> = ["per_s", "floor_per_s", "ratio", "mb_per_s", "flush_ms"]
        .map(|name| format!("/{name}"))
        .to_vec();
    for name in ["latency_ms", "floor_latency_ms"] {
        paths.extend(["p50", "p99", "p999"].map(|part| format!("/{name}/{part}")));
    }
    paths.extend(["pairs", "min", "max"].map(|name| format!("/ratio_spread/{name}")));
    paths.extend(["cpus", "memory_mib"].map(|name| format!("/machine/{name}")));
    for path in paths {
        let value = report.pointer(&path).and_then(Value::as_f64);
        assert!(value.is_some_and(|value| value > 0.0), "{path} in {report}");
    }
}

#[tokio::test]
async fn produce_is_measured() {
    let report = bench("produce --embedded --seconds 2 --size 50 --partitions 2").await;
    check(&report);
    assert_eq!(report["flush_is"], "fdatasync after a write of 8 kB");
    check(&bench("produce --embedded --seconds 2 --batch 100").await);
}

#[tokio::test]
async fn consume_is_measured_with_two_members_on_two_nodes() {
    check(&bench("consume --embedded --seconds 2 --messages 50000 --members 2 --nodes 2").await);
}

#[tokio::test]
async fn latency_is_measured_with_each_notifier_and_with_none() {
    for notifier in ["postgres", "redis", "both", "none"] {
        let how = format!("--embedded --seconds 2 --rate 200 --notifier {notifier}");
        check(&bench(&format!("latency {how}")).await);
    }
}

#[tokio::test]
async fn backlog_is_measured_small_and_large() {
    let report = bench("backlog --embedded --seconds 2 --messages 8000").await;
    check(&report);
    let backlogs = report["backlogs"].as_array().unwrap();
    assert_eq!(backlogs[0]["messages"], 8_000);
    assert_eq!(backlogs[1]["messages"], 80_000);
    assert!(backlogs.iter().all(|one| one["peak_rss_mib"].as_f64() > Some(1.0)));
}

#[tokio::test]
async fn on_a_given_cluster_nothing_is_left_behind() {
    let test = TestCluster::new(1).await;
    let report = bench(&format!("produce --seconds 2 --url {}", test.control_url)).await;
    check(&report);
    assert_eq!(report["flush_is"], "commit of an appended message");
    assert!(test.cluster.topics().await.unwrap().is_empty());
}
