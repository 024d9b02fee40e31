//! Lines in, the same lines out.

use std::collections::HashMap;
use std::path::PathBuf;

use super::{payload, run, run_with};
use crate::support::TestCluster;

/// Text that people wrote: licences, lists of files, and this project's own sources, in so many
/// lines; then lines that are awkward, the last one without a newline.
fn real_text(lines: usize) -> Vec<u8> {
    let mut files: Vec<PathBuf> = Vec::new();
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    for folder in ["/usr/share/common-licenses", own, "/var/lib/dpkg/info"] {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        files.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    }
    files.sort();
    let text: Vec<u8> = files.iter().flat_map(|file| std::fs::read(file).unwrap()).collect();
    let mut all = Vec::new();
    let rounds = (0..).flat_map(|round| {
        text.split_inclusive(|byte| *byte == b'\n').map(move |line| (round, line))
    });
    for (round, line) in rounds.take(lines) {
        if round > 0 {
            all.extend(format!("{round} ").into_bytes());
        }
        all.extend(line);
    }
    all.extend(
        b"\nwith a carriage return\r\n\r\n\n\0\xff\xfe not UTF-8\xc3\n \t\xe2\x82\xac\nthe end",
    );
    all
}

fn split(text: &[u8]) -> Vec<&[u8]> {
    text.split(|byte| *byte == b'\n').collect()
}

async fn topic(partitions: usize, nodes: u8) -> TestCluster {
    let test = TestCluster::new(nodes).await;
    let create = format!("topic create lines --partitions {partitions}");
    run(&test.control_url, &create).await.good();
    test
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_real_lines_come_out_unchanged_and_in_order() {
    let test = topic(1, 1).await;
    let input = real_text(100_000);
    let produced = run_with(&test.control_url, "produce lines", &input).await.good();
    assert!(produced.stdout.is_empty());
    let lines = split(&input);
    let summary = format!("{} messages sent to topic lines", lines.len());
    assert!(produced.stderr.contains(&summary), "{}", produced.stderr);

    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    let payloads: Vec<Vec<u8>> = consumed.json().iter().map(payload).collect();
    assert_eq!(payloads.len(), lines.len());
    let wrong = payloads.iter().zip(&lines).position(|(out, line)| out != line);
    assert_eq!(wrong, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_over_many_partitions_all_come_out_once() {
    let test = topic(6, 3).await;
    let input = real_text(20_000);
    run_with(&test.control_url, "produce lines", &input).await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    let mut payloads: Vec<Vec<u8>> = consumed.json().iter().map(payload).collect();
    let mut lines = split(&input);
    payloads.sort_unstable();
    lines.sort_unstable();
    assert!(payloads == lines);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_are_printed_in_the_order_of_the_lines() {
    let test = topic(4, 2).await;
    let input = real_text(3_000);
    let produced = run_with(&test.control_url, "produce lines --json", &input).await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    let by_id: HashMap<String, Vec<u8>> = consumed
        .json()
        .iter()
        .map(|line| (line["id"].as_str().unwrap().to_owned(), payload(line)))
        .collect();
    let ids = produced.json();
    let lines = split(&input);
    assert_eq!(ids.len(), lines.len());
    for (line, id) in lines.iter().zip(&ids) {
        assert_eq!(by_id[id["id"].as_str().unwrap()], *line);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_of_a_key_stay_in_order_and_carry_it() {
    let test = topic(8, 2).await;
    let lines: Vec<String> =
        (0..5_000).map(|n| format!("{{\"n\":{n},\"customer\":\"c{}\"}}", n % 70)).collect();
    let produce = "produce lines --key-field customer --header source=test --header empty=";
    run_with(&test.control_url, produce, lines.join("\n").as_bytes()).await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    let (mut last, mut partitions) = (HashMap::new(), HashMap::new());
    let delivered = consumed.json();
    assert_eq!(delivered.len(), 5_000);
    for line in delivered {
        let order: serde_json::Value = serde_json::from_slice(&payload(&line)).unwrap();
        let key = line["key"].as_str().unwrap().to_owned();
        assert_eq!(order["customer"], key.as_str());
        assert_eq!(line["headers"], serde_json::json!({"source": "test", "empty": ""}));
        let partition = &line["partition"];
        assert_eq!(partitions.entry(key.clone()).or_insert(partition.clone()), partition);
        let n = order["n"].as_u64().unwrap();
        assert!(last.insert(key, n).is_none_or(|before| before < n));
    }
    let used: std::collections::HashSet<_> = partitions.values().map(ToString::to_string).collect();
    assert!(used.len() > 4, "{used:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_may_want_only_some() {
    let test = topic(2, 1).await;
    for kind in ["paid", "sent"] {
        let produce = format!("produce lines --key-field k --header kind={kind} --header by=test");
        let input = b"{\"k\":\"eu/1\"}\n{\"k\":\"us/1\"}\n{\"k\":\"eu/2\"}";
        run_with(&test.control_url, &produce, input).await.good();
    }
    let consume = "consume lines --group g --header kind=paid --header by=test --key-prefix eu/";
    let consumed = run(&test.control_url, consume).await.good();
    let mut keys: Vec<String> =
        consumed.json().iter().map(|line| line["key"].as_str().unwrap().to_owned()).collect();
    keys.sort();
    assert_eq!(keys, ["eu/1", "eu/2"]);
    assert!(consumed.json().iter().all(|line| line["headers"]["kind"] == "paid"));
    // The others are done.
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    assert!(consumed.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_may_be_any_scalar() {
    let test = topic(1, 1).await;
    let input = b"{\"k\":1.50}\n{\"k\":true}\n{\"k\":null}\n{\"k\":\"a b\"}";
    run_with(&test.control_url, "produce lines --key-field k", input).await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    let keys: Vec<String> =
        consumed.json().iter().map(|line| line["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(keys, ["1.50", "true", "null", "a b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_line_is_no_message_and_an_empty_line_is_one() {
    let test = topic(1, 1).await;
    run_with(&test.control_url, "produce lines", b"").await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    assert!(consumed.stdout.is_empty());
    run_with(&test.control_url, "produce lines", b"\n").await.good();
    let consumed = run(&test.control_url, "consume lines --group g").await.good();
    assert_eq!(consumed.json()[0]["payload"], "");
    assert_eq!(consumed.json().len(), 1);
}
