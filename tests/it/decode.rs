//! What is in a delivery: payloads that can't be read are no dead end, headers are text.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shardmq::{Codec, Error, ErrorKind, Message, Messages, Result, Uid};
use tokio_postgres::Client;

use crate::support::TestCluster;
use crate::support::reading::{append_texts, cursor, next};
use crate::support::stored::{number, topic};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    lines: Vec<(String, f64)>,
    note: Option<String>,
}

async fn ready() -> (TestCluster, Client, shardmq::PartitionId, Messages) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    (test, sql, partition, messages)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_come_back_as_they_were_sent() {
    let (test, _, _, mut messages) = ready().await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let order = Order {
        id: u64::MAX,
        lines: vec![("茶 \u{1F375}".to_owned(), 0.1), (String::new(), -1e300)],
        note: None,
    };
    let id = producer.send(Message::json(&order).unwrap().key("k")).await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(delivery.json::<Order>().unwrap(), order);
    assert_eq!((delivery.id(), delivery.key(), delivery.attempt()), (id, Some("k"), 1));
    assert_eq!(delivery.payload(), &delivery.payload_bytes()[..]);
    assert!(delivery.headers().is_empty());
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_can_not_be_read_says_so_and_can_be_acknowledged() {
    let (_test, sql, partition, mut messages) = ready().await;
    append_texts(&sql, partition, ["{\"id\": \"seven\"}", "not json", ""]).await;
    for _ in 0..3 {
        let delivery = next(&mut messages).await;
        let error = delivery.json::<Order>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
        assert!(!error.is_transient());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id % 100, 3);
}

/// Each letter as the next one in the alphabet, around its JSON.
struct Shifted(u8);

impl Codec for Shifted {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Bytes> {
        let json = shardmq::Json.encode(value)?;
        Ok(json.iter().map(|byte| byte.wrapping_add(self.0)).collect())
    }

    fn decode<T: DeserializeOwned>(&self, payload: &[u8]) -> Result<T> {
        let json: Vec<u8> = payload.iter().map(|byte| byte.wrapping_sub(self.0)).collect();
        serde_json::from_slice(&json)
            .map_err(|error| Error::with_source(ErrorKind::Decode, "shift a payload back", error))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_codec_of_ones_own_is_used_both_ways() {
    let (test, _, _, mut messages) = ready().await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::encoded(&Shifted(3), &vec![1, 2]).unwrap()).await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(delivery.payload(), b"^4/5`");
    assert_eq!(delivery.decode::<Vec<u32>>(&Shifted(3)).unwrap(), [1, 2]);
    let error = delivery.decode::<Vec<u32>>(&Shifted(4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_keys_that_sql_users_wrote_are_text() {
    let (test, sql, partition, mut messages) = ready().await;
    let uid = "018f3c1e-0000-7000-8000-000000000001:7:3";
    sql.execute(
        "select shardmq.append_batch(p.partition, p.topic_id, p.generation, p.day, p.day, gen_random_uuid(), 1, 100,
            array['k', null, '', 'é'],
            array[jsonb_build_object('n', 1.5, 't', true, 'z', null, 'o', '{\"a\": [1]}'::jsonb, 's', 'text'),
                  null, '{}'::jsonb, jsonb_build_object('shardmq.uid', $2::text, 'x', 'y')],
            array['a', 'b', 'c', 'd']::bytea[])
           from shardmq.partition p where p.partition = $1",
        &[&number(partition), &uid],
    )
    .await
    .unwrap();
    let mut keys = Vec::new();
    let mut headers = Vec::new();
    let mut uids = Vec::new();
    for _ in 0..4 {
        let delivery = next(&mut messages).await;
        keys.push(delivery.key().map(str::to_owned));
        headers.push(delivery.headers());
        uids.push(delivery.uid());
        let shown = test.cluster.message(delivery.id()).await.unwrap().unwrap();
        assert_eq!(shown.headers, delivery.headers());
        assert_eq!(shown.uid, delivery.uid().to_string());
        assert_eq!(shown.appended_at, delivery.appended_at());
        delivery.ack().unwrap();
    }
    let expected = [Some("k"), None, Some(""), Some("é")].map(|key| key.map(str::to_owned));
    assert_eq!(keys, expected);
    let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let first = [("n", "1.5"), ("t", "true"), ("z", "null"), ("o", "{\"a\": [1]}"), ("s", "text")];
    assert_eq!(headers[0], of(&first));
    assert_eq!(headers[1..3], [of(&[]), of(&[])]);
    assert_eq!(headers[3], of(&[("x", "y")]));
    // What was stored before under another id keeps its identity; the others are all their own.
    assert_eq!(uids[3], uid.parse::<Uid>().unwrap());
    assert!(uids[0] != uids[1] && uids[1] != uids[2]);
    messages.shutdown(SECOND).await.unwrap();
}
