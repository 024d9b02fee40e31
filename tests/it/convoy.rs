//! Several partitions in one commit, without waiting for each other.

use std::cell::Cell;
use std::collections::HashSet;
use std::time::Duration;

use shardmq::{Cluster, KeyFailover, Message, PartitionId, ProducerEvent, SLOTS, key_slot};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::stored::{all_stored, assert_acknowledged, stored, table, topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// A key for each of so many partitions of one node, in their order.
pub fn keys(partitions: usize) -> Vec<String> {
    let rest = usize::from(SLOTS) / partitions;
    let of = |p: usize| (0_u32..).find(|n| usize::from(key_slot(&n.to_string())) / rest == p);
    (0..partitions).map(|p| of(p).unwrap().to_string()).collect()
}

pub async fn lock(test: &TestCluster, partitions: &[PartitionId]) -> Client {
    let holder = test.sql(0).await;
    holder.batch_execute("begin").await.unwrap();
    for partition in partitions {
        let lock = format!("select shardmq.lock_partition({partition})");
        holder.batch_execute(&lock).await.unwrap();
    }
    holder
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_ready_for_several_partitions_goes_in_one_commit() {
    for _ in 0..5 {
        if let Some(transactions) = transactions_of_four().await {
            assert_eq!(transactions.len(), 2, "{transactions:?}");
            return;
        }
    }
    panic!("the machine is too busy");
}

/// The transactions of four messages for four partitions, of which three are sent while the first waits for its
/// lock. None where that may have been for so long that it gave up.
async fn transactions_of_four() -> Option<HashSet<String>> {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 4).await;
    let (keys, sql) = (keys(4), test.sql(0).await);
    let builder = Cluster::builder(&test.control_url).connections_per_node(1);
    let cluster = builder.connect().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let holder = lock(&test, &partitions[..1]).await;
    let mut receipts = Vec::new();
    receipts.push(producer.enqueue(Message::new("0").key(&keys[0])).await.unwrap());
    // When it did not wait yet.
    let before = Cell::new(Instant::now());
    let waits = || async {
        let asked = Instant::now();
        let waits = waiting(&sql, partitions[0]).await == 1;
        if !waits {
            before.set(asked);
        }
        waits
    };
    eventually("the first waits", 15 * SECOND, waits).await;
    for key in &keys[1..] {
        receipts.push(producer.enqueue(Message::new("x").key(key)).await.unwrap());
    }
    holder.batch_execute("commit").await.unwrap();
    if before.get().elapsed() > SECOND / 4 {
        return None;
    }
    let mut transactions = HashSet::new();
    for (receipt, partition) in receipts.into_iter().zip(&partitions) {
        let id = receipt.await.unwrap();
        assert_eq!(id.partition(), *partition);
        let table = table(*partition, i32::try_from(id.day().yymmdd()).unwrap());
        let xmin = format!("select xmin::text from {table}");
        transactions.insert(sql.query_one(&xmin, &[]).await.unwrap().get::<_, String>(0));
    }
    Some(transactions)
}

/// It has a lock already: what it does not get at once goes in a later transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_waits_for_one_lock_only() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let (keys, sql) = (keys(3), test.sql(0).await);
    let builder = Cluster::builder(&test.control_url).connections_per_node(1);
    let cluster = builder.connect().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let first = lock(&test, &partitions[..1]).await;
    let last = lock(&test, &partitions[2..]).await;
    let mut receipts = Vec::new();
    for (nth, key) in keys.iter().enumerate() {
        let message = Message::new("x").key(key);
        receipts.push(producer.enqueue(message).await.unwrap());
        if nth == 0 {
            let waits = || async { waiting(&sql, partitions[0]).await == 1 };
            eventually("the first waits", 20 * SECOND, waits).await;
        }
    }
    first.batch_execute("commit").await.unwrap();
    // The second and third are in one transaction: it waits for the third only when it is another.
    let waits = || async { waiting(&sql, partitions[2]).await == 1 };
    eventually("the third waits", 20 * SECOND, waits).await;
    assert_eq!(stored(&sql, partitions[1]).await.len(), 1);
    last.batch_execute("commit").await.unwrap();
    for receipt in receipts {
        within(20 * SECOND, "an answer", receipt).await.unwrap();
    }
}

/// So long as partitions are locked, the others of the node go on; then those do.
async fn others_go_on_while_locked(partitions: usize, locked: usize, warm: bool) {
    let test = TestCluster::new(1).await;
    let numbers = topic(&test, "orders", partitions).await;
    let keys = keys(partitions);
    let producer = test.cluster.producer("orders").build().await.unwrap();
    if warm {
        for key in &keys {
            producer.send(Message::new("warm").key(key)).await.unwrap();
        }
    }
    let holder = lock(&test, &numbers[..locked]).await;
    let (mut stuck, sql) = (Vec::new(), test.sql(0).await);
    for (nth, key) in keys[..locked].iter().enumerate() {
        let message = Message::new("stuck").key(key);
        stuck.push(producer.enqueue(message).await.unwrap());
        // Until both connections wait, each for a lock of its own.
        if nth < 2 {
            let waits = || async { waiting(&sql, numbers[nth]).await == 1 };
            eventually("an append waits", 20 * SECOND, waits).await;
        }
    }
    for _ in 0..3 {
        let mut receipts = Vec::new();
        for key in &keys[locked..] {
            receipts.push(producer.enqueue(Message::new("free").key(key)).await.unwrap());
        }
        for receipt in receipts {
            within(20 * SECOND, "a free partition", receipt).await.unwrap();
        }
    }
    holder.batch_execute("commit").await.unwrap();
    for receipt in stuck {
        within(20 * SECOND, "a partition that was locked", receipt).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_partition_holds_up_no_other() {
    others_go_on_while_locked(3, 1, false).await;
    others_go_on_while_locked(3, 1, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_locked_partitions_hold_up_no_other() {
    others_go_on_while_locked(6, 3, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_write_to_the_same_partitions_neither_deadlock_nor_starve() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 20).await;
    let keys = keys(20);
    let mut writers = Vec::new();
    for writer in 0..4 {
        let cluster = Cluster::connect(&test.control_url).await.unwrap();
        let keys = keys.clone();
        writers.push(tokio::spawn(async move {
            let producer = cluster.producer("orders").build().await.unwrap();
            let mut acknowledged = Vec::new();
            for round in 0..6 {
                let texts: Vec<String> = (0..60).map(|n| format!("{writer}-{round}-{n}")).collect();
                let mut messages = Vec::new();
                for (n, text) in texts.iter().enumerate() {
                    messages.push(Message::new(text.clone()).key(&keys[n % keys.len()]));
                }
                let ids = producer.send_all(messages).await;
                acknowledged.extend(texts.into_iter().zip(ids.into_iter().map(Result::unwrap)));
            }
            acknowledged
        }));
    }
    let sql = test.sql(0).await;
    let before = "select deadlocks from pg_stat_database where datname = current_database()";
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(within(20 * SECOND, "a writer", writer).await.unwrap());
    }
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 4 * 6 * 60);
    assert_acknowledged(&all, &acknowledged);
    assert_eq!(sql.query_one(before, &[]).await.unwrap().get::<_, i64>(0), 0);
}

/// Somebody has locked the day table of the second of three partitions that go in one transaction.
#[tokio::test]
async fn a_locked_day_table_holds_up_its_own_partition_only() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let (keys, sql, holder) = (keys(3), test.sql(0).await, test.sql(0).await);
    // With one connection, so that its statements are prepared.
    let builder = Cluster::builder(&test.control_url).connections_per_node(1);
    let cluster = builder.upkeep(false).connect().await.unwrap();
    let builder = cluster.producer("orders").key_failover(KeyFailover::Fail);
    let producer = builder.build().await.unwrap();
    for key in &keys {
        producer.send(Message::new("warm").key(key)).await.unwrap();
    }
    let mut events = producer.events();
    let day = "select shardmq.day_of(shardmq.clock())";
    let table = table(partitions[1], sql.query_one(day, &[]).await.unwrap().get(0));
    let lock = format!("begin; lock table {table} in access exclusive mode");
    holder.batch_execute(&lock).await.unwrap();
    let mut receipts = Vec::new();
    for key in &keys {
        receipts.push(producer.enqueue(Message::new("x").key(key)).await.unwrap());
    }
    let mut stuck = receipts.remove(1);
    for receipt in receipts {
        within(20 * SECOND, "another partition's", receipt).await.unwrap();
    }
    // It goes alone: nobody else waits for it, and at most one connection does.
    let count = "select count(*) from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock'
                    and application_name like 'shardmq%'";
    for n in 0..40 {
        for key in [&keys[0], &keys[2]] {
            let message = Message::new("y").key(key);
            let message = if n % 4 == 0 { message.dedup_key(n.to_string()) } else { message };
            within(20 * SECOND, "another partition's", producer.send(message)).await.unwrap();
        }
        assert!(sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0) <= 1);
    }
    assert!(futures_util::poll!(&mut stuck).is_pending());
    holder.batch_execute("rollback").await.unwrap();
    within(20 * SECOND, "the one that was locked", stuck).await.unwrap();
    while let Ok(Some(event)) = tokio::time::timeout(SECOND / 10, events.next()).await {
        assert!(!matches!(event, ProducerEvent::NodeDown { .. }), "{event:?}");
    }
}
