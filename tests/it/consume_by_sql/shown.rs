//! What is shown to people: the README, groups in the command.

use std::io::Write;
use std::process::{Command, Stdio};

use shardmq::embedded::Binaries;
use shardmq::{ErrorKind, Start};
use uuid::Uuid;

use super::{Ready, drain, give_back, pull, take, texts};
use crate::support::TestCluster;
use crate::support::reading::{append_texts, cursors, texts_until};
use crate::support::stored::topic;

/// Runs a script in psql, which ends at the first error; what it printed, and what it said beside that.
pub fn psql(test: &TestCluster, script: &str) -> (String, String) {
    let own = Binaries::find().unwrap().dir().join("psql");
    let program = if own.exists() { own } else { "psql".into() };
    let mut child = Command::new(program)
        .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"])
        .arg(&test.node_urls[0])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let [out, err] = [done.stdout, done.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(done.status.success(), "{out}\n{err}");
    (out, err)
}

#[tokio::test]
async fn the_readme_is_right() {
    let readme = include_str!("../../../README.md");
    let section = readme.split_once("## From psql, and from any language").unwrap().1;
    let script = section.split_once("```sql\n").unwrap().1.split_once("```").unwrap().0;
    for partitions in [4, 1] {
        let test = TestCluster::new(1).await;
        topic(&test, "orders", partitions).await;
        let (out, err) = psql(&test, script);
        let lines: Vec<&str> = out.lines().collect();
        let id: i64 = lines[0].parse().unwrap();
        let mut expected = vec![
            format!("{}", id),
            format!("{id}|c-42|{{\"cents\": 1999}}"),
            format!("{}|c-42|{{\"cents\": 5}}", id + 1),
            "t".to_owned(),
            "t".to_owned(),
        ];
        // The other consumer: all but this one, and then all.
        expected.extend((10102..10101 + partitions).map(|partition| partition.to_string()));
        expected.push("1".to_owned());
        expected.extend((10101..10101 + partitions).map(|partition| partition.to_string()));
        expected.push(partitions.to_string());
        assert_eq!(lines, expected, "{err}");
        let sql = test.sql(0).await;
        let billed: i32 =
            sql.query_one("select sum(cents)::int from bill", &[]).await.unwrap().get(0);
        assert_eq!(billed, 250);
        assert_eq!(cursors(&sql, "billing").await[0].1.acked_id, id + 2);
    }
}

/// Only the node knows the group: nobody had told the control database of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_sql_consumers_is_shown_moved_and_deleted_like_others() {
    let ready = Ready::new(2).await;
    let (sql, cluster, me) = (&ready.sql, &ready.test.cluster, Uuid::now_v7());
    append_texts(sql, ready.partitions[0], 0..5).await;
    let token = take(sql, me, 99).await.remove(0).token;
    let messages = pull(sql, &token, 2).await;
    super::ack(sql, &token, messages[1].0).await;

    let lag = cluster.lag("orders").await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).collect::<Vec<_>>(), [3, 0]);
    for topic in [None, Some("orders")] {
        let groups = cluster.groups(topic).await.unwrap();
        assert_eq!(groups.len(), 1);
        assert_eq!((groups[0].group.as_str(), groups[0].lag, groups[0].unknown), ("g", 3, 0));
    }
    let described = cluster.group("orders", "g").await.unwrap();
    assert_eq!(described.partitions[0].lag, Some(3));
    assert_eq!(described.partitions[0].member, Some(me.to_string()));

    let error = cluster.delete_group("orders", "g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    cluster.seek("orders", "g", Start::Earliest, None).await.unwrap();
    let token = take(sql, me, 99).await.remove(0).token;
    assert_eq!(drain(sql, &token, 9).await, texts(0..5));
    give_back(sql, me).await;
    cluster.delete_group("orders", "g").await.unwrap();
    assert!(cursors(sql, "g").await.is_empty());
    assert!(cluster.groups(None).await.unwrap().is_empty());
    let unknown = cluster.seek("orders", "g", Start::Earliest, None).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound);

    // A consumer of the library goes on where the others were, also where it begins.
    let token = take(sql, me, 99).await.remove(0).token;
    let messages = pull(sql, &token, 2).await;
    super::ack(sql, &token, messages[1].0).await;
    give_back(sql, me).await;
    append_texts(sql, ready.partitions[0], ["end"]).await;
    let consumer = cluster.consumer("orders", "g").start(Start::Latest);
    let mut rest = consumer.stream().await.unwrap();
    assert_eq!(texts_until(&mut rest, "end").await, texts(2..5));
    rest.shutdown(super::SECOND).await.unwrap();
}
