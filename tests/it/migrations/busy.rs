//! Migrations of a database that is in use: nobody waits for long, and nothing is missing in
//! between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use refinery::{Migration, Runner};
use shardmq::migrate::{Schema, migrate, migrate_by};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;
use tracing::Level;

use super::empty;
use crate::support::said::said;
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, client, eventually, within};

const SOON: Duration = Duration::from_secs(20);

/// Those of a later library: all of today's, and one that alters a table which every append reads.
fn later() -> Runner {
    let mut migrations = Schema::Node.runner().get_migrations().clone();
    let sql = "alter table shardmq.partition add column later int";
    migrations.push(Migration::unapplied("V999__later", sql).unwrap());
    let mut runner = Runner::new(&migrations);
    runner.set_migration_table_name("shardmq.migration");
    runner.set_abort_missing(false)
}

/// As `pg_dump` does, and a consumer by SQL that holds what it has read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_waits_for_a_dump_lets_appends_and_publishers_go_first() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (mut dump, work) = (test.sql(0).await, test.sql(0).await);
    let dumping = dump.transaction().await.unwrap();
    dumping
        .batch_execute("set local application_name = 'a dump'; lock table shardmq.partition in access share mode")
        .await
        .unwrap();
    let url = test.node_urls[0].clone();
    let migrating =
        tokio::spawn(async move { migrate_by(&url, Schema::Node, later()).await.unwrap() });
    let told = || said(Level::WARN, "lock", "table shardmq.partition");
    let append = "select shardmq.append($1, array['x'::bytea])";
    let working = async {
        let (mut appended, number) = (0, number(partition));
        // Behind its first try, and while others follow.
        while appended < 100 || told().len() < 2 {
            assert!(!migrating.is_finished(), "it has not waited");
            work.query_one(append, &[&number]).await.unwrap();
            work.batch_execute("select shardmq.publish('orders', 'x')").await.unwrap();
            appended += 1;
        }
    };
    within(SOON, "appends and publishers go on, and the wait is told", working).await;
    let holders = |said: &crate::support::said::Said| said.field("holders").contains("a dump");
    assert!(told().iter().all(holders), "{:?}", told());
    dumping.commit().await.unwrap();
    let applied = within(SOON, "the migration", migrating).await.unwrap();
    assert_eq!(applied, ["V999__later"]);
    work.batch_execute("select later from shardmq.partition").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_says_whom_it_waits_for() {
    let url = empty("").await;
    let sql = client(&url).await;
    let hold =
        "set application_name = 'another migration'; select pg_advisory_lock(1397247313, -1)";
    sql.batch_execute(hold).await.unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command.args(["migrate", "--outbox", &url]).env_remove("SHARDMQ_URL").env_remove("RUST_LOG");
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
    let mut running = command.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(running.stderr.take().unwrap()).lines();
    let waits = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("waits for a lock") && line.contains("another migration") {
                return true;
            }
        }
        false
    };
    assert!(within(SOON, "it says so", waits).await);
    drop(sql);
    while within(SOON, "its end", lines.next_line()).await.unwrap().is_some() {}
    assert!(running.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_becomes_a_node_is_published_to_all_the_time() {
    let url = empty("").await;
    migrate(&url, Schema::Outbox).await.unwrap();
    let published = Arc::new(AtomicU64::new(0));
    let mut publishers = JoinSet::new();
    for _ in 0..2 {
        let (sql, published) = (client(&url).await, Arc::clone(&published));
        publishers.spawn(async move {
            loop {
                sql.batch_execute("select shardmq.publish('orders', 'x')").await.unwrap();
                published.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    let publish = async || published.load(Ordering::SeqCst) > 20;
    eventually("they publish", SOON, publish).await;
    migrate(&url, Schema::Node).await.unwrap();
    let before = published.load(Ordering::SeqCst);
    let publish = async || published.load(Ordering::SeqCst) > before + 20;
    eventually("they still publish", SOON, publish).await;
    assert!(publishers.try_join_next().is_none(), "one has failed");
    publishers.shutdown().await;
}
