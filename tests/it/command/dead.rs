//! Dead letters from the command line: listed, shown, sent again, dropped.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Finished, LONG, run};
use crate::support::reading::{append_texts, next};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

/// Three letters of a group, and one of another.
async fn ready() -> TestCluster {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, ["a", "b", "c"]).await;
    for (group, count) in [("g", 3), ("h", 1)] {
        let mut messages = test.cluster.consumer("orders", group).stream().await.unwrap();
        for n in 1..=count {
            next(&mut messages).await.reject(format!("error {n}\nof {group}"));
        }
        messages.shutdown(LONG).await.unwrap();
    }
    let all = async || run(&test.control_url, "dead list --json").await.good().json().len() == 4;
    eventually("all are dead", LONG, all).await;
    test
}

fn refused(finished: &Finished, code: i32, words: &str) {
    assert_eq!(finished.code, Some(code), "{}", finished.stderr);
    assert!(finished.stderr.contains(words), "{}", finished.stderr);
}

fn fields(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_listed_and_shown_with_exactly_the_documented_fields() {
    let test = ready().await;
    let url = &test.control_url;
    let list = run(url, "dead list --json --group g").await.good().json();
    let all = ["attempts", "dead_letter", "died_at", "error", "first_seen", "group", "message"];
    assert_eq!((list.len(), fields(&list[0])), (3, all.to_vec()));
    let values = ["attempts", "dead_letter", "error", "group"].map(|name| list[0][name].clone());
    assert_eq!(json!(values), json!([1, "01-1", "error 1\nof g", "g"]));
    assert_eq!(list[0]["message"]["payload"], "a");
    let shown = run(url, "dead show 01-2 --json").await.good().json();
    assert_eq!(fields(&shown[0]["failures"][0]), ["at", "attempt", "error"]);
    assert_eq!(
        (&shown[0]["failures"][0]["attempt"], &shown[0]["message"]["payload"]),
        (&json!(1), &json!("b"))
    );

    let page = run(url, "dead list --count 3").await.good();
    let table = String::from_utf8(page.stdout).unwrap();
    assert!(table.contains("error 1 of g") && table.lines().count() == 4, "{table}");
    assert!(page.stderr.contains("--after 01-3"), "{}", page.stderr);
    let rest = run(url, "dead list --json --after 01-3").await.good().json();
    assert_eq!((rest.len(), &rest[0]["group"]), (1, &json!("h")));
    let text = String::from_utf8(run(url, "dead show 01-2").await.good().stdout).unwrap();
    assert!(
        text.contains("of group g") && text.contains("error 2") && text.contains("    b"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_sent_again_and_dropped_by_number_by_filter_or_all() {
    let test = ready().await;
    let url = &test.control_url;
    let moved = async |arguments: &str| {
        run(url, &format!("dead {arguments} --json")).await.good().json()[0].clone()
    };
    let count = |moved: u64| json!({"moved": moved, "unreachable": [], "unread": 0});
    assert_eq!(moved("retry 01-1 01-3 --group g").await, count(2));
    assert_eq!(moved("drop --error nothing").await, count(0));
    assert_eq!(moved("drop --group h").await, count(1));
    let text = run(url, "dead drop --all").await.good();
    assert_eq!(text.stdout, b"1 dead letter dropped\n");
    let again = run(url, "consume orders --group g --count 2 --follow --json").await.good().json();
    let text = |line: &Value| line["payload"].as_str().unwrap().to_owned();
    // They are due together: in whatever order.
    let texts: BTreeSet<String> = again.iter().map(text).collect();
    assert_eq!(texts, BTreeSet::from(["a".to_owned(), "c".to_owned()]));
    assert!(again.iter().all(|line| line["attempt"] == 1), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_done_has_an_exit_code_that_says_why() {
    let test = ready().await;
    let url = &test.control_url;
    let cases = [
        ("dead drop", 2, "or --all"),
        ("dead retry", 2, "or --all"),
        ("dead show 01-99", 3, "no dead letter 01-99"),
        ("dead show 99", 2, "01-42"),
        ("dead list --group G!", 2, "group name"),
    ];
    for (arguments, code, words) in cases {
        refused(&run(url, arguments).await, code, words);
    }
    assert_eq!(run(url, "dead list --json").await.good().json().len(), 4);
}
