//! A session that holds a lock for long, for which appends wait, is told by its name, once. No
//! producer is.

use std::time::Duration;

use shardmq::{Cluster, Message};
use tokio::time::interval;
use tokio_postgres::Client;
use tracing::Level;

use crate::convoy::{keys, lock};
use crate::support::said::{Said, said};
use crate::support::stored::{table, topic};
use crate::support::{TestCluster, client, eventually};

const SECOND: Duration = Duration::from_secs(1);
/// Two beats, and time for a busy machine.
const LONG: Duration = Duration::from_secs(40);

async fn pid(sql: &Client) -> i32 {
    sql.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// What was told of a session's locks.
fn told(pid: i32) -> Vec<Said> {
    let mut all = said(Level::WARN, "alert", "lock");
    all.retain(|said| said.has("pid", &pid.to_string()));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_holds_a_lock_for_long_is_told_once_and_no_producer_is() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 4).await;
    let sql = test.sql(0).await;
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    // Its lock is of a session, and of no transaction.
    let idle = client(&format!("{}?application_name=careless", test.node_urls[0])).await;
    let lock_it = format!("select pg_advisory_lock(1397247313, {})", partitions[0]);
    idle.batch_execute(&lock_it).await.unwrap();
    let open = lock(&test, &partitions[1..2]).await;
    let of_table = test.sql(0).await;
    let day = "select shardmq.day_of(shardmq.clock())";
    let name = table(partitions[2], sql.query_one(day, &[]).await.unwrap().get(0));
    of_table.batch_execute(&format!("begin; lock table {name} in share mode")).await.unwrap();
    let holders = [pid(&idle).await, pid(&open).await, pid(&of_table).await];

    let key = keys(4).remove(3);
    let load = tokio::spawn(async move {
        let mut ticks = interval(SECOND / 100);
        loop {
            ticks.tick().await;
            producer.send(Message::new("x").key(&key)).await.unwrap();
        }
    });
    let all_told = async || holders.iter().all(|pid| !told(*pid).is_empty());
    eventually("the holders are told", LONG, all_told).await;
    let first = &told(holders[0])[0];
    let lock = format!("partition {}", partitions[0]);
    assert_eq!((first.field("lock"), first.field("application")), (lock.as_str(), "careless"));
    assert_eq!((first.field("user"), first.field("client")), ("shardmq", "127.0.0.1"));
    assert!(first.field("since").starts_with("20"), "{first:?}");
    assert!(first.field("message").contains("pg_terminate_backend("), "{first:?}");
    assert_eq!(told(holders[2])[0].field("lock"), format!("table {name}"));
    // At least another look.
    let until = "select until from shardmq.upkeep";
    let until = async || sql.query_one(until, &[]).await.unwrap().get(0);
    let mut before: std::time::SystemTime = until().await;
    for _ in 0..2 {
        eventually("upkeep's next beat", LONG, async || until().await > before).await;
        before = until().await;
    }
    for pid in holders {
        assert_eq!(told(pid).len(), 1);
    }
    let ours = "select pid from pg_stat_activity
                 where datname = current_database() and application_name like 'shardmq%'";
    for row in sql.query(ours, &[]).await.unwrap() {
        assert!(told(row.get(0)).is_empty());
    }
    assert!(!load.is_finished());
    load.abort();
}

/// A role that may not see the sessions of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_role_may_not_see_of_a_session_is_left_out() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let holder = lock(&test, &partitions).await;
    let sql = test.sql(0).await;
    let role = format!("blind_{}", pid(&sql).await);
    let blind =
        format!("create role {role}; grant usage on schema shardmq to {role}; set role {role}");
    sql.batch_execute(&blind).await.unwrap();
    let look = include_str!("../../src/store/sql/lock_holders.sql");
    let rows = sql.query(look, &[]).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, String>(0), format!("partition {}", partitions[0]));
    assert_eq!(rows[0].get::<_, i32>(1), pid(&holder).await);
    assert!(!rows[0].get::<_, String>(2).is_empty());
    assert_eq!(rows[0].get::<_, Option<String>>(6), None, "it is not shown to others");
    let end = format!("reset role; drop owned by {role}; drop role {role}");
    sql.batch_execute(&end).await.unwrap();
}
