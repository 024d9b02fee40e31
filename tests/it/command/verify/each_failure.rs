//! Each failure of a node by itself, under load: what has no key goes on through the other nodes,
//! nothing is lost or out of order, and the node is used again when it is back.
//!
//! ```text
//! all nodes take messages ─ break one ─ the others do ─ mend it ─ all do again ─ read all, and check
//! ```

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use shardmq::embedded::{Server, StopMode};
use shardmq::{Cluster, NodeId};
use tokio_postgres::Client;

use super::super::{Finished, command, finish_within};
use super::SECOND;
use crate::support::proxy::{Proxy, Rule};
use crate::support::signals::{signal, signal_all};
use crate::support::small_disk::SmallDisk;
use crate::support::{client, database, eventually, own_server, shared_server};

/// Each by itself: under way on a node that hangs, it is given up after the append timeout, asked
/// for, and sent again.
const LONGEST_SEND_MS: u64 = 8_000;
/// New ones go on as soon as the node is known to be slow or down.
const LONGEST_STALL_MS: u64 = 5_000;
/// So many that on most nodes that hang some message without a key is under way.
const PRODUCERS: i64 = 4;
/// Of each node.
const PARTITIONS: i64 = 2;
const PATIENCE: Duration = Duration::from_secs(40);

/// The node that is broken.
struct Node {
    server: Server,
    proxy: Proxy,
    /// Straight to its database.
    url: String,
}

impl Node {
    async fn start() -> Self {
        let server = own_server().await;
        let (proxy, url) = (Proxy::start(server.port()).await, database(&server).await);
        Self { server, proxy, url }
    }
}

/// Whether clients reach the node that is broken straight, or through its proxy.
#[derive(Clone, Copy)]
enum Through {
    Nothing,
    Proxy,
}

/// Three nodes on three servers. The first one's database is the control database too.
struct Fleet {
    first_url: String,
    fragile: Node,
    _third: Server,
    third_url: String,
}

impl Fleet {
    async fn start(through: Through) -> Self {
        let (first_url, fragile, third) = tokio::join!(
            async { database(shared_server().await).await },
            Node::start(),
            own_server(),
        );
        let third_url = database(&third).await;
        let cluster = Cluster::builder(&first_url).upkeep(false).connect().await.unwrap();
        let second_url = match through {
            Through::Nothing => fragile.url.clone(),
            Through::Proxy => fragile.proxy.url(&fragile.url),
        };
        for (number, url) in [(1, &first_url), (2, &second_url), (3, &third_url)] {
            cluster.add_node(NodeId::new(number).unwrap(), url).await.unwrap();
        }
        cluster.shutdown().await;
        Self { first_url, fragile, _third: third, third_url }
    }

    /// Breaks and mends the fragile node under load, and checks what came of it.
    async fn survives(
        &self,
        away: Duration,
        breaks: impl AsyncFn(&Node),
        mends: impl AsyncFn(&Node),
    ) -> Value {
        let partitions = PARTITIONS * 3;
        let arguments = format!(
            "verify --seconds 300 --rate 300 --keys 100 --producers {PRODUCERS} --partitions {partitions} --json"
        );
        let child = command(&self.first_url, &arguments).spawn().unwrap();
        let pid = child.id().unwrap();
        // Its output is read meanwhile: a full pipe would halt it.
        let finished = tokio::spawn(finish_within(5 * PATIENCE, child));
        self.take_messages(false).await;
        breaks(&self.fragile).await;
        // How long it is away is what is being tested.
        tokio::join!(tokio::time::sleep(away), self.take_messages(true));
        mends(&self.fragile).await;
        self.take_messages(false).await;
        signal(pid, "INT").await;
        judge(&finished.await.unwrap())
    }

    /// Waits until all nodes take messages without a key, or all but the fragile one.
    async fn take_messages(&self, others_only: bool) {
        let fragile = (!others_only).then_some(&self.fragile.url);
        let urls = [&self.first_url, &self.third_url].into_iter().chain(fragile);
        join_all(urls.map(|url| takes_messages(url))).await;
    }
}

/// Waits until every producer has stored messages without a key in every partition of a node, from
/// now on. What was under way before is at most one batch of each of them.
async fn takes_messages(url: &str) {
    let sql = client(url).await;
    let mut before = HashMap::new();
    for table in tables(&sql).await {
        let last = format!("select coalesce(max(base_id), 0) from {table}");
        let last: i64 = sql.query_one(&last, &[]).await.unwrap().get(0);
        before.insert(table, last);
    }
    let all = || async { lanes_after(&sql, &before).await == PRODUCERS * PARTITIONS };
    eventually("the node takes messages without a key", PATIENCE, all).await;
}

/// The tables that messages go to now.
async fn tables(sql: &Client) -> Vec<String> {
    let tables = "select format('shardmq.batch_%s_%s', partition, lpad(day::text, 6, '0'))
                    from shardmq.partition";
    sql.query(tables, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// How many lanes have stored at least three batches without keys after these last rows of tables.
async fn lanes_after(sql: &Client, before: &HashMap<String, i64>) -> i64 {
    let mut lanes = 0;
    for table in tables(sql).await {
        let count = format!(
            "select count(*) from (select from {table} where keys is null and base_id > $1
              group by producer having count(*) >= 3) lane"
        );
        let last = before.get(&table).copied().unwrap_or(0);
        lanes += sql.query_one(&count, &[&last]).await.unwrap().get::<_, i64>(0);
    }
    lanes
}

/// What must be true whatever broke.
fn judge(finished: &Finished) -> Value {
    let report: Value = finished.json().into_iter().next().unwrap_or_default();
    println!("{report}");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let count = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("{field}: {report}"));
    for field in ["violations", "lost", "out_of_order", "duplicated", "refused", "unknown"] {
        assert_eq!(count(field), 0, "{field}: {report}");
    }
    assert!(count("acknowledged") > 1_000, "{report}");
    assert!(count("longest_keyless_stall_ms") < LONGEST_STALL_MS, "{report}");
    assert!(count("longest_keyless_send_ms") < LONGEST_SEND_MS, "{report}");
    report
}

/// Nothing was stored twice, not even with a mark: the node could always be asked.
fn assert_no_copies(report: &Value) {
    assert_eq!(report["duplicated_marked"], 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_stopped() {
    let fleet = Fleet::start(Through::Nothing).await;
    let stop = async |node: &Node| node.server.stop_server(StopMode::Fast).await.unwrap();
    let start = async |node: &Node| node.server.start_server().await.unwrap();
    fleet.survives(3 * SECOND, stop, start).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed() {
    let fleet = Fleet::start(Through::Nothing).await;
    let kill = async |node: &Node| {
        signal(node.server.pid().unwrap(), "KILL").await;
        node.server.exited().await;
    };
    let start = async |node: &Node| node.server.start_server().await.unwrap();
    fleet.survives(3 * SECOND, kill, start).await;
}

/// Longer than the append timeout and the time for which it is asked what it has stored, and longer
/// than any send may take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_paused() {
    let fleet = Fleet::start(Through::Nothing).await;
    let pause = async |node: &Node| signal_all(&node.server, "STOP").await;
    let resume = async |node: &Node| signal_all(&node.server, "CONT").await;
    fleet.survives(10 * SECOND, pause, resume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_refuses_connections() {
    let fleet = Fleet::start(Through::Proxy).await;
    let refuse = async |node: &Node| {
        node.proxy.refuse(true);
        node.proxy.cut();
    };
    let accept = async |node: &Node| node.proxy.refuse(false);
    fleet.survives(3 * SECOND, refuse, accept).await;
}

/// It becomes a standby, and is promoted later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_read_only() {
    let fleet = Fleet::start(Through::Nothing).await;
    let demote = async |node: &Node| {
        node.server.stop_server(StopMode::Fast).await.unwrap();
        std::fs::write(node.server.data_dir().join("standby.signal"), "").unwrap();
        node.server.start_server().await.unwrap();
    };
    let promote = async |node: &Node| {
        let sql = client(&node.url).await;
        assert!(sql.query_one("select pg_promote()", &[]).await.unwrap().get::<_, bool>(0));
    };
    fleet.survives(3 * SECOND, demote, promote).await;
}

/// Its messages are on a disk of their own, which is full for a while. It answers everything else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_is_full() {
    let fleet = Fleet::start(Through::Nothing).await;
    let node = &fleet.fragile;
    let Some(disk) = SmallDisk::mount(&node.server, 64).await else {
        return;
    };
    let sql = client(&node.url).await;
    let (name, path) = (node.url.rsplit('/').next().unwrap(), disk.path().display());
    sql.batch_execute(&format!("create tablespace small location '{path}'")).await.unwrap();
    let default = format!("alter database {name} set default_tablespace = small");
    sql.batch_execute(&default).await.unwrap();
    let fill = async |node: &Node| {
        disk.fill();
        let refused = || async { node.server.log().contains("No space left on device") };
        eventually("the server finds its disk full", PATIENCE, refused).await;
    };
    let empty = async |_: &Node| disk.empty();
    assert_no_copies(&fleet.survives(3 * SECOND, fill, empty).await);
    drop(fleet);
}

/// Below what counts as slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_answers_after_300_ms() {
    answers_late(Duration::from_millis(300)).await;
}

/// Above what counts as slow, and below the append timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_answers_after_1_s() {
    answers_late(SECOND).await;
}

async fn answers_late(delay: Duration) {
    let fleet = Fleet::start(Through::Proxy).await;
    let slow = async |node: &Node| node.proxy.to_client(Rule::Delay(delay));
    let quick = async |node: &Node| node.proxy.to_client(Rule::Pass);
    assert_no_copies(&fleet.survives(4 * SECOND, slow, quick).await);
}
