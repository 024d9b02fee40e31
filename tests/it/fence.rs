//! The statements of leases and cursors themselves: the fence tells apart who may not move a
//! cursor, and why, also where rows change at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::support::reading::{cursor, cursors, seek};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, client, eventually, within};

const SECOND: Duration = Duration::from_secs(1);
const ALL: i64 = 9;
const FLUSH: &str = include_str!("../../src/store/sql/flush.sql");
const ACQUIRE: &str = include_str!("../../src/store/sql/acquire.sql");
const RENEW: &str = include_str!("../../src/store/sql/renew.sql");
const RELEASE: &str = include_str!("../../src/store/sql/release.sql");
const MAKE_CURSORS: &str = include_str!("../../src/store/sql/make_cursors.sql");

/// The turn of the next renewal, of whichever member.
static TURN: AtomicI64 = AtomicI64::new(1);

/// What a commit names.
#[derive(Debug, Clone, Copy)]
struct Fence {
    partition: i32,
    owner: Uuid,
    epoch: i64,
    reset: i64,
}

/// A topic of so many partitions with cursors of group g.
async fn ready(partitions: usize) -> (TestCluster, Client, Vec<shardmq::PartitionId>) {
    let test = TestCluster::new(1).await;
    let made = topic(&test, "orders", partitions).await;
    let sql = test.sql(0).await;
    // None, as long as the node does not know where the group starts.
    make_cursors(&sql).await;
    assert!(cursors(&sql, "g").await.is_empty());
    let start = "insert into shardmq.group_start (topic, group_name, start_at)
                 values ('orders', 'g', '-infinity')";
    sql.batch_execute(start).await.unwrap();
    make_cursors(&sql).await;
    (test, sql, made)
}

/// The id of the one topic here.
async fn topic_id(sql: &Client) -> Uuid {
    let id = "select topic_id from shardmq.partition limit 1";
    sql.query_one(id, &[]).await.unwrap().get(0)
}

async fn make_cursors(sql: &Client) {
    let (all, id) = (Option::<i32>::None, topic_id(sql).await);
    sql.execute(MAKE_CURSORS, &[&"orders", &"g", &all, &id]).await.unwrap();
}

async fn renew(sql: &Client, member: Uuid, seconds: f64) {
    let known: Option<SystemTime> = None;
    let session: Option<&str> = None;
    let turn = TURN.fetch_add(1, Ordering::SeqCst);
    sql.query(RENEW, &[&member, &"g", &seconds, &known, &session, &known, &turn]).await.unwrap();
}

/// Asks for all that there can be, or for the first so many that are free.
async fn acquire(sql: &Client, member: Uuid, most: i64, ended_too: bool) -> Vec<Fence> {
    if most == ALL {
        let all: Vec<i32> = (10_101..=10_199).collect();
        return take(sql, member, &all, ended_too, &[]).await;
    }
    let free = "select c.partition from shardmq.cursor c
                 where c.member is null or $2 and not exists (select from shardmq.member m
                        where m.member = c.member and m.leased_until > clock_timestamp())
                 order by 1 limit $1";
    let free = sql.query(free, &[&most, &ended_too]).await.unwrap();
    let wanted: Vec<i32> = free.iter().map(|row| row.get(0)).collect();
    take(sql, member, &wanted, ended_too, &[]).await
}

/// Takes these, also those of members that have died.
async fn take(
    sql: &Client,
    member: Uuid,
    wanted: &[i32],
    ended_too: bool,
    gone: &[Uuid],
) -> Vec<Fence> {
    let (lease, dead, id) = (10.0_f64, Vec::<Uuid>::new(), topic_id(sql).await);
    let rows = sql
        .query(ACQUIRE, &[&id, &"g", &member, &wanted, &ended_too, &gone, &lease, &dead])
        .await
        .unwrap();
    rows.iter()
        .map(|row| Fence {
            partition: row.get(0),
            owner: row.get(1),
            epoch: row.get(2),
            reset: row.get(3),
        })
        .collect()
}

async fn flush(sql: &Client, fences: &[Fence], acked: i64) -> Vec<(i32, String)> {
    let partitions: Vec<i32> = fences.iter().map(|f| f.partition).collect();
    let owners: Vec<Uuid> = fences.iter().map(|f| f.owner).collect();
    let epochs: Vec<i64> = fences.iter().map(|f| f.epoch).collect();
    let resets: Vec<i64> = fences.iter().map(|f| f.reset).collect();
    let (ids, ahead) = (vec![acked; fences.len()], vec!["{}"; fences.len()]);
    let server = sql.query_one("select pg_postmaster_start_time()", &[]).await.unwrap();
    let servers: Vec<SystemTime> = vec![server.get(0); fences.len()];
    let rows = sql
        .query(FLUSH, &[&"g", &partitions, &owners, &epochs, &resets, &ids, &ahead, &servers])
        .await
        .unwrap();
    let mut outcomes: Vec<(i32, String)> =
        rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    outcomes.sort();
    outcomes
}

async fn outcome(sql: &Client, fence: Fence, acked: i64) -> String {
    let outcomes = flush(sql, &[fence], acked).await;
    assert_eq!(outcomes.len(), 1);
    outcomes[0].1.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owner_epoch_and_reset_epoch_must_all_be_right() {
    let (_test, sql, partitions) = ready(1).await;
    let member = Uuid::now_v7();
    renew(&sql, member, 10.0).await;
    let fence = acquire(&sql, member, 9, false).await[0];
    assert_eq!(outcome(&sql, fence, 10).await, "moved");
    let another = Uuid::new_v4();
    let cases = [
        (Fence { owner: another, ..fence }, "lease_lost"),
        (Fence { epoch: fence.epoch - 1, ..fence }, "lease_lost"),
        (Fence { epoch: fence.epoch + 1, ..fence }, "lease_lost"),
        (Fence { reset: fence.reset + 1, ..fence }, "reset"),
        (Fence { owner: another, reset: 7, ..fence }, "lease_lost"),
        (Fence { partition: 10_150, ..fence }, "lease_lost"),
    ];
    for (stale, expected) in cases {
        assert_eq!(outcome(&sql, stale, 99).await, expected, "{stale:?}");
    }
    assert_eq!(cursor(&sql, "g", partitions[0]).await.acked_id, 10);
    // A flush never goes back by itself.
    assert_eq!(outcome(&sql, fence, 5).await, "moved");
    assert_eq!(cursor(&sql, "g", partitions[0]).await.acked_id, 10);
    // Released: what comes late is refused.
    sql.execute(RELEASE, &[&"g", &vec![fence.partition], &vec![fence.owner]]).await.unwrap();
    assert_eq!(outcome(&sql, fence, 50).await, "lease_lost");
    // The cursor itself is gone, with its topic.
    sql.batch_execute("delete from shardmq.cursor").await.unwrap();
    assert_eq!(outcome(&sql, fence, 50).await, "lease_lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_a_transaction_has_locked_is_passed_over_and_the_others_move() {
    let (test, sql, partitions) = ready(3).await;
    let member = Uuid::now_v7();
    renew(&sql, member, 10.0).await;
    let fences = acquire(&sql, member, 9, false).await;
    let mut blocker = test.sql(0).await;
    let open = blocker.transaction().await.unwrap();
    let lock = "select from shardmq.cursor where partition = $1 for update";
    open.execute(lock, &[&fences[1].partition]).await.unwrap();
    let states = |outcomes: Vec<(i32, String)>| -> Vec<String> {
        outcomes.into_iter().map(|(_, state)| state).collect()
    };
    let passed = within(20 * SECOND, "the flush", flush(&sql, &fences, 7)).await;
    assert_eq!(states(passed), ["moved", "locked", "moved"]);
    // Neither do those who take partitions wait for it.
    let other = Uuid::now_v7();
    renew(&sql, other, 10.0).await;
    sql.batch_execute("update shardmq.member set leased_until = now() - interval '1 second'")
        .await
        .unwrap();
    renew(&sql, other, 10.0).await;
    let taken = within(20 * SECOND, "the others", acquire(&sql, other, 9, true)).await;
    assert_eq!(taken.len(), 2);
    open.commit().await.unwrap();
    assert_eq!(states(flush(&sql, &fences, 9).await), ["lease_lost", "moved", "lease_lost"]);
    assert_eq!(cursor(&sql, "g", partitions[1]).await.acked_id, 9);
}

/// What others saw is believed only where the node does not say otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_member_s_partitions_are_taken_before_its_lease_ends_unless_its_session_is_there() {
    let (test, sql, _) = ready(2).await;
    let [dead, well, taker] = [1, 2, 3].map(|_| Uuid::now_v7());
    let here = client(&format!("{}?application_name=shardmq_listen_here", test.node_urls[0])).await;
    for (member, session) in [(dead, "shardmq_listen_gone"), (well, "shardmq_listen_here")] {
        let known: Option<SystemTime> = None;
        let params: [&(dyn ToSql + Sync); 7] =
            [&member, &"g", &10.0_f64, &known, &Some(session), &known, &1_i64];
        sql.query(RENEW, &params).await.unwrap();
    }
    renew(&sql, taker, 10.0).await;
    assert_eq!(take(&sql, dead, &[10_101], false, &[]).await.len(), 1);
    assert_eq!(take(&sql, well, &[10_102], false, &[]).await.len(), 1);
    let both = [10_101, 10_102];
    assert!(take(&sql, taker, &both, true, &[]).await.is_empty(), "nobody says that they are dead");
    let up = "select pg_postmaster_start_time() < clock_timestamp() - interval '10 s'";
    let up = async || sql.query_one(up, &[]).await.unwrap().get::<_, bool>(0);
    if !up().await {
        // After a restart all sessions are new.
        assert!(take(&sql, taker, &both, false, &[dead, well]).await.is_empty());
    }
    eventually("the server is up for longer than a lease", 20 * SECOND, up).await;
    let taken = take(&sql, taker, &both, false, &[dead, well]).await;
    assert_eq!(taken.iter().map(|fence| fence.partition).collect::<Vec<_>>(), [10_101]);
    drop(here);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_leases_are_taken_only_where_that_is_asked_for_and_live_ones_never() {
    let (_test, sql, _) = ready(4).await;
    let [dead, well, late] = [1, 2, 3].map(|_| Uuid::now_v7());
    renew(&sql, dead, 10.0).await;
    renew(&sql, well, 10.0).await;
    assert_eq!(acquire(&sql, dead, 2, false).await.len(), 2);
    assert_eq!(acquire(&sql, well, 1, true).await.len(), 1);
    // Without a lease of one's own there is nothing.
    assert!(acquire(&sql, late, 9, true).await.is_empty());
    sql.execute(
        "update shardmq.member set leased_until = now() - interval '1 hour' where member = $1",
        &[&dead],
    )
    .await
    .unwrap();
    renew(&sql, late, 10.0).await;
    assert_eq!(acquire(&sql, late, 9, false).await.len(), 1, "the one without a member");
    assert_eq!(acquire(&sql, late, 9, true).await.len(), 2, "those of the dead one");
    assert!(acquire(&sql, late, 9, true).await.is_empty(), "none of the living one");
    let owners = cursors(&sql, "g").await;
    assert_eq!(owners.iter().filter(|(_, c)| c.member == Some(well)).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_take_at_once_each_partition_has_one() {
    let (test, sql, _) = ready(20).await;
    let mut first = std::collections::BTreeMap::new();
    for round in 0..5 {
        let mut takers = Vec::new();
        for nth in 0..6 {
            let client = test.sql(0).await;
            takers.push(tokio::spawn(async move {
                let member = Uuid::now_v7();
                renew(&client, member, 10.0).await;
                let mut taken = Vec::new();
                // Each partition is wanted by several, and at last by all.
                let some: Vec<i32> = (0..8).map(|n| 10_101 + (nth * 3 + n) % 20).collect();
                taken.extend(take(&client, member, &some, true, &[]).await);
                for _ in 0..4 {
                    taken.extend(acquire(&client, member, ALL, true).await);
                }
                taken
            }));
        }
        let mut all = Vec::new();
        for taker in takers {
            all.extend(taker.await.unwrap());
        }
        for taken in &all {
            let begun = first.entry(taken.partition).or_insert(taken.epoch);
            assert_eq!(taken.epoch, *begun + round, "taken twice: {taken:?}");
        }
        assert_eq!(all.len(), 20);
        let states = flush(&sql, &all, 1).await;
        assert!(states.iter().all(|(_, state)| state == "moved"), "{states:?}");
        let (ids, owners): (Vec<i32>, Vec<Uuid>) =
            all.iter().map(|f| (f.partition, f.owner)).unzip();
        sql.execute(RELEASE, &[&"g", &ids, &owners]).await.unwrap();
    }
}

/// Flushes and seeks at the same time: what a flush of an older reset epoch brings is never seen
/// after the seek.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flush_undoes_a_seek_however_they_meet() {
    let (test, sql, partitions) = ready(1).await;
    let member = Uuid::now_v7();
    renew(&sql, member, 60.0).await;
    let fence = acquire(&sql, member, 9, false).await[0];
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut flushers = Vec::new();
    for _ in 0..4 {
        let (client, stop) = (test.sql(0).await, Arc::clone(&stop));
        flushers.push(tokio::spawn(async move {
            let (mut moved, mut refused) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                let read: i64 = client
                    .query_one("select reset_epoch from shardmq.cursor", &[])
                    .await
                    .unwrap()
                    .get(0);
                // Everything this epoch moves to bears its number.
                let fence = Fence { reset: read, ..fence };
                match outcome(&client, fence, (read + 1) * 1000).await.as_str() {
                    "moved" => moved += 1,
                    "reset" => refused += 1,
                    "locked" => {}
                    other => panic!("{other}"),
                }
            }
            (moved, refused)
        }));
    }
    let until = tokio::time::Instant::now() + Duration::from_secs(2);
    while tokio::time::Instant::now() < until {
        let before = cursor(&sql, "g", partitions[0]).await;
        let to = (before.reset_epoch + 1) * 1000 + 500;
        seek(&sql, "g", partitions[0], to).await;
        let now = cursor(&sql, "g", partitions[0]).await;
        let allowed = [to, (now.reset_epoch + 1) * 1000];
        assert!(allowed.contains(&now.acked_id), "{now:?} after a seek to {to}");
    }
    stop.store(true, Ordering::Relaxed);
    let mut totals = (0, 0);
    for flusher in flushers {
        let (moved, refused) = flusher.await.unwrap();
        totals = (totals.0 + moved, totals.1 + refused);
    }
    assert!(totals.0 > 0 && totals.1 > 0, "they met: {totals:?}");
    assert_eq!(number(partitions[0]), fence.partition);
}
