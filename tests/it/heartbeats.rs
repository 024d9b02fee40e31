//! What consumers' signs of life cost the control database: each the same, however many consumers
//! there are.

use tokio_postgres::Client;

use crate::support::TestCluster;
use crate::support::stored::topic;

const HEARTBEAT: &str = include_str!("../../src/store/sql/control_heartbeat.sql");
const SWEEP: &str = include_str!("../../src/store/sql/control_sweep.sql");

/// Adds consumers of their own groups, that have lived for a while, up to so many.
async fn broadcast_consumers(sql: &Client, count: i32) {
    let add = "with made as (
            insert into shardmq_control.consumer_group
                   (topic, group_name, start_at, from_clock, broadcast, created_at)
            select 'orders', 'b' || n, now(), true, true, now() - interval '20 minutes'
              from generate_series(1, $1::int) n on conflict do nothing returning group_name)
        insert into shardmq_control.member (member, topic, group_name, host, pid, session)
        select gen_random_uuid(), 'orders', group_name, 'h', 1, 'shardmq topology x' from made";
    sql.execute(add, &[&count]).await.unwrap();
    sql.batch_execute("vacuum analyze shardmq_control.member, shardmq_control.consumer_group")
        .await
        .unwrap();
}

/// How many blocks the server looks at for a statement that was prepared: the fewest of some times,
/// since it also looks for free room now and then.
async fn blocks(sql: &Client, call: &str) -> i64 {
    let mut fewest = i64::MAX;
    for _ in 0..5 {
        sql.batch_execute("begin").await.unwrap();
        let explain = format!("explain (analyze, buffers, format json) execute {call}");
        let plan: serde_json::Value = sql.query_one(&explain, &[]).await.unwrap().get(0);
        sql.batch_execute("rollback").await.unwrap();
        let of = |field: &str| plan[0]["Plan"][field].as_i64().unwrap();
        fewest = fewest.min(of("Shared Hit Blocks") + of("Shared Read Blocks"));
    }
    fewest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_costs_the_same_whatever_the_number_of_broadcast_consumers() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    let prepare = format!(
        "set plan_cache_mode = force_generic_plan;
         prepare beat (uuid, text, text, text, int, float8, int[], int[], int[], text, uuid) as {HEARTBEAT};
         prepare sweep as {SWEEP}"
    );
    sql.batch_execute(&prepare).await.unwrap();
    let one = "select topic_id::text, (select min(member::text) from shardmq_control.member)
                 from shardmq_control.topic";
    let mut costs = Vec::new();
    for count in [500, 1_000] {
        broadcast_consumers(&sql, count).await;
        let one = sql.query_one(one, &[]).await.unwrap();
        let (topic, member): (String, String) = (one.get(0), one.get(1));
        let beat = format!(
            "beat('{member}', 'orders', 'b1', 'h', 1, 10, null, '{{}}', '{{}}', 's', '{topic}')"
        );
        let due =
            "update shardmq_control.sweep set swept_at = clock_timestamp() - interval '1 minute'";
        sql.batch_execute(due).await.unwrap();
        costs.push((blocks(&sql, &beat).await, blocks(&sql, "sweep").await));
    }
    let [(beat, sweep), (beat_of_twice, sweep_of_twice)] = costs[..] else { unreachable!() };
    // 22 heartbeats a minute each, and one sweep.
    let all = |consumers: i64, beat: i64, sweep: i64| 22 * consumers * beat + sweep;
    let (once, twice) = (all(500, beat, sweep), all(1_000, beat_of_twice, sweep_of_twice));
    assert!(beat_of_twice <= beat + 2, "{costs:?}");
    assert!(twice * 10 <= once * 22, "{costs:?}");
    assert!(beat_of_twice < 40 && sweep_of_twice < 2_000, "{costs:?}");
}

/// The sweep is what removes what is gone, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_gone_is_swept_and_what_only_seems_so_after_a_leap_of_the_clock_is_not() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    broadcast_consumers(&sql, 3).await;
    let sweep = async |swept_before: &str| {
        let due = format!(
            "update shardmq_control.sweep set swept_at = clock_timestamp() - interval '{swept_before}'"
        );
        sql.batch_execute(&due).await.unwrap();
        sql.batch_execute(SWEEP).await.unwrap();
        let left = "select array_agg(group_name order by 1) from shardmq_control.consumer_group";
        sql.query_one(left, &[]).await.unwrap().get::<_, Vec<String>>(0)
    };
    let gone = "update shardmq_control.member set heartbeat_at = now() - interval '11 minutes'
                 where group_name in ('b1', 'b2')";
    sql.batch_execute(gone).await.unwrap();
    assert_eq!(sweep("10 seconds").await, ["b1", "b2", "b3"]);
    assert_eq!(sweep("1 hour").await, ["b1", "b2", "b3"]);
    let back = "update shardmq_control.member set heartbeat_at = now() where group_name = 'b2'";
    sql.batch_execute(back).await.unwrap();
    assert_eq!(sweep("1 minute").await, ["b2", "b3"]);
    // A consumer that has left is no member any more. Its row goes after an hour.
    let leave =
        "update shardmq_control.member set gone_at = now(), left_at = now() - $2::text::interval
                  where group_name = $1";
    let age = "update shardmq_control.consumer_group set created_at = now()";
    sql.batch_execute(age).await.unwrap();
    sql.execute(leave, &[&"b2", &"59 minutes"]).await.unwrap();
    sql.execute(leave, &[&"b3", &"61 minutes"]).await.unwrap();
    assert_eq!(sweep("1 minute").await, ["b2", "b3"]);
    let rows = "select array_agg(group_name order by 1) from shardmq_control.member
                 where left_at is not null";
    let rows: Vec<String> = sql.query_one(rows, &[]).await.unwrap().get(0);
    assert_eq!(rows, ["b2"]);
    let age =
        "update shardmq_control.consumer_group set created_at = now() - interval '11 minutes'";
    sql.batch_execute(age).await.unwrap();
    let left = "select count(*) from shardmq_control.consumer_group";
    let due = "update shardmq_control.sweep set swept_at = clock_timestamp() - interval '1 minute'";
    sql.batch_execute(due).await.unwrap();
    sql.batch_execute(SWEEP).await.unwrap();
    assert_eq!(sql.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
}
