//! How consumers hear, from the command line.

use serde_json::json;
use shardmq::embedded::Redis;

use super::run;
use crate::support::TestCluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_shown_and_set() {
    let test = TestCluster::new(2).await;
    let url = &test.control_url;
    let shown = run(url, "notifier show --json").await.good().json();
    assert_eq!((&shown[0]["notifier"], &shown[0]["redis_url"]), (&json!("postgres"), &json!(null)));
    let nodes = shown[0]["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 2);
    for node in nodes {
        let fields: Vec<&String> = node.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["error", "hints", "node", "round_trip_ms", "since"]);
        assert_eq!((&node["hints"], &node["error"]), (&json!("ok"), &json!(null)));
        assert!(node["round_trip_ms"].as_f64().unwrap() > 0.0, "{node}");
    }
    let redis = Redis::builder().start().await.unwrap();
    let set = format!("notifier set both --redis-url {}", redis.url());
    let text = String::from_utf8(run(url, &set).await.good().stdout).unwrap();
    assert!(text.starts_with(&format!("both at {}", redis.url())), "{text}");
    // What is not needed is not asked for, and nothing that hints could be waited for.
    let shown = run(url, "notifier set none --json").await.good().json();
    assert_eq!(shown[0]["nodes"][0]["hints"], "polling");
    let refused = run(url, "notifier set kafka").await;
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("postgres, redis, both or none"), "{}", refused.stderr);
    let refused = run(url, "notifier set redis --redis-url redis://h:port").await;
    assert!(refused.code.is_some_and(|code| code > 0), "{}", refused.stderr);
}
