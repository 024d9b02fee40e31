//! A server loses the end of its log under the checked workload, or its control database a topic:
//! that is said by its name, and what was measured with it.

use serde_json::Value;
use shardmq::embedded::Server;
use tokio::process::Child;
use tokio_postgres::Client;

use super::super::{command, finish};
use super::SECOND;
use crate::support::put_back::{put_back, snapshot};
use crate::support::signals::signal;
use crate::support::{TestCluster, client, database, eventually, own_server};

/// The messages that the group has acknowledged on a node.
async fn acknowledged(sql: &Client) -> i64 {
    let sum = "select coalesce(sum(acked_id % 100000000), 0)::bigint from shardmq.cursor
                where group_name = 'verify'";
    sql.query_one(sum, &[]).await.map_or(0, |row| row.get(0))
}

/// Waits until the group has acknowledged so many messages more on a node. Connects anew each time:
/// the server is restarted meanwhile.
async fn goes_on(url: &str, more: i64) {
    let before = acknowledged(&client(url).await).await;
    let further = || async { acknowledged(&client(url).await).await >= before + more };
    eventually("the group goes on", 20 * SECOND, further).await;
}

fn start(test: &TestCluster) -> Child {
    let arguments = "verify --seconds 300 --rate 300 --keys 50 --partitions 2 --json";
    command(&test.control_url, arguments).spawn().unwrap()
}

async fn end(child: Child) -> (Option<i32>, Value, String) {
    signal(child.id().unwrap(), "INT").await;
    let finished = finish(child).await;
    let report = finished.json().into_iter().next().unwrap_or_default();
    (finished.code, report, finished.stderr)
}

/// One node without control, as an asynchronous standby that is promoted.
async fn two_servers() -> ([Server; 2], String, TestCluster) {
    let servers = [own_server().await, own_server().await];
    let urls = vec![database(&servers[0]).await, database(&servers[1]).await];
    let second = urls[1].clone();
    let test = TestCluster::of(urls).await;
    (servers, second, test)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lost_its_tail_is_said_to_have_and_all_else_is_well() {
    let ([_first, second], url, test) = two_servers().await;
    let child = start(&test);
    goes_on(&url, 200).await;
    let before = snapshot(&second).await;
    goes_on(&url, 200).await;
    put_back(&second, &before).await;
    goes_on(&url, 200).await;
    let (code, report, said) = end(child).await;
    assert_eq!(code, Some(5), "{report} {said}");
    assert_eq!(report["violations"], 0, "{report}");
    let lost = report["tail_lost"].as_u64().unwrap();
    assert!(lost >= 200, "{report}");
    let tails = report["lost_tails"].as_array().unwrap();
    let counts = tails.iter().map(|tail| tail["acknowledged"].as_u64().unwrap());
    assert_eq!(counts.sum::<u64>(), lost);
    assert!(tails.iter().all(|tail| tail["partition"] == 10_201), "{report}");
    assert!(tails[0]["from"].as_str().unwrap().starts_with("10201"), "{report}");
    assert!(said.contains("went with the end of a server's log; all else is well"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_control_has_lost_is_checked_all_the_same() {
    let test = TestCluster::new(1).await;
    let child = start(&test);
    goes_on(&test.control_url, 200).await;
    let forget = "delete from shardmq_control.topic; \
                  update shardmq_control.cluster set version = version + 1";
    client(&test.control_url).await.batch_execute(forget).await.unwrap();
    goes_on(&test.control_url, 200).await;
    let (code, report, said) = end(child).await;
    assert_eq!((code, &report["violations"]), (Some(0), &Value::from(0)), "{report} {said}");
    assert!(said.contains("the control database has lost topic verify-"), "{said}");
    assert!(report["acknowledged"].as_u64() > Some(400), "{report}");
}
