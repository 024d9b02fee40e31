//! Groups from the command line: listed, described, moved, deleted.

use serde_json::{Value, json};

use super::{Finished, LONG, run, run_with};
use crate::support::{TestCluster, eventually};

/// A topic of two messages in one partition, of which group g has consumed the first.
async fn ready() -> (TestCluster, Vec<Value>) {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let mut ids = Vec::new();
    for text in ["a", "b"] {
        let produced = run_with(&test.control_url, "produce orders --json", text.as_bytes()).await;
        ids.push(produced.good().json()[0]["id"].clone());
    }
    run(&test.control_url, "consume orders --group g --count 1").await.good();
    (test, ids)
}

fn fields(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn text(finished: Finished) -> String {
    String::from_utf8(finished.good().stdout).unwrap()
}

/// Refused with this code and these words on stderr, and nothing on stdout.
fn refused(finished: &Finished, code: i32, words: &str) {
    assert_eq!(finished.code, Some(code), "{}", finished.stderr);
    assert!(finished.stderr.contains(words), "{}", finished.stderr);
    assert!(finished.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_and_describe_have_exactly_the_documented_fields() {
    let (test, ids) = ready().await;
    let url = &test.control_url;
    let groups = run(url, "group list --json").await.good().json();
    let all = ["broadcast", "group", "lag", "lag_secs", "members", "partitions", "start_at"];
    assert_eq!(fields(&groups[0]), [&all[..], &["topic", "unknown"]].concat());
    let numbers = ["lag", "members", "partitions", "unknown"].map(|name| &groups[0][name]);
    assert_eq!(numbers.map(|number| number.as_u64().unwrap()), [1, 0, 1, 0]);
    assert_eq!(groups[0]["start_at"], "1970-01-01T00:00:00.000000Z");
    assert_eq!(run(url, "group list orders --json").await.good().json().len(), 1);

    let messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let described = run(url, "group describe orders g --json").await.good().json();
    let all = ["broadcast", "group", "members", "partitions", "start_at", "topic"];
    assert_eq!(fields(&described[0]), all);
    let member = &described[0]["members"][0];
    let all = ["heartbeat_secs", "host", "live", "member", "partitions", "pid", "started_at"];
    assert_eq!(fields(member), [&all[..], &["unreachable"]].concat());
    assert_eq!(member["member"], messages.handle().member().to_string());
    let partition = &described[0]["partitions"][0];
    let all = ["acked_id", "epoch", "lag", "lag_secs", "last_id", "member", "node", "partition"];
    assert_eq!(fields(partition), [&all[..], &["reset_epoch", "state"]].concat());
    assert_eq!((&partition["acked_id"], &partition["last_id"]), (&ids[0], &ids[1]));

    let table = text(run(url, "group list").await);
    assert!(table.contains("topic") && table.contains("orders") && table.contains('1'), "{table}");
    let shown = text(run(url, "group describe orders g").await);
    assert!(shown.contains("group g of topic orders") && shown.contains("10101"), "{shown}");
    messages.shutdown(std::time::Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seek_says_what_was_moved_and_consume_goes_on_there() {
    let (test, ids) = ready().await;
    let url = &test.control_url;
    let seek = async |arguments: &str| {
        let seek = format!("group seek orders g --json {arguments}");
        run(url, &seek).await.good().json()
    };
    let at = |before: &Value, now: &Value| {
        vec![json!({"partition": 10101, "before_id": before, "acked_id": now})]
    };
    assert_eq!(seek("--to earliest").await, at(&ids[0], &Value::Null));
    assert_eq!(seek("--to latest").await, at(&Value::Null, &ids[1]));
    let second = ids[1].as_str().unwrap();
    assert_eq!(seek(&format!("--to {second} --partition 10101")).await, at(&ids[1], &ids[0]));
    assert_eq!(seek("--to 2999-01-01").await, at(&ids[0], &ids[1]));
    let table = text(run(url, "group seek orders g --to 1970-01-02T00:00:00Z").await);
    assert!(table.contains("10101") && table.contains(second), "{table}");
    let consumed = run(url, "consume orders --group g").await.good().json();
    assert_eq!(consumed.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_done_has_an_exit_code_that_says_why() {
    let (test, _) = ready().await;
    let url = &test.control_url;
    let cases = [
        ("group list ordres", 3, "the nearest are orders"),
        ("group describe orders gg", 3, "the nearest are g"),
        ("group seek orders gg --to latest", 3, "the nearest are g"),
        ("group seek orders g --to latest --partition 10199", 3, "10199 is not one of topic"),
        ("group delete orders gg", 3, "the nearest are g"),
        ("group seek orders g --to tomorrow", 2, "neither earliest, latest, a time nor"),
        ("group seek orders g", 2, "--to"),
        ("group seek orders g --to latest --partition 7", 2, "--partition"),
        ("group describe orders G!", 2, "group name"),
    ];
    for (arguments, code, words) in cases {
        refused(&run(url, arguments).await, code, words);
    }
    // Held by a transaction for longer than it is tried.
    let blocker = test.sql(0).await;
    blocker.batch_execute("begin; select from shardmq.cursor for update").await.unwrap();
    let locked = run(url, "group seek orders g --to latest").await;
    refused(&locked, 4, "another transaction has locked 10101");
    blocker.batch_execute("rollback").await.unwrap();

    let messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    refused(&run(url, "group delete orders g").await, 1, "has live consumers");
    messages.shutdown(std::time::Duration::ZERO).await.unwrap();
    // It may be gone only with its lease.
    let deleted = async || {
        let deleted = run(url, "group delete orders g").await;
        deleted.stderr.contains("group g of topic orders is deleted") && deleted.code == Some(0)
    };
    eventually("the group is deleted", LONG, deleted).await;
    assert!(run(url, "group list --json").await.good().stdout.is_empty());
}
