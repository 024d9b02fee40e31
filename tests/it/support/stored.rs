//! What is stored in a partition, read by plain SQL, and what must be true of it.

use std::collections::HashMap;
use std::time::SystemTime;

use shardmq::{MessageId, PartitionId, TopicOptions};
use tokio_postgres::Client;

use super::TestCluster;

/// A stored message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub id: MessageId,
    pub uid: String,
    pub key: Option<String>,
    pub payload: Vec<u8>,
    pub appended_at: SystemTime,
}

impl Stored {
    /// The payload of messages that are numbers.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).unwrap()
    }
}

/// Makes a topic and returns its partitions.
pub async fn topic(test: &TestCluster, name: &str, partitions: usize) -> Vec<PartitionId> {
    let options = TopicOptions::partitions(partitions);
    let made = test.cluster.create_topic(name, options).await.unwrap();
    made.partitions.iter().map(|p| p.partition).collect()
}

/// A partition's number as SQL takes it.
pub fn number(partition: PartitionId) -> i32 {
    i32::try_from(partition.number()).unwrap()
}

/// The day table of a partition.
pub fn table(partition: PartitionId, day: i32) -> String {
    format!("shardmq.batch_{partition}_{day:06}")
}

/// How many transactions wait for a partition's lock.
pub async fn waiting(sql: &Client, partition: PartitionId) -> i64 {
    locks(sql, partition, false).await
}

/// How many transactions hold a partition's lock.
pub async fn holding(sql: &Client, partition: PartitionId) -> i64 {
    locks(sql, partition, true).await
}

async fn locks(sql: &Client, partition: PartitionId, granted: bool) -> i64 {
    let count = "select count(*) from pg_locks where locktype = 'advisory' and classid = 1397247313
                    and objid = $1::bigint::oid and granted = $2
                    and database = (select oid from pg_database where datname = current_database())";
    let number = i64::from(number(partition));
    sql.query_one(count, &[&number, &granted]).await.unwrap().get(0)
}

/// Everything in a partition, in order.
pub async fn stored(sql: &Client, partition: PartitionId) -> Vec<Stored> {
    let rows = sql
        .query(
            "select id, uid, key, payload, appended_at from shardmq.messages($1, 0, 10000000)",
            &[&number(partition)],
        )
        .await
        .unwrap();
    rows.iter()
        .map(|row| Stored {
            id: MessageId::try_from(row.get::<_, i64>(0)).unwrap(),
            uid: row.get(1),
            key: row.get(2),
            payload: row.get(3),
            appended_at: row.get(4),
        })
        .collect()
}

/// Everything in some partitions.
pub async fn all_stored(sql: &Client, partitions: &[PartitionId]) -> Vec<Stored> {
    let mut all = Vec::new();
    for partition in partitions {
        let messages = stored(sql, *partition).await;
        assert_dense(&messages);
        all.extend(messages);
    }
    all
}

/// In each day the ids are 1, 2, 3 and so on, times never go back, and no uid is there twice.
pub fn assert_dense(messages: &[Stored]) {
    let mut uids = std::collections::HashSet::new();
    let mut before: Option<&Stored> = None;
    for message in messages {
        let same_day = before.filter(|b| b.id.day() == message.id.day());
        let expected = same_day.map_or(1, |b| b.id.sequence() + 1);
        assert_eq!(message.id.sequence(), expected, "{before:?} {message:?}");
        if let Some(before) = before {
            assert!(before.id < message.id && before.appended_at <= message.appended_at);
        }
        assert!(uids.insert(&message.uid), "twice: {message:?}");
        before = Some(message);
    }
}

/// Every acknowledged payload is there once, where its id says, and nothing is there twice.
pub fn assert_acknowledged(stored: &[Stored], acknowledged: &[(String, MessageId)]) {
    let mut found: HashMap<&str, MessageId> = HashMap::new();
    for message in stored {
        let twice = found.insert(message.text(), message.id);
        assert!(twice.is_none(), "{} is stored twice", message.text());
    }
    for (text, id) in acknowledged {
        assert_eq!(found.get(text.as_str()), Some(id), "{text}");
    }
}
