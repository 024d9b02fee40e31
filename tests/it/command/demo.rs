//! The demo keeps what it says.

use serde_json::json;

use super::{Finished, run};

fn fields(finished: &Finished) -> Vec<String> {
    let report = &finished.json()[0];
    report.as_object().unwrap().keys().cloned().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_loses_nothing_and_reports_all_fields() {
    let demo = run("", "demo --messages 5000 --nodes 1 --json").await.good();
    assert!(demo.stderr.is_empty(), "{}", demo.stderr);
    let all = [
        "consume_per_s",
        "duplicated",
        "latency_ms",
        "lost",
        "messages",
        "nodes",
        "out_of_order",
        "partitions",
        "produce_per_s",
        "redelivered",
    ];
    assert_eq!(fields(&demo), all);
    let report = &demo.json()[0];
    assert_eq!(demo.json().len(), 1);
    let expected = [("messages", 5000), ("nodes", 1), ("partitions", 4), ("lost", 0)];
    for (field, value) in expected.into_iter().chain([("duplicated", 0), ("out_of_order", 0)]) {
        assert_eq!(report[field], json!(value), "{field}: {report}");
    }
    assert!(report["produce_per_s"].as_f64().unwrap() > 0.0);
    assert!(report["consume_per_s"].as_f64().unwrap() > 0.0);
    let latency = &report["latency_ms"];
    assert!(latency["p50"].as_f64().unwrap() > 0.0);
    assert!(latency["p99"].as_f64().unwrap() >= latency["p50"].as_f64().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_tells_people_what_it_checked() {
    let demo = run("", "demo --messages 500 --nodes 2 --redis").await.good();
    let text = String::from_utf8(demo.stdout).unwrap();
    assert!(text.contains("2 nodes, 8 partitions"), "{text}");
    assert!(text.contains("Nothing was lost, all came in order."), "{text}");
    assert!(demo.stderr.contains("killed one after"), "{}", demo.stderr);
}
