//! Input outside of the limits: refused before anything is sent, and by the tables too.

use shardmq::{ErrorKind, Message, TopicOptions};
use tokio_postgres::Client;

use crate::support::TestCluster;
use crate::support::stored::{stored, table, topic};

#[tokio::test]
async fn what_is_outside_of_a_limit_is_refused_by_name_and_nothing_is_sent() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let small = test.cluster.producer("orders").max_payload(10);
    let small = small.build().await.unwrap();
    let cases = [
        (&producer, Message::new(vec![0; (4 << 20) + 1]), "4194304"),
        (&small, Message::new("12345678901"), "10"),
        (&producer, Message::new("x").key("k".repeat(1025)), "1024"),
        (&producer, Message::new("x").dedup_key("k".repeat(1025)), "dedup key has 1025 bytes"),
        (&producer, Message::new("x").dedup_key(""), "dedup key is empty"),
        (&producer, Message::new("x").dedup_key("a\0b"), "NUL"),
        (&producer, Message::new("x").header("h", "v".repeat(65_536)), "65536"),
        (&producer, Message::new("x").key("a\0b"), "NUL"),
        (&producer, Message::new("x").header("h", "a\0b"), "NUL"),
        (&producer, Message::new("x").header("a\0b", "v"), "NUL"),
        (&producer, Message::new("x").header("", "v"), "empty"),
        (&producer, Message::new("x").header("shardmq.uid", "v"), "reserved"),
    ];
    for (producer, message, words) in cases {
        let error = producer.send(message).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(stored(&sql, partition).await.is_empty());
    assert_eq!(producer.send(Message::new("good")).await.unwrap().sequence(), 1);
}

#[tokio::test]
async fn the_largest_message_goes_through_unchanged() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let producer = test.cluster.producer("orders").max_payload(6 << 20);
    let producer = producer.build().await.unwrap();
    let payload: Vec<u8> =
        (0..6_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let message = Message::new(payload.clone()).key("k".repeat(1024));
    producer.send(message.header("h", "v".repeat(65_535))).await.unwrap();
    let odd = &b"\0\xff\xfe\xc3\x28 \\x00 \0"[..];
    producer.send(Message::new(odd)).await.unwrap();
    producer.send(Message::new("")).await.unwrap();
    let keys = ["", " ", "\u{10ffff}\u{1f980}", "'; drop table x --", "{\"a\",NULL}", "NULL"];
    for key in keys {
        producer.send(Message::new("x").key(key)).await.unwrap();
    }
    // One that does not compress, as an index has it.
    let digits =
        (0..1024).map(|n: u32| char::from(33 + (n.wrapping_mul(2_654_435_761) >> 25) as u8 % 94));
    let long: String = digits.collect();
    for key in [long.as_str(), " ", "\u{10ffff}\u{1f980}", "NULL"] {
        let id = producer.send(Message::new("x").dedup_key(key)).await.unwrap();
        assert_eq!(producer.send(Message::new("x").dedup_key(key)).await.unwrap(), id);
    }
    let mut all = stored(&sql, partition).await;
    all.truncate(3 + keys.len());
    assert_eq!(all[0].payload, payload);
    assert_eq!(all[1].payload, odd);
    assert_eq!(all[2].payload, b"");
    let found: Vec<_> = all[3..].iter().map(|m| m.key.as_deref().unwrap()).collect();
    assert_eq!(found, keys);
}

#[tokio::test]
async fn bad_names_are_refused_in_few_words() {
    let test = TestCluster::new(1).await;
    let million = "x".repeat(1_000_000);
    for name in ["", "Orders", "-a", "a b", "a\0", "ä", "a;b", million.as_str(), &"a".repeat(101)]
    {
        let made = test.cluster.create_topic(name, TopicOptions::partitions(1)).await;
        let produced = test.cluster.producer(name).build().await.map(drop);
        let consumed = test.cluster.consumer(name, "g").stream().await.map(drop);
        let grouped = test.cluster.consumer("orders", name).stream().await.map(drop);
        for error in [made.map(drop), produced, consumed, grouped] {
            let error = error.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{name:.20}: {error}");
            assert!(error.to_string().contains("100"), "{error}");
            assert!(error.chain().len() < 300);
        }
    }
    let name = "a".repeat(100);
    topic(&test, &name, 1).await;
    test.cluster.producer(&name).build().await.unwrap();
}

/// Inserts straight into the day table, as a role with rights on it can.
async fn insert(sql: &Client, table: &str, values: &str) -> Result<u64, String> {
    let text = format!(
        "insert into {table} (base_id, count, bytes, appended_at, producer, sequence, keys, headers, payloads)
         select {values}"
    );
    let outcome = sql.execute(&text, &[]).await;
    outcome.map_err(|error| error.code().unwrap().code().to_owned())
}

#[tokio::test]
async fn the_tables_have_the_limits_too() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let day = "select day, shardmq.first_id(partition, day) from shardmq.partition";
    let row = sql.query_one(day, &[]).await.unwrap();
    let (day, first): (i32, i64) = (row.get(0), row.get(1));
    let table = table(partition, day);
    let (last, one) = (first + 99_999_998, "now(), gen_random_uuid(), 1");
    let good = format!("{first}, 1, 1, {one}, null, null, array['x'::bytea]");
    assert_eq!(insert(&sql, &table, &good).await, Ok(1));
    let at_end = format!("{last}, 1, 1, {one}, null, null, array['x'::bytea]");
    assert_eq!(insert(&sql, &table, &at_end).await, Ok(1));
    let next = first + 1;
    // Compressed where it comes from, so that a size on disk would look small.
    let stored = "create table public.kept (k text[], h jsonb[], p bytea[]);
        insert into public.kept values (array[repeat('k', 60000)],
            array[jsonb_build_object('h', repeat('v', 70000))], array[convert_to(repeat('p', 67108865), 'UTF8')])";
    sql.batch_execute(stored).await.unwrap();
    let refused = [
        format!("{}, 1, 1, {one}, null, null, array['x'::bytea]", first - 1),
        format!("{}, 1, 1, {one}, null, null, array['x'::bytea]", last + 1),
        format!("{last}, 2, 1, {one}, null, null, array['x', 'y']::bytea[]"),
        format!("{next}, 0, 0, {one}, null, null, array[]::bytea[]"),
        format!("{next}, 2, 0, {one}, null, null, array['x'::bytea]"),
        format!("{next}, 1, -1, {one}, null, null, array['x'::bytea]"),
        format!("{next}, 1, 1, {one}, null, null, array[null::bytea]"),
        format!("{next}, 1, 1, {one}, array['a', 'b'], null, array['x'::bytea]"),
        format!("{next}, 1, 1, {one}, array[repeat('k', 1025)], null, array['x'::bytea]"),
        format!("{next}, 1, 1, {one}, null, array['1'::jsonb], array['x'::bytea]"),
        format!(
            "{next}, 1, 1, {one}, null, array[jsonb_build_object('h', repeat('v', 65536))], array['x'::bytea]"
        ),
        format!("{next}, 1, 1, {one}, k, null, array['x'::bytea] from public.kept"),
        format!("{next}, 1, 1, {one}, null, h, array['x'::bytea] from public.kept"),
        format!("{next}, 1, 1, {one}, null, null, p from public.kept"),
    ];
    for values in refused {
        let outcome = insert(&sql, &table, &values).await;
        assert_eq!(outcome, Err("23514".to_owned()), "{values:.200}");
    }
}

/// A message that used its headers up gets ShardMQ's own where it is stored a second time.
#[tokio::test]
async fn headers_of_our_own_have_room_beside_a_senders_and_are_short() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let append = |own: &str| {
        let headers = format!("jsonb_build_object('h', repeat('v', 65535)) || '{{{own}}}'::jsonb");
        // As the library does: append() refuses them.
        format!(
            "select shardmq.append_batch(p.partition, p.topic_id, p.generation, p.day, p.day,
                 gen_random_uuid(), 1, 1, null, array[{headers}], array['x'::bytea])
               from shardmq.partition p where p.partition = {partition}"
        )
    };
    let uid = format!("{}:{}:999", uuid::Uuid::nil(), i64::MAX);
    let marks = format!(r#""shardmq.uid": "{uid}", "shardmq.duplicate": "possible""#);
    sql.batch_execute(&append(&marks)).await.unwrap();
    let long = format!(r#""shardmq.uid": "{}""#, "u".repeat(101));
    for refused in [long.as_str(), r#""other": "x""#] {
        let error = sql.batch_execute(&append(refused)).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "23514");
    }
}
