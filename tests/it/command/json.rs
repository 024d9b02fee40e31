//! Every documented field of every JSON, and nothing else on stdout.

use serde_json::{Value, json};

use super::{run, run_with};
use crate::support::TestCluster;

fn fields(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// RFC 3339 with microseconds, in UTC.
fn is_time(value: &Value) -> bool {
    let text = value.as_str().unwrap();
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let (date, time) = text.split_once('T').unwrap();
    let (seconds, fraction) = time.split_once('.').unwrap();
    date.split('-').all(digits)
        && seconds.split(':').all(digits)
        && fraction.len() == 7
        && fraction.ends_with('Z')
        && digits(&fraction[..6])
}

async fn with_two_messages() -> (TestCluster, Vec<Value>) {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let input = b"{\"k\":\"a\"}\n";
    let produce = "produce orders --json --key-field k --header h=v";
    let mut ids = run_with(&test.control_url, produce, input).await.good().json();
    ids.extend(run_with(&test.control_url, "produce orders --json", b"\xff").await.good().json());
    (test, ids)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_that_are_produced_again_with_their_dedup_keys_have_the_ids_of_the_first() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 4").await.good();
    let produce = "produce orders --json --dedup-key-field id --key-field k";
    let input = b"{\"id\":7,\"k\":\"a\"}\n{\"id\":\"x\",\"k\":\"b\"}\n";
    let first = run_with(&test.control_url, produce, input).await.good().json();
    let again = run_with(&test.control_url, produce, input).await.good().json();
    assert_eq!((first.len(), &first), (2, &again));
    assert_ne!(first[0]["id"], first[1]["id"]);
    // By the dedup key alone.
    let produce = "produce orders --json --dedup-key-field id";
    let input = b"{\"id\":7}\n{\"id\":\"\"}\n{\"k\":7}\n";
    let lines = run_with(&test.control_url, produce, input).await;
    assert!(lines.stderr.contains("line 2: dedup key is empty"), "{}", lines.stderr);
    assert!(lines.stderr.contains("no field \"id\""), "{}", lines.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumed_message_has_exactly_the_documented_fields() {
    let (test, ids) = with_two_messages().await;
    assert_eq!(fields(&ids[0]), ["id"]);
    // The same with and without --json.
    for (group, json) in [("a", ""), ("b", "--json")] {
        let consume = format!("consume orders --group {group} {json}");
        let lines = run(&test.control_url, &consume).await.good().json();
        let common = ["appended_at", "attempt", "headers", "id", "key", "partition"];
        assert_eq!(fields(&lines[0]), [&common[..], &["payload", "topic", "uid"]].concat());
        assert_eq!(fields(&lines[1]), [&common[..], &["payload_base64", "topic", "uid"]].concat());
        assert_eq!(lines[0]["id"], ids[0]["id"]);
        assert_eq!(lines[0]["topic"], "orders");
        assert_eq!(lines[0]["partition"], 10101);
        assert_eq!((&lines[0]["key"], &lines[1]["key"]), (&json!("a"), &Value::Null));
        assert_eq!((&lines[0]["headers"], &lines[1]["headers"]), (&json!({"h": "v"}), &json!({})));
        assert_eq!(lines[0]["payload"], "{\"k\":\"a\"}");
        assert_eq!(lines[1]["payload_base64"], "/w==");
        assert_eq!(lines[0]["attempt"], 1);
        assert!(is_time(&lines[0]["appended_at"]), "{}", lines[0]);
        let uid = lines[0]["uid"].as_str().unwrap();
        assert!(uid.parse::<shardmq::Uid>().is_ok(), "{uid}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_messages_have_ids_of_their_own_and_come_later() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let produce = "produce orders --json --delay 1s --key-field k";
    let finished = run_with(&test.control_url, produce, b"{\"k\":1}\nno key\n{\"k\":2}\n").await;
    assert_eq!(finished.code, Some(1));
    let ids = finished.json();
    assert_eq!(fields(&ids[0]), ["scheduled_id"]);
    assert_eq!(fields(&ids[1]), ["error", "scheduled_id"]);
    assert!(ids[0]["scheduled_id"].as_str().unwrap().starts_with("01-"), "{}", ids[0]);
    assert!(run(&test.control_url, "consume orders --group g").await.good().json().is_empty());
    let id: shardmq::ScheduledId = ids[0]["scheduled_id"].as_str().unwrap().parse().unwrap();
    let _relay = crate::support::relays::Relay::start(&test, "orders").await;
    let came = run(&test.control_url, "consume orders --group g --follow --count 2");
    let came = came.await.good().json();
    assert_eq!(came.iter().map(|line| &line["key"]).collect::<Vec<_>>(), ["1", "2"]);
    assert!(!test.cluster.cancel(id).await.unwrap());
    let refused = run_with(&test.control_url, "produce orders --delay 1y", b"").await;
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("500ms"), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peek_and_message_show_what_consume_shows_except_the_attempt() {
    let (test, ids) = with_two_messages().await;
    let peeked = run(&test.control_url, "peek orders --json").await.good().json();
    let mut consumed = run(&test.control_url, "consume orders --group g").await.good().json();
    for line in &mut consumed {
        line.as_object_mut().unwrap().remove("attempt");
    }
    assert_eq!(peeked, consumed);
    let first = ids[0]["id"].as_str().unwrap();
    let message = run(&test.control_url, &format!("message {first} --json")).await.good().json();
    assert_eq!(message, consumed[..1]);
    let after = format!("peek orders --json --after {first}");
    assert_eq!(run(&test.control_url, &after).await.good().json(), consumed[1..]);
    let limited = run(&test.control_url, "peek orders --json --count 1 --partition 10101").await;
    assert_eq!(limited.good().json(), consumed[..1]);
    let readable = run(&test.control_url, "peek orders").await.good();
    let shown = String::from_utf8(readable.stdout).unwrap();
    assert!(
        shown.contains(first) && shown.contains("key \"a\"") && shown.contains("h: \"v\""),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peek_merges_partitions_by_time() {
    let test = TestCluster::new(2).await;
    run(&test.control_url, "topic create orders --partitions 4").await.good();
    for n in 0..6 {
        let line = format!("{{\"n\":{n}}}");
        let produce = "produce orders --key-field n";
        run_with(&test.control_url, produce, line.as_bytes()).await.good();
    }
    let peeked = run(&test.control_url, "peek orders --json --count 5").await.good().json();
    let payloads: Vec<&str> = peeked.iter().map(|line| line["payload"].as_str().unwrap()).collect();
    assert_eq!(payloads, ["{\"n\":0}", "{\"n\":1}", "{\"n\":2}", "{\"n\":3}", "{\"n\":4}"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn administration_prints_an_object_a_line() {
    let (test, ids) = with_two_messages().await;
    let url = &test.control_url;
    let nodes = run(url, "node list --json").await.good().json();
    assert_eq!(nodes, [json!({"node": 1, "url": url})]);

    let topics = run(url, "topic list --json").await.good().json();
    assert_eq!(fields(&topics[0]), ["created_at", "generation", "partitions", "topic"]);
    assert!(is_time(&topics[0]["created_at"]));
    assert_eq!((&topics[0]["topic"], &topics[0]["partitions"]), (&json!("orders"), &json!(1)));

    let described = run(url, "topic describe orders --json").await.good().json();
    let partition = json!({
        "partition": 10101, "node": 1, "state": "open", "last_id": ids[1]["id"], "messages": 2
    });
    assert_eq!(described[0]["partitions"], json!([partition]));
    let created = run(url, "topic create more --partitions 2 --nodes 1 --json").await.good().json();
    assert_eq!(fields(&created[0]), fields(&described[0]));

    let migrated = run(url, "migrate --json").await.good().json();
    assert_eq!(migrated.len(), 3);
    assert_eq!(migrated[2], json!({"database": "node 01", "schema": "shardmq", "applied": []}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lag_tells_how_far_each_group_is() {
    let (test, ids) = with_two_messages().await;
    let url = &test.control_url;
    assert!(run(url, "lag --json").await.good().stdout.is_empty());
    run(url, "consume orders --group slow --count 1").await.good();
    run(url, "consume orders --group quick").await.good();
    let lags = run(url, "lag --json").await.good().json();
    let all = ["acked_id", "group", "lag", "lag_secs", "last_id", "member", "partition", "topic"];
    assert_eq!(fields(&lags[0]), all);
    let of = |group: &str| lags.iter().find(|lag| lag["group"] == group).unwrap();
    assert_eq!((&of("quick")["lag"], &of("slow")["lag"]), (&json!(0), &json!(1)));
    assert_eq!(of("slow")["acked_id"], ids[0]["id"]);
    assert!(of("slow")["lag_secs"].as_f64().unwrap() > 0.0);
    assert_eq!(run(url, "lag orders --json").await.good().json().len(), 2);
    let table = String::from_utf8(run(url, "lag").await.good().stdout).unwrap();
    assert!(table.contains("topic orders") && table.contains("total"), "{table}");
}
