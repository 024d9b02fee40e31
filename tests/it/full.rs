//! The 99,999,999th message of a partition's day.

use std::time::Duration;

use shardmq::{ErrorKind, Message, PartitionId, Producer};
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::stored::{number, stored, table, topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// Leaves so many places in a partition's day, with a message at the end of what is taken.
async fn fill(sql: &Client, partition: PartitionId, day: i32, left: i64) {
    let insert = format!(
        "insert into {} (base_id, count, bytes, appended_at, producer, sequence, payloads)
         values (shardmq.first_id({partition}, {day}) + 99999998 - {left}, 1, 4, shardmq.clock(),
                 gen_random_uuid(), 1, array['fill'::bytea])",
        table(partition, day)
    );
    sql.batch_execute(&insert).await.unwrap();
}

async fn send_batch(
    producer: &Producer,
    count: usize,
    key: Option<&str>,
) -> Vec<shardmq::Result<shardmq::MessageId>> {
    let message = |n: usize| {
        let message = Message::new(n.to_string());
        key.map_or(message.clone(), |key| message.key(key))
    };
    producer.send_all((0..count).map(message)).await
}

struct Full {
    test: TestCluster,
    clocks: Clocks,
    sql: Client,
    partitions: Vec<PartitionId>,
    producer: Producer,
}

impl Full {
    async fn with(partitions: usize) -> Self {
        let test = TestCluster::new(1).await;
        let clocks = Clocks::of(&test).await;
        clocks.set("12:00").await;
        let partitions = topic(&test, "orders", partitions).await;
        let builder = test.cluster.producer("orders");
        let builder = builder.send_timeout(Duration::from_secs(10));
        let producer = clocks.on(builder).build().await.unwrap();
        let sql = test.sql(0).await;
        Self { test, clocks, sql, partitions, producer }
    }
}

#[tokio::test]
async fn the_last_place_is_used_and_the_next_message_is_refused_until_midnight() {
    let full = Full::with(1).await;
    let partition = full.partitions[0];
    fill(&full.sql, partition, full.clocks.day(0).await, 3).await;
    // A batch of five does not fit, and is refused whole.
    for outcome in send_batch(&full.producer, 5, Some("k")).await {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full);
        assert!(error.to_string().contains("PartitionFull"), "{error}");
        assert!(error.to_string().contains(&partition.to_string()), "{error}");
    }
    assert_eq!(stored(&full.sql, partition).await.len(), 1);
    let ids = send_batch(&full.producer, 3, Some("k")).await;
    let last = ids[2].as_ref().unwrap();
    assert_eq!(last.sequence(), 99_999_999);
    for key in [Some("k"), None] {
        let error = send_batch(&full.producer, 1, key).await.remove(0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full);
    }
    let by_sql = "select shardmq.append($1, array['x'::bytea])";
    let error = full.sql.query_one(by_sql, &[&number(partition)]).await.unwrap_err();
    assert!(error.as_db_error().unwrap().message().contains("full"));

    full.clocks.set("1 day 00:00:01").await;
    for key in [Some("k"), None] {
        let id = send_batch(&full.producer, 1, key).await.remove(0).unwrap();
        assert_eq!(id.day().yymmdd(), full.clocks.day(1).await.unsigned_abs());
    }
}

#[tokio::test]
async fn messages_without_a_key_go_on_in_another_partition() {
    let full = Full::with(3).await;
    for partition in &full.partitions[..2] {
        fill(&full.sql, *partition, full.clocks.day(0).await, 10).await;
    }
    for _ in 0..6 {
        for outcome in send_batch(&full.producer, 20, None).await {
            assert_eq!(outcome.unwrap().partition(), full.partitions[2]);
        }
    }
    assert_eq!(stored(&full.sql, full.partitions[2]).await.len(), 120);
    // Full for a batch of twenty; those with a key may still be few enough.
    let stored_before = stored(&full.sql, full.partitions[0]).await.len();
    for n in 0..30 {
        let key = format!("k{n}");
        send_batch(&full.producer, 1, Some(&key)).await.remove(0).ok();
    }
    assert!(stored(&full.sql, full.partitions[0]).await.len() > stored_before);

    full.clocks.set("1 day 00:00:01").await;
    let mut used = std::collections::HashSet::new();
    for _ in 0..6 {
        for outcome in send_batch(&full.producer, 20, None).await {
            used.insert(outcome.unwrap().partition());
        }
    }
    assert_eq!(used.len(), 3, "full partitions are used again the next day");
}

/// Messages that join a batch which other partitions did not take are answered too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_joins_a_batch_from_a_full_partition_is_answered() {
    let full = Full::with(4).await;
    let (open, day) = (full.partitions[3], full.clocks.day(0).await);
    for partition in &full.partitions[..3] {
        fill(&full.sql, *partition, day, 0).await;
    }
    let key = key_of(&full, open).await;
    let holder = full.test.sql(0).await;
    let mut sent = 0;
    for _ in 0..6 {
        let producer = full.clocks.on(full.test.cluster.producer("orders"));
        let producer = producer.build().await.unwrap();
        let lock = format!("begin; select shardmq.lock_partition({open})");
        holder.batch_execute(&lock).await.unwrap();
        let mut receipts = Vec::new();
        let message = Message::new("in flight").key(key.clone());
        receipts.push(producer.enqueue(message).await.unwrap());
        let waits = || async { waiting(&full.sql, open).await > 0 };
        eventually("it waits for the lock", SECOND * 5, waits).await;
        for n in 0..10 {
            let message = Message::new(n.to_string());
            receipts.push(producer.enqueue(message).await.unwrap());
            // While the partitions that are full say so.
            full.sql.query_one("select 1", &[]).await.unwrap();
        }
        holder.batch_execute("commit").await.unwrap();
        sent += receipts.len();
        for receipt in receipts {
            let id = within(20 * SECOND, "an answer", receipt).await;
            assert_eq!(id.unwrap().partition(), open);
        }
    }
    assert_eq!(stored(&full.sql, open).await.len(), sent + 1);
}

/// A key of a partition, by sending one message to it.
async fn key_of(full: &Full, partition: PartitionId) -> String {
    let rest = shardmq::SLOTS / 4;
    let key = |n: &u32| shardmq::key_slot(&n.to_string()) / rest == 3;
    let key = (0_u32..).find(key).unwrap().to_string();
    let id = full.producer.send(Message::new("x").key(key.clone())).await;
    assert_eq!(id.unwrap().partition(), partition);
    key
}
