//! Groups go on where they ended, whatever ended them.

use std::collections::HashSet;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use shardmq::{PartitionId, TopicOptions};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::{Finished, LONG, command, finish, run, run_with};
use crate::support::signals::signal;
use crate::support::{TestCluster, eventually, within};

async fn with_lines(partitions: usize, lines: usize) -> TestCluster {
    let test = TestCluster::new(1).await;
    let options = TopicOptions::partitions(partitions);
    test.cluster.create_topic("orders", options).await.unwrap();
    produce(&test, 0..lines).await;
    test
}

async fn produce(test: &TestCluster, numbers: std::ops::Range<usize>) -> Vec<Value> {
    let lines: Vec<String> = numbers.map(|n| n.to_string()).collect();
    let produce = "produce orders --json";
    run_with(&test.control_url, produce, lines.join("\n").as_bytes()).await.good().json()
}

fn numbers(finished: &Finished) -> Vec<usize> {
    let number = |line: &Value| line["payload"].as_str().unwrap().parse().unwrap();
    finished.json().iter().map(number).collect()
}

async fn lag(test: &TestCluster) -> u64 {
    test.cluster.lag("orders").await.unwrap().iter().map(|lag| lag.lag).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consuming_twice_gives_nothing_the_second_time() {
    let test = with_lines(3, 500).await;
    let first = run(&test.control_url, "consume orders --group g").await.good();
    assert_eq!(numbers(&first).into_iter().collect::<HashSet<_>>(), (0..500).collect());
    assert_eq!(numbers(&first).len(), 500);
    let second = run(&test.control_url, "consume orders --group g").await.good();
    assert!(second.stdout.is_empty());
    let other = run(&test.control_url, "consume orders --group other").await.good();
    assert_eq!(numbers(&other).len(), 500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_count_ends_after_so_many_and_the_next_run_goes_on_there() {
    let test = with_lines(1, 2_500).await;
    let part = |arguments: &str| {
        let arguments = format!("consume orders --group g {arguments}");
        let url = test.control_url.clone();
        async move { numbers(&run(&url, &arguments).await.good()) }
    };
    assert_eq!(part("--count 1").await, [0]);
    assert_eq!(part("--count 1500 --follow").await, (1..1501).collect::<Vec<_>>());
    // More than there are.
    assert_eq!(part("--count 9999").await, (1501..2500).collect::<Vec<_>>());
    assert_eq!(lag(&test).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_group_starts_where_it_is_told() {
    let test = with_lines(1, 10).await;
    let middle = produce(&test, 10..20).await.remove(0);
    let id = middle["id"].as_str().unwrap();
    let shown = run(&test.control_url, &format!("message {id} --json")).await.good().json();
    let time = shown[0]["appended_at"].as_str().unwrap();
    let from = |group: &str, from: &str| {
        let arguments = format!("consume orders --group {group} --from {from}");
        let url = test.control_url.clone();
        async move { numbers(&run(&url, &arguments).await.good()) }
    };
    let later: Vec<usize> = (10..20).collect();
    assert_eq!(from("by-id", id).await, later);
    assert_eq!(from("by-time", time).await, later);
    assert_eq!(from("latest", "latest").await, Vec::<usize>::new());
    assert_eq!(from("earliest", "earliest").await.len(), 20);
    produce(&test, 20..25).await;
    // It is not new any more.
    assert_eq!(from("latest", "earliest").await, (20..25).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_prints_what_comes_and_commits_at_a_signal() {
    for name in ["INT", "TERM"] {
        let test = with_lines(2, 20).await;
        let mut child =
            command(&test.control_url, "consume orders --group g --follow").spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut read = async |count: usize| {
            for _ in 0..count {
                within(LONG, "a line", lines.next_line()).await.unwrap().unwrap();
            }
        };
        read(20).await;
        produce(&test, 20..50).await;
        read(30).await;
        signal(child.id().unwrap(), name).await;
        let finished = finish(child).await.good();
        assert!(finished.stderr.is_empty(), "{}", finished.stderr);
        assert_eq!(lag(&test).await, 0);
        let again = run(&test.control_url, "consume orders --group g").await.good();
        assert!(again.stdout.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_is_no_error_and_loses_nothing() {
    let test = with_lines(1, 20_000).await;
    let mut child = command(&test.control_url, "consume orders --group g").spawn().unwrap();
    let mut lines = BufReader::with_capacity(1, child.stdout.take().unwrap()).lines();
    let first = within(LONG, "a line", lines.next_line()).await.unwrap().unwrap();
    assert!(first.contains("\"payload\":\"0\""), "{first}");
    drop(lines);
    let finished = finish(child).await.good();
    assert!(finished.stderr.is_empty(), "{}", finished.stderr);
    // Only what fits into the pipe, in lines of more than 220 bytes, can have been acknowledged.
    let rest = numbers(&run(&test.control_url, "consume orders --group g").await.good());
    let next = rest[0];
    assert!(next <= 300, "{next}");
    assert_eq!(rest, (next..20_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_nobody_reads_do_not_stop_the_sending() {
    let test = with_lines(1, 0).await;
    let lines: Vec<String> = (0..20_000).map(|n| n.to_string()).collect();
    let lines = lines.join("\n");
    let mut child =
        command(&test.control_url, "produce orders --json").stdin(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, lines.as_bytes()).await.unwrap();
    drop(stdin);
    finish(child).await.good();
    let consumed = run(&test.control_url, "consume orders --group g").await.good();
    assert_eq!(numbers(&consumed), (0..20_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_member_has_done_is_not_waited_for() {
    let test = with_lines(4, 400).await;
    let mut other = test.cluster.consumer("orders", "g").stream().await.unwrap();
    for _ in 0..400 {
        within(LONG, "a delivery", other.next()).await.unwrap().unwrap().ack().unwrap();
    }
    other.flush().await.unwrap();
    let ended = run(&test.control_url, "consume orders --group g");
    // Less than it waits for a member that may have died.
    let consumed = within(Duration::from_secs(15), "the end", ended).await.good();
    assert!(consumed.stdout.is_empty());
    other.shutdown(Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_member_had_in_hand_is_waited_for() {
    let test = with_lines(2, 300).await;
    let partitions: Vec<PartitionId> = test
        .cluster
        .topic("orders")
        .await
        .unwrap()
        .partitions
        .iter()
        .map(|p| p.partition)
        .collect();
    assert_eq!(partitions.len(), 2);
    let mut doomed =
        command(&test.control_url, "consume orders --group g --follow").spawn().unwrap();
    let mut lines = BufReader::new(doomed.stdout.take().unwrap()).lines();
    within(LONG, "a line", lines.next_line()).await.unwrap().unwrap();
    doomed.kill().await.unwrap();
    // Its acknowledgements were not committed within that time, or some were: none is lost.
    let left = lag(&test).await;
    let consumed = run(&test.control_url, "consume orders --group g").await.good();
    assert_eq!(numbers(&consumed).len() as u64, left);
    assert_eq!(lag(&test).await, 0);
}

/// Its cursor can't be committed, so that nothing but the journal knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_journal_a_killed_process_repeats_nothing_that_it_acknowledged() {
    let test = with_lines(1, 3_000).await;
    run(&test.control_url, "consume orders --group g --count 1").await.good();
    let mut other = test.sql(0).await;
    let folder = tempfile::tempdir().unwrap();
    let consume =
        format!("consume orders --group g --follow --journal {}", folder.path().display());
    let mut child = command(&test.control_url, &consume).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    within(LONG, "the first line", lines.next_line()).await.unwrap().unwrap();
    let open = other.transaction().await.unwrap();
    open.batch_execute("select from shardmq.cursor for update").await.unwrap();
    for _ in 2..3_000 {
        within(LONG, "all lines", lines.next_line()).await.unwrap().unwrap();
    }
    let written = || {
        let groups = std::fs::read_dir(folder.path()).unwrap().flatten();
        let files = groups.flat_map(|group| std::fs::read_dir(group.path()).unwrap().flatten());
        files.map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    eventually("all acknowledgements are written", LONG, async || written() >= 2_999 * 48).await;
    signal(child.id().unwrap(), "KILL").await;
    child.wait().await.unwrap();
    open.rollback().await.unwrap();
    produce(&test, 3_000..3_001).await;
    let consume = consume.replace("--follow", "");
    let again = run(&test.control_url, &consume).await.good();
    assert_eq!(numbers(&again), [3_000]);
    assert_eq!(lag(&test).await, 0);
}
