//! Partitions filled by plain SQL, and streams read without a wait that is not for something.

use std::time::Duration;

use shardmq::{Delivery, Messages, PartitionId};
use tokio_postgres::Client;
use uuid::Uuid;

use super::stored::number;
use super::within;

const SOON: Duration = Duration::from_secs(15);

/// Appends one batch; returns its first id.
pub async fn append(sql: &Client, partition: PartitionId, payloads: &[Vec<u8>]) -> i64 {
    sql.query_one("select shardmq.append($1, $2)", &[&number(partition), &payloads])
        .await
        .unwrap()
        .get(0)
}

/// Appends one batch of texts; returns its first id.
pub async fn append_texts<T: ToString>(
    sql: &Client,
    partition: PartitionId,
    texts: impl IntoIterator<Item = T>,
) -> i64 {
    let payloads: Vec<Vec<u8>> =
        texts.into_iter().map(|text| text.to_string().into_bytes()).collect();
    append(sql, partition, &payloads).await
}

/// The next delivery, within some seconds.
pub async fn next(messages: &mut Messages) -> Delivery {
    within(SOON, "a delivery", messages.next())
        .await
        .expect("the stream goes on")
        .expect("a delivery")
}

/// The text of the next delivery, which is acknowledged.
pub async fn next_text(messages: &mut Messages) -> String {
    let delivery = next(messages).await;
    let text = text(&delivery);
    delivery.ack().unwrap();
    text
}

/// The next error of the stream; what is delivered before is dropped.
pub async fn next_error(messages: &mut Messages) -> shardmq::Error {
    loop {
        let next = within(SOON, "an error", messages.next()).await;
        if let Err(error) = next.expect("the stream goes on") {
            return error;
        }
    }
}

/// So many deliveries.
pub async fn take(messages: &mut Messages, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::with_capacity(count);
    while taken.len() < count {
        taken.push(next(messages).await);
    }
    taken
}

/// A delivery's payload as text.
pub fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.payload().to_vec()).unwrap()
}

/// Reads and acknowledges everything up to a message with this text; returns the texts before it.
pub async fn texts_until(messages: &mut Messages, last: &str) -> Vec<String> {
    let mut texts = Vec::new();
    loop {
        let delivery = next(messages).await;
        let text = text(&delivery);
        delivery.ack().unwrap();
        if text == last {
            return texts;
        }
        texts.push(text);
    }
}

/// A group's row for a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    pub acked_id: i64,
    pub acked_ahead: String,
    pub member: Option<Uuid>,
    pub owner: Option<Uuid>,
    pub epoch: i64,
    pub reset_epoch: i64,
}

/// All cursors of a group, by partition.
pub async fn cursors(sql: &Client, group: &str) -> Vec<(i32, Cursor)> {
    let rows = sql
        .query(
            "select partition, acked_id, acked_ahead::text, member, owner, epoch, reset_epoch
               from shardmq.cursor where group_name = $1 order by partition",
            &[&group],
        )
        .await
        .unwrap();
    let read = |row: &tokio_postgres::Row| {
        let cursor = Cursor {
            acked_id: row.get(1),
            acked_ahead: row.get(2),
            member: row.get(3),
            owner: row.get(4),
            epoch: row.get(5),
            reset_epoch: row.get(6),
        };
        (row.get(0), cursor)
    };
    rows.iter().map(read).collect()
}

/// A group's cursor in one partition.
pub async fn cursor(sql: &Client, group: &str, partition: PartitionId) -> Cursor {
    let all = cursors(sql, group).await;
    let found = all.into_iter().find(|(id, _)| *id == number(partition));
    found.expect("the group has a cursor there").1
}

/// Moves a group's position, as a seek does.
pub async fn seek(sql: &Client, group: &str, partition: PartitionId, acked_id: i64) {
    let moved = sql
        .execute(
            "update shardmq.cursor
                set acked_id = $3, acked_ahead = '{}', reset_epoch = reset_epoch + 1
              where group_name = $1 and partition = $2",
            &[&group, &number(partition), &acked_id],
        )
        .await
        .unwrap();
    assert_eq!(moved, 1, "the group has a cursor there");
}
