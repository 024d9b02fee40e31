//! What a member sent before it left, and what arrives later: it does not make the member again.

use std::time::Duration;

use shardmq::Cluster;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::support::proxy::{Proxy, Rule};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);
const HEARTBEAT: &str = include_str!("../../src/store/sql/control_heartbeat.sql");
const LEAVE: &str = include_str!("../../src/store/sql/control_leave.sql");
const RENEW: &str = include_str!("../../src/store/sql/renew.sql");
const LEAVE_NODE: &str = include_str!("../../src/store/sql/leave.sql");
/// More than a look, and less than a heartbeat.
const LARGE: usize = 200;

/// A heartbeat waits in a proxy, also when its client has given it up; meanwhile its member leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_arrives_after_its_member_has_left_does_not_bring_it_back() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 4).await;
    let sql = test.sql(0).await;
    let proxy = Proxy::start(shared_server().await.port()).await;
    // With one connection, on which its statements are prepared, and nothing else to ask.
    let builder = Cluster::builder(&proxy.url(&test.control_url)).connections_per_node(1);
    let builder = builder.upkeep(false).look_interval(600 * SECOND);
    let leaves = builder.connect().await.unwrap();
    let consumer = |cluster: &Cluster| cluster.consumer("orders", "g").lease(60 * SECOND);
    let going = consumer(&leaves).stream().await.unwrap();
    let staying = consumer(&test.cluster).stream().await.unwrap();
    let (its, others) = (going.handle(), staying.handle());
    let shared = async || its.held_partitions() == 2 && others.held_partitions() == 2;
    eventually("both have their share", SOON, shared).await;

    for link in proxy.links() {
        link.to_server.set(Rule::HoldLarge(LARGE));
    }
    sql.batch_execute("select pg_notify('shardmq_group', 'orders g')").await.unwrap();
    let held = || proxy.holding(LARGE as u64);
    eventually("a heartbeat is held", SOON, async || held().is_some()).await;
    let heartbeat = held().unwrap();
    proxy.to_server_but_on(Rule::Pass, Some(&heartbeat));
    going.shutdown(Duration::ZERO).await.unwrap();
    eventually("the other has all", SOON / 3, async || others.held_partitions() == 4).await;

    heartbeat.to_server.set(Rule::Pass);
    let busy = "select count(*) from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
    let through = async || {
        // The server closes what was given up when it has come to its end.
        let done = !heartbeat.to_server.ended() || heartbeat.to_client.ended();
        let busy: i64 = sql.query_one(busy, &[]).await.unwrap().get(0);
        done && heartbeat.to_server.kept() == 0 && busy == 0
    };
    eventually("the heartbeat is through", SOON, through).await;
    // The other one's next heartbeat sees what there is.
    let beats = "select heartbeat_at from shardmq_control.member where member = $1";
    let member = Uuid::parse_str(&others.member().to_string()).unwrap();
    let at = async || sql.query_one(beats, &[&member]).await.unwrap().get(0);
    let before: std::time::SystemTime = at().await;
    sql.batch_execute("select pg_notify('shardmq_group', 'orders g')").await.unwrap();
    eventually("a heartbeat", SOON, async || at().await > before).await;
    let members = test.cluster.group("orders", "g").await.unwrap().members;
    let members: Vec<_> = members.iter().map(|member| member.member.clone()).collect();
    assert_eq!(members, [others.member().to_string()]);
    assert_eq!(others.held_partitions(), 4);

    staying.shutdown(Duration::ZERO).await.unwrap();
    test.cluster.delete_group("orders", "g").await.unwrap();
}

async fn topic_id(sql: &Client) -> Uuid {
    let id = "select topic_id from shardmq_control.topic";
    sql.query_one(id, &[]).await.unwrap().get(0)
}

/// The heartbeat of a member; how many members it is told of.
async fn beat(sql: &Client, member: Uuid) -> usize {
    let (none, session) = (Vec::<i32>::new(), Option::<&str>::None);
    let (only, topic) = (Option::<Vec<i32>>::None, topic_id(sql).await);
    let params: [&(dyn ToSql + Sync); 11] =
        [&member, &"orders", &"g", &"h", &1_i32, &10.0_f64, &only, &none, &none, &session, &topic];
    sql.query(HEARTBEAT, &params).await.unwrap().len()
}

/// Also the first of all its heartbeats, one under way while the group is deleted, and one of a
/// member that others had left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_heartbeat_of_a_member_counts_after_it_has_left() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    let id = topic_id(&sql).await;
    let [stays, first, silent] = [1, 2, 3].map(|_| Uuid::now_v7());
    let leave = async |member: Uuid| {
        sql.execute(LEAVE, &[&member, &"orders", &"g", &id]).await.unwrap();
    };
    leave(first).await;
    beat(&sql, first).await;
    assert_eq!(beat(&sql, stays).await, 1);
    assert_eq!(beat(&sql, silent).await, 2);
    let bury = "update shardmq_control.member set gone_at = now() where member = $1";
    sql.execute(bury, &[&silent]).await.unwrap();
    // Whom others have left out by mistake is back.
    beat(&sql, silent).await;
    let gone = "select gone_at is not null from shardmq_control.member where member = $1";
    let is_gone = async || sql.query_one(gone, &[&silent]).await.unwrap().get::<_, bool>(0);
    assert!(!is_gone().await);
    leave(silent).await;
    leave(silent).await;
    beat(&sql, silent).await;
    assert!(is_gone().await);
    assert_eq!(beat(&sql, stays).await, 1);
    leave(stays).await;
    let make =
        "insert into shardmq_control.consumer_group (topic, group_name, start_at, from_clock)
                values ('orders', 'g', now(), true)";
    sql.batch_execute(make).await.unwrap();
    test.cluster.delete_group("orders", "g").await.unwrap();
    beat(&sql, stays).await;
    beat(&sql, first).await;
    assert_eq!(beat(&sql, Uuid::now_v7()).await, 1);
}

/// On a node a member comes back: what it sent before it left is void, what it sends later counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_that_arrives_after_a_lease_was_ended_does_not_begin_it_again() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let (member, never) = (Uuid::now_v7(), Uuid::now_v7());
    let renew = async |member: Uuid, turn: i64| {
        let (known, session) = (Option::<std::time::SystemTime>::None, Option::<&str>::None);
        let params: [&(dyn ToSql + Sync); 7] =
            [&member, &"g", &10.0_f64, &known, &session, &known, &turn];
        sql.query(RENEW, &params).await.unwrap();
    };
    let leave = async |member: Uuid, turn: i64| {
        sql.execute(LEAVE_NODE, &[&member, &"g", &turn]).await.unwrap();
    };
    let live = async |member: Uuid| {
        let live = "select shardmq.is_live(m) from shardmq.member m where m.member = $1";
        sql.query_opt(live, &[&member]).await.unwrap().is_some_and(|row| row.get(0))
    };
    renew(member, 1).await;
    assert!(live(member).await);
    leave(member, 3).await;
    renew(member, 2).await;
    assert!(!live(member).await, "it has left");
    renew(member, 4).await;
    leave(member, 3).await;
    assert!(live(member).await, "it is back");
    // The first renewal of all, which makes the row.
    leave(never, 2).await;
    renew(never, 1).await;
    assert!(!live(never).await);
    // What has left is kept for an hour.
    let sweep = include_str!("../../src/store/sql/sweep_members.sql");
    let rows = "select count(*) from shardmq.member";
    for (aged, left) in [("59 minutes", 2), ("2 minutes", 1)] {
        let age = format!("update shardmq.member set left_at = left_at - interval '{aged}'");
        sql.batch_execute(&age).await.unwrap();
        sql.batch_execute(sweep).await.unwrap();
        assert_eq!(sql.query_one(rows, &[]).await.unwrap().get::<_, i64>(0), left);
    }
}
