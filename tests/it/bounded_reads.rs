//! What is fetched ahead is bounded by bytes, whatever the sizes of messages and batches.

use std::time::Duration;

use shardmq::{ConsumerHandle, Messages};
use tokio_postgres::Client;

use crate::support::reading::{append, append_texts, next, take, text};
use crate::support::stored::{number, table, topic};
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Waits until the readers have fetched what they may, and nobody has anything in hand.
async fn settled(handle: &ConsumerHandle, at_least: usize) -> usize {
    eventually("readers fetch ahead", 10 * SECOND, async || {
        handle.status().prefetched_bytes >= at_least
    })
    .await;
    handle.status().prefetched_bytes
}

async fn expect_sizes(messages: &mut Messages, sizes: &[usize], bound: usize) {
    let handle = messages.handle();
    for (nth, size) in sizes.iter().enumerate() {
        let delivery = next(messages).await;
        assert_eq!(delivery.payload().len(), *size, "message {nth}");
        let marked = delivery.payload().first().copied();
        assert_eq!(marked, Some(u8::try_from(nth % 251).unwrap()));
        delivery.ack().unwrap();
        let ahead = handle.status().prefetched_bytes;
        assert!(ahead <= bound, "{ahead} bytes ahead at message {nth}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_and_huge_messages_come_in_order_and_memory_is_bounded() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "mixed", 1).await[0];
    // Batches of ten bytes by the hundred, and lone messages of 4 MiB.
    let mut sizes = Vec::new();
    for _ in 0..6 {
        for batch in [vec![10; 100], vec![4 * MIB], vec![10], vec![4 * MIB, 10]] {
            let payload = |(nth, size): (usize, &usize)| {
                vec![u8::try_from((sizes.len() + nth) % 251).unwrap(); *size]
            };
            let payloads: Vec<Vec<u8>> = batch.iter().enumerate().map(payload).collect();
            append(&sql, partition, &payloads).await;
            sizes.extend(batch);
        }
    }
    let mut messages =
        test.cluster.consumer("mixed", "g").prefetch_bytes(MIB).stream().await.unwrap();
    settled(&messages.handle(), 4 * MIB).await;
    // Room for one fetch is reserved when the last of it is free; one row may exceed it.
    expect_sizes(&mut messages, &sizes, MIB + 5 * MIB).await;
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_larger_than_the_whole_budget_still_comes_and_holds_the_others_up() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "huge", 4).await;
    for partition in &partitions {
        for size in [8 * MIB, 7 * MIB] {
            append(&sql, *partition, &[vec![1; size]]).await;
        }
    }
    let mut messages =
        test.cluster.consumer("huge", "g").prefetch_bytes(64 * KIB).stream().await.unwrap();
    // One row at most for each room that fits into the budget, and never a second one on top.
    let ahead = settled(&messages.handle(), 8 * MIB).await;
    assert!(ahead <= 4 * 8 * MIB, "{ahead}");
    let mut sizes = Vec::new();
    for _ in 0..8 {
        let delivery = next(&mut messages).await;
        sizes.push((delivery.partition(), delivery.payload().len()));
        delivery.ack().unwrap();
        assert!(messages.handle().status().prefetched_bytes <= 4 * 8 * MIB);
    }
    for partition in &partitions {
        let of = sizes.iter().filter(|(id, _)| id == partition);
        let of: Vec<usize> = of.map(|(_, size)| *size).collect();
        assert_eq!(of, [8 * MIB, 7 * MIB]);
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_that_nobody_reads_stays_on_the_server() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "backlog", 3).await;
    for partition in &partitions {
        for _ in 0..40 {
            append(&sql, *partition, &vec![vec![7; KIB]; 100]).await;
        }
    }
    let builder = test.cluster.consumer("backlog", "g");
    let mut messages = builder.prefetch_bytes(MIB).stream().await.unwrap();
    let ahead = settled(&messages.handle(), MIB / 2).await;
    assert!(ahead <= MIB + 300 * KIB, "{ahead}");
    let all = 3 * 40 * 100;
    for delivery in take(&mut messages, all).await {
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    assert!(messages.next().await.is_none());
    assert_eq!(messages.handle().status().prefetched_bytes, 0);
    let lag = test.cluster.lag("backlog").await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefetch_by_count_bounds_many_small_messages() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "small", 1).await[0];
    for batch in 0..50 {
        append_texts(&sql, partition, batch * 20..(batch + 1) * 20).await;
    }
    let builder = test.cluster.consumer("small", "g");
    let mut messages = builder.prefetch_messages(1).stream().await.unwrap();
    for n in 0..1000 {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), n.to_string());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}

/// The statement itself, with parameters: at least one new row, else bounded by bytes and rows, and the
/// overlap costs nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fetch_statement_is_bounded_by_bytes_and_rows() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "plain", 1).await[0];
    let mut firsts = Vec::new();
    for size in [10, 10, 50_000, 10, 200_000, 10] {
        firsts.push(append(&sql, partition, &[vec![0; size], vec![0; 10]]).await);
    }
    let rows = async |position: i64, bytes: i64, rows: i32| {
        fetch(&sql, partition, position, bytes, rows).await
    };
    // From the very beginning: rows are taken until their sum has reached the bound.
    assert_eq!(rows(0, 1, 100).await, [(0, true)]);
    assert_eq!(rows(0, 41, 100).await, [(0, true), (1, true), (2, true)]);
    assert_eq!(rows(0, 41, 2).await, [(0, true), (1, true)]);
    // In the middle of a row: it comes whole. At its end: without its arrays, and for nothing.
    assert_eq!(rows(firsts[1], 1, 100).await, [(1, true)]);
    assert_eq!(rows(firsts[3] + 1, 1, 100).await, [(3, false), (4, true)]);
    // One new row beside the overlap, however large and however few rows are asked for.
    assert_eq!(rows(firsts[4] + 1, 1, 2).await, [(4, false), (5, true)]);
    assert_eq!(rows(firsts[5] + 1, 1_000_000, 100).await, [(5, false)]);
}

/// Which rows come (counted from 0, by twos in ids), and whether with their payloads.
async fn fetch(
    sql: &Client,
    partition: shardmq::PartitionId,
    position: i64,
    bytes: i64,
    rows: i32,
) -> Vec<(i64, bool)> {
    let day: i32 = sql
        .query_one("select day from shardmq.partition where partition = $1", &[&number(partition)])
        .await
        .unwrap()
        .get(0);
    let statement = include_str!("../../src/store/sql/fetch.sql")
        .replace("shardmq.batch_{partition}_{day}", &table(partition, day));
    let found = sql.query(&statement, &[&position, &bytes, &rows]).await.unwrap();
    let index = |id: i64| (id % 100_000_000 - 1) / 2;
    found
        .iter()
        .map(|row| (index(row.get(0)), row.get::<_, Option<Vec<Vec<u8>>>>(8).is_some()))
        .collect()
}
