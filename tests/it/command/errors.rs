//! What goes wrong is said clearly, with an exit code.

use super::{payload, run, run_with};
use crate::support::{TestCluster, shared_server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_topic_names_the_nearest() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let all = [
        "produce ordres",
        "consume ordres --group g",
        "consume ordres --group g --follow",
        "peek ordres",
        "lag ordres",
        "topic describe ordres",
        "topic delete ordres",
    ];
    for arguments in all {
        let refused = run(&test.control_url, arguments).await;
        assert_eq!(refused.code, Some(3), "{arguments}: {}", refused.stderr);
        let expected = "error: topic ordres does not exist; the nearest are orders";
        assert!(refused.stderr.contains(expected), "{arguments}: {}", refused.stderr);
        assert!(refused.stdout.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_that_leads_nowhere_is_named_without_its_password() {
    let cases = [
        ("postgresql://u:geheim@127.0.0.1:1/d", 4, "127.0.0.1:1/d"),
        ("postgresql://u:geheim@h:port/d", 2, "postgresql://user@host:port/database"),
        ("geheim", 2, "postgresql://user@host:port/database"),
        ("", 2, "SHARDMQ_URL"),
    ];
    for (url, code, text) in cases {
        let refused = run(url, "topic list").await;
        assert_eq!(refused.code, Some(code), "{url}: {}", refused.stderr);
        assert!(refused.stderr.starts_with("error: "), "{}", refused.stderr);
        assert!(refused.stderr.contains(text), "{url}: {}", refused.stderr);
        assert!(!refused.stderr.contains("geheim"), "{}", refused.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn help_tells_the_exit_codes_and_hides_the_url() {
    let help = run("postgresql://u:geheim@h/d", "--help").await.good();
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(text.contains("Exit codes:") && text.contains("SHARDMQ_URL"), "{text}");
    assert!(!text.contains("geheim"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_schema_asks_for_a_migration_which_then_helps() {
    let server = shared_server().await;
    let name = format!("bare_{}", std::process::id());
    server.create_database(&name).await.unwrap();
    let url = server.url(&name);
    let refused = run(&url, "topic list").await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("run `shardmq migrate`"), "{}", refused.stderr);
    let refused = run(&url, &format!("migrate --node {url}x")).await;
    assert_ne!(refused.code, Some(0));

    run(&url, "migrate").await.good();
    let refused = run(&url, "topic create orders --partitions 1").await;
    assert_eq!(refused.code, Some(3));
    assert!(refused.stderr.contains("shardmq node add"), "{}", refused.stderr);
    run(&url, &format!("node add 1 {url} --migrate")).await.good();
    run(&url, "topic create orders --partitions 1").await.good();
    let refused = run(&url, "topic create orders --partitions 1").await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("exists already"), "{}", refused.stderr);
    run(&url, "topic create orders --partitions 1 --if-missing").await.good();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_arguments_are_a_usage_error() {
    let test = TestCluster::new(1).await;
    let all = [
        "topic create Orders! --partitions 1",
        "topic create orders --partitions 0",
        "topic create orders --partitions 9802",
        "consume orders",
        "consume orders --group g --from tomorrow",
        "consume orders --group g --count 0",
        "produce orders --header novalue",
        "message 17",
        "node add 100 postgresql://u@h/d",
        "peek orders --partition 20101",
        "nonsense",
    ];
    for arguments in all {
        let refused = run(&test.control_url, arguments).await;
        assert_eq!(refused.code, Some(2), "{arguments}: {}", refused.stderr);
        assert!(refused.stderr.starts_with("error: "), "{arguments}: {}", refused.stderr);
        assert!(refused.stdout.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_without_a_key_are_numbered_and_the_others_sent() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let input = b"{\"k\":\"a\"}\nplain\n{\"other\":1}\n\n{\"k\":{}}\n{\"k\":\"b\"}\n";
    let produced = run_with(&test.control_url, "produce orders --key-field k --json", input).await;
    assert_eq!(produced.code, Some(1));
    for text in [
        "error: line 2: no JSON object",
        "error: line 3: the JSON object has no field \"k\"",
        "error: line 4: no JSON object",
        "error: line 5: field \"k\" is no string",
        "2 messages sent",
        "4 lines failed",
    ] {
        assert!(produced.stderr.contains(text), "{text}: {}", produced.stderr);
    }
    let ids: Vec<bool> = produced.json().iter().map(|line| line["id"].is_string()).collect();
    assert_eq!(ids, [true, false, false, false, false, true]);
    let consumed = run(&test.control_url, "consume orders --group g").await.good();
    assert_eq!(consumed.json().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_above_the_limit_is_refused_alone() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    let limit = 4 << 20;
    let mut input = b"first\n".to_vec();
    input.extend(vec![b'x'; limit + 1]);
    input.push(b'\n');
    input.extend(vec![b'y'; limit]);
    input.extend(b"\nlast");
    let produced = run_with(&test.control_url, "produce orders", &input).await;
    assert_eq!(produced.code, Some(1));
    let refusal = "error: line 2: payload has 4194305 bytes, the limit is 4194304";
    assert!(produced.stderr.contains(refusal), "{}", produced.stderr);
    let consumed = run(&test.control_url, "consume orders --group g").await.good();
    let lengths: Vec<usize> = consumed.json().iter().map(|line| payload(line).len()).collect();
    assert_eq!(lengths, [5, limit, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_exist_is_not_found() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    for arguments in ["message 1010126112200000001", "peek orders --partition 10199"] {
        let refused = run(&test.control_url, arguments).await;
        assert_eq!(refused.code, Some(3), "{arguments}: {}", refused.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_with_messages_left_is_deleted_by_force_only() {
    let test = TestCluster::new(1).await;
    run(&test.control_url, "topic create orders --partitions 1").await.good();
    run_with(&test.control_url, "produce orders", b"a\nb\n").await.good();
    run(&test.control_url, "consume orders --group g --count 1").await.good();
    let refused = run(&test.control_url, "topic delete orders").await;
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("group g has 1 messages"), "{}", refused.stderr);
    run(&test.control_url, "topic delete orders --force").await.good();
    assert!(run(&test.control_url, "topic list --json").await.good().stdout.is_empty());
}
