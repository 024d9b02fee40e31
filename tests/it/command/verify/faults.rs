//! `--faults` breaks servers and processes of its own by a plan, counts what it did, and nothing is
//! lost.

use std::time::Duration;

use super::super::{command, finish_within, run};
use crate::support::TestCluster;

const KINDS: [&str; 8] = [
    "kill_node",
    "pause_node",
    "lock_table",
    "roll_day",
    "move_clock",
    "kill_member",
    "pause_member",
    "remake_topic",
];

/// For a longer run by hand: `SHARDMQ_VERIFY_SECONDS=600 SHARDMQ_SEED=7`.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_fault_is_done_and_costs_nothing() {
    let (seconds, seed) = (number("SHARDMQ_VERIFY_SECONDS", 22), number("SHARDMQ_SEED", 3));
    let arguments = format!(
        "verify --faults all --seed {seed} --seconds {seconds} --rate 300 --keys 50 --consumers 3 --json"
    );
    let mut child = command("", &arguments);
    let child = child.env_remove("SHARDMQ_URL").spawn().unwrap();
    let finished = finish_within(Duration::from_secs(seconds + 150), child).await;
    let report = finished.json().into_iter().next().unwrap_or_default();
    println!("{report}");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(report["violations"], 0, "{}", finished.stderr);
    assert_eq!(report["seed"], seed);
    for kind in KINDS {
        let least = (seconds / 60).max(1);
        assert!(report["faults"][kind].as_u64() >= Some(least), "{kind}: {report}");
    }
    let done = report["done"].as_array().unwrap();
    let total: u64 =
        report["faults"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(done.len() as u64, total);
    let delivered: u64 = done.iter().map(|fault| fault["delivered"].as_u64().unwrap()).sum();
    assert!(delivered > 1_000 && report["delivered"].as_u64() >= Some(delivered), "{report}");
}

#[tokio::test]
async fn a_cluster_that_is_given_is_not_broken() {
    let test = TestCluster::new(1).await;
    let finished = run(&test.control_url, "verify --faults kill --seconds 1").await;
    assert_eq!(finished.code, Some(2));
    assert!(finished.stderr.contains("private servers only"), "{}", finished.stderr);
    let finished = run("", "verify --faults kil --seconds 1").await;
    assert_eq!(finished.code, Some(2));
    assert!(finished.stderr.contains("no fault is called"), "{}", finished.stderr);
}
