//! Headers that only SQL can send: numbers that no machine number holds, deep arrays. They come out as the
//! server has them, and no filter passes over what it has not seen.

use std::time::Duration;

use shardmq::{DeadLetterFilter, Filter, Headers};

use crate::support::TestCluster;
use crate::support::reading::next;
use crate::support::stored::{number, topic};

const SECOND: Duration = Duration::from_secs(1);

/// Odd headers as JSON, and what becomes of each.
fn odd() -> (String, Headers) {
    let large = format!("1{}", "0".repeat(400));
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let values = [
        ("tenant", "\"acme\"", "acme"),
        ("large", "1e400", large.as_str()),
        ("deep", deep.as_str(), deep.as_str()),
        ("price", "1.10", "1.10"),
        ("id", "18446744073709551616", "18446744073709551616"),
        ("long", "12345678901234567890123", "12345678901234567890123"),
        ("list", "[1,{\"b\":null}]", "[1, {\"b\": null}]"),
        ("none", "null", "null"),
    ];
    let json: Vec<String> =
        values.iter().map(|(name, json, _)| format!("\"{name}\":{json}")).collect();
    let expected = values.iter().map(|(name, _, text)| ((*name).to_owned(), (*text).to_owned()));
    (format!("{{{}}}", json.join(",")), expected.collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_come_out_as_the_server_has_them_wherever_they_are_read() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let (json, expected) = odd();
    let append = "select shardmq.append($1, array['x'::bytea], null, array[$2::text::jsonb])";
    let id: i64 = sql.query_one(append, &[&number(partition), &json]).await.unwrap().get(0);
    let filter = Filter::header("tenant", "acme").and(Filter::header("price", "1.10"));
    let consumer = test.cluster.consumer("orders", "g").filter(filter);
    let mut messages = consumer.stream().await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!((delivery.id().number(), delivery.headers()), (id, expected.clone()));
    let stored = test.cluster.message(delivery.id()).await.unwrap().unwrap();
    assert_eq!(stored.headers, expected);
    let peeked = test.cluster.peek(partition, None, 10).await.unwrap();
    assert_eq!(peeked[0].headers, expected);
    delivery.reject("no");
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
    let letters = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 10).await.unwrap();
    assert_eq!(letters.letters[0].message.headers, expected);
    // As a copy that is tried again.
    let moved = test.cluster.retry_dead_letters(&DeadLetterFilter::default(), |_| {}).await;
    assert_eq!(moved.unwrap().moved, 1);
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(delivery.headers(), expected);
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
}
