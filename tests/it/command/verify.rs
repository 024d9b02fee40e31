//! A checked workload, while the servers under it are killed: nothing is lost, skipped or repeated.

use std::time::Duration;

use serde_json::Value;
use shardmq::embedded::{Server, StopMode};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::{command, finish, finish_within, run};
use crate::support::signals::{signal, signal_all};
use crate::support::{TestCluster, database, eventually, own_server, within};

/// Each failure of a node by itself.
mod each_failure;
/// Faults that the command does itself, by a plan.
mod faults;
/// Members that leave, are killed, suspended or restarted.
mod members;
/// A server loses its tail, control loses a topic.
mod put_back;

const SECOND: Duration = Duration::from_secs(1);

/// Every documented field.
const FIELDS: [&str; 16] = [
    "acknowledged",
    "unknown",
    "delivered",
    "redelivered",
    "lost",
    "skipped",
    "out_of_order",
    "phantom",
    "duplicated",
    "duplicated_marked",
    "offset_reused",
    "longest_stall_ms",
    "longest_send_stall_ms",
    "longest_keyless_send_ms",
    "longest_keyless_stall_ms",
    "violations",
];

/// A cluster of two nodes, each on a server of its own; the control database is the first one's.
async fn two_servers() -> ([Server; 2], TestCluster) {
    let servers = [own_server().await, own_server().await];
    let urls = vec![database(&servers[0]).await, database(&servers[1]).await];
    let test = TestCluster::of(urls).await;
    (servers, test)
}

/// Numbers that look random and follow from a seed (`SplitMix64`).
pub struct Random(u64);

impl Random {
    /// With this seed.
    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    /// With the seed of `SHARDMQ_SEED`, to repeat a run that failed, or a new one.
    pub fn new() -> Self {
        let given = std::env::var("SHARDMQ_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        println!("SHARDMQ_SEED={seed}");
        Self(seed)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Kills, stops or suspends a random server at random times.
async fn break_at_random(servers: &[Server], seconds: u64) -> u32 {
    let (mut random, mut broken) = (Random::new(), 0);
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while tokio::time::Instant::now() < until {
        // What is being tested is when: the pause is the point.
        tokio::time::sleep(Duration::from_millis(500 + random.below(2_500))).await;
        let server = &servers[usize::try_from(random.below(servers.len() as u64)).unwrap()];
        let how = random.below(3);
        match how {
            0 => {
                signal(server.pid().unwrap(), "KILL").await;
                server.exited().await;
            }
            1 => server.stop_server(StopMode::Immediate).await.unwrap(),
            _ => signal_all(server, "STOP").await,
        }
        let away = if how == 2 { 4_000 } else { 1_500 };
        tokio::time::sleep(Duration::from_millis(random.below(away))).await;
        match how {
            2 => signal_all(server, "CONT").await,
            _ => server.start_server().await.unwrap(),
        }
        broken += 1;
    }
    broken
}

/// For a longer run by hand: `SHARDMQ_VERIFY_SECONDS=60`.
fn seconds() -> u64 {
    std::env::var("SHARDMQ_VERIFY_SECONDS").map_or(15, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_killed_and_suspended_at_random_cost_nothing() {
    let (servers, test) = two_servers().await;
    let seconds = seconds();
    let arguments = format!("verify --seconds {seconds} --rate 1500 --keys 100 --json");
    let mut child = command(&test.control_url, &arguments).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    // It begins on nodes that are well, or not at all.
    let begins = async {
        while !said.next_line().await.unwrap().unwrap().contains("break what you like") {}
    };
    within(30 * SECOND, "the workload begins", begins).await;
    // Its output is read meanwhile: a full pipe would halt it.
    let rest = tokio::spawn(async move {
        let mut rest = String::new();
        while let Some(line) = said.next_line().await.unwrap() {
            rest += &(line + "\n");
        }
        rest
    });
    let patience = Duration::from_secs(seconds + 120);
    let ended = finish_within(patience, child);
    // All are well at the end of the workload, or the last reading would fail. The last one broken
    // takes a while.
    let breaking = break_at_random(&servers, seconds.saturating_sub(5).max(1));
    let (broken, finished) = tokio::join!(breaking, ended);
    let said = rest.await.unwrap();
    assert_eq!(finished.code, Some(0), "{said}");
    let report: Value = finished.json().remove(0);
    println!("{broken} times broken: {report}");
    assert_eq!(report["violations"], 0, "{said}");
    for field in FIELDS {
        assert!(report[field].is_u64(), "{field}");
    }
    assert!(broken > 0 && report["acknowledged"].as_u64() > Some(1_000), "{broken}: {report}");
    // One node is there at any time, and takes what has no key.
    let stall = report["longest_send_stall_ms"].as_u64().unwrap();
    assert!(stall < 8_000, "{report}");
    let delivered = report["delivered"].as_u64().unwrap();
    assert!(delivered >= report["acknowledged"].as_u64().unwrap(), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_goes_missing_is_found() {
    let test = TestCluster::new(1).await;
    let arguments = "verify --seconds 3 --rate 500 --partitions 1 --json";
    let child = command(&test.control_url, arguments).spawn().unwrap();
    let sql = test.sql(0).await;
    let committed = || async {
        let row = "select count(*) from shardmq.cursor where acked_id % 100000000 > 100";
        sql.query_one(row, &[]).await.unwrap().get::<_, i64>(0) == 1
    };
    eventually("the group has committed something", 20 * SECOND, committed).await;
    let table =
        "select 'shardmq.batch_10101_' || day from shardmq.partition where partition = 10101";
    let table: String = sql.query_one(table, &[]).await.unwrap().get(0);
    let delete = format!(
        "delete from {table} where base_id = (select min(base_id) from {table}) returning count"
    );
    let missing: i32 = sql.query_one(&delete, &[]).await.unwrap().get(0);
    let finished = finish(child).await;
    let report = finished.json().remove(0);
    assert_eq!(finished.code, Some(1), "{report}");
    assert_eq!(report["lost"].as_i64(), Some(i64::from(missing)), "{report}");
    assert!(report["violations"].as_i64() >= Some(i64::from(missing)));
    assert!(finished.stderr.contains("violation"), "{}", finished.stderr);
    let kept = finished.stderr.lines().find_map(|line| line.split_once("the history is kept in "));
    std::fs::remove_dir_all(kept.unwrap().1).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_checked_is_said_apart() {
    let nowhere = "postgresql://127.0.0.1:1/none?user=u&connect_timeout=1";
    let finished = run(nowhere, "verify --seconds 1").await;
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);

    let (servers, test) = two_servers().await;
    let arguments = "verify --seconds 5 --wait 1 --rate 200 --partitions 2 --json";
    let child = command(&test.control_url, arguments).spawn().unwrap();
    let sql = test.sql(1).await;
    let begun = || async {
        let row = "select count(*) from shardmq.cursor where acked_id > 0";
        sql.query_one(row, &[]).await.unwrap().get::<_, i64>(0) > 0
    };
    eventually("the group has begun", 20 * SECOND, begun).await;
    servers[1].stop_server(StopMode::Immediate).await.unwrap();
    let finished = finish(child).await;
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);
    assert!(finished.stderr.contains("no answer within 1 s: of node 02"), "{}", finished.stderr);
    assert!(finished.stderr.contains("measured so far: "), "{}", finished.stderr);
    assert!(finished.stdout.is_empty());
}
