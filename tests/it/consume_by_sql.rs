//! Consuming by the functions alone, as psql and other languages do: leases, positions, refusals.

use std::time::Duration;

use tokio_postgres::{Client, Error, Row};
use uuid::Uuid;

use crate::support::clocks::Clocks;
use crate::support::reading::{append, append_texts, cursor};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually};

/// Days that end, are dropped, or are acknowledged ahead of the position.
mod days;
/// What is shown to people: the README, groups in the command.
mod shown;
/// Consumers of the library and of SQL in one group.
mod together;
/// In the caller's own transactions, and over restarts.
mod transactions;

const SECOND: Duration = Duration::from_secs(1);

/// A topic of so many partitions on a node whose clock can be moved.
struct Ready {
    test: TestCluster,
    sql: Client,
    clocks: Clocks,
    partitions: Vec<shardmq::PartitionId>,
}

impl Ready {
    async fn new(partitions: usize) -> Self {
        let test = TestCluster::new(1).await;
        let partitions = topic(&test, "orders", partitions).await;
        let clocks = Clocks::of(&test).await;
        let sql = test.sql(0).await;
        Self { test, sql, clocks, partitions }
    }
}

/// What a consumer has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Taken {
    partition: i32,
    token: String,
    acked_id: i64,
    missed: i64,
}

/// Takes or keeps up to so many partitions for group g.
async fn take(sql: &Client, member: Uuid, most: i32) -> Vec<Taken> {
    let text = "select * from shardmq.take('orders', 'g', $1, $2)";
    let rows = sql.query(text, &[&member, &most]).await.unwrap();
    let read = |row: &Row| Taken {
        partition: row.get("partition"),
        token: row.get("token"),
        acked_id: row.get("acked_id"),
        missed: row.get("missed"),
    };
    rows.iter().map(read).collect()
}

async fn try_pull(sql: &Client, token: &str, most: i32) -> Result<Vec<(i64, String)>, Error> {
    let text = "select id, convert_from(payload, 'UTF8') from shardmq.pull($1, $2)";
    let rows = sql.query(text, &[&token, &most]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn pull(sql: &Client, token: &str, most: i32) -> Vec<(i64, String)> {
    try_pull(sql, token, most).await.unwrap()
}

async fn try_ack(sql: &Client, token: &str, id: i64) -> Result<bool, Error> {
    Ok(sql.query_one("select shardmq.ack($1, $2)", &[&token, &id]).await?.get(0))
}

async fn ack(sql: &Client, token: &str, id: i64) -> bool {
    try_ack(sql, token, id).await.unwrap()
}

async fn give_back(sql: &Client, member: Uuid) -> i32 {
    let text = "select shardmq.give_back('g', $1)";
    sql.query_one(text, &[&member]).await.unwrap().get(0)
}

/// Pulls and acknowledges, so many at a time, until nothing comes; the texts.
async fn drain(sql: &Client, token: &str, most: i32) -> Vec<String> {
    let mut texts = Vec::new();
    loop {
        let messages = pull(sql, token, most).await;
        let Some((last, _)) = messages.last() else { return texts };
        assert!(ack(sql, token, *last).await);
        texts.extend(messages.into_iter().map(|(_, text)| text));
    }
}

/// The SQLSTATE and the words of a refusal.
fn refusal<T: std::fmt::Debug>(outcome: Result<T, Error>) -> (String, String) {
    let error = outcome.unwrap_err();
    let error = error.as_db_error().unwrap();
    (error.code().code().to_owned(), error.message().to_owned())
}

fn state<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    refusal(outcome).0
}

fn texts(range: impl IntoIterator<Item = usize>) -> Vec<String> {
    range.into_iter().map(|n| n.to_string()).collect()
}

/// Takes what was another's; in the first seconds of a server nobody takes over.
async fn take_over(sql: &Client, member: Uuid, most: i32) -> Vec<Taken> {
    let over = async || !take(sql, member, most).await.is_empty();
    eventually("a lease that is over is taken over", 10 * SECOND, over).await;
    take(sql, member, most).await
}

#[tokio::test]
async fn messages_come_in_order_and_again_until_they_are_acknowledged() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    append_texts(sql, partition, 0..3).await;
    append_texts(sql, partition, 3..7).await;
    let me = Uuid::now_v7();
    let token = take(sql, me, 1).await.remove(0).token;
    for most in [1, 2, 3, 4, 7, 100] {
        let got: Vec<String> = pull(sql, &token, most).await.into_iter().map(|m| m.1).collect();
        assert_eq!(got, texts(0..7.min(usize::try_from(most).unwrap())), "{most}");
    }
    let all = pull(sql, &token, 100).await;
    assert!(ack(sql, &token, all[1].0).await);
    assert!(!ack(sql, &token, all[1].0).await, "it was before");
    assert!(!ack(sql, &token, all[0].0).await, "and nothing goes back");
    assert_eq!(pull(sql, &token, 100).await, all[2..]);
    assert_eq!(take(sql, me, 1).await[0].acked_id, all[1].0);
    assert_eq!(drain(sql, &token, 2).await, texts(2..7));
    append_texts(sql, partition, 7..8).await;
    assert_eq!(drain(sql, &token, 2).await, texts(7..8));
    assert_eq!(cursor(sql, "g", partition).await.acked_ahead, "{}");
    let lag = ready.test.cluster.lag("orders").await.unwrap();
    assert!(lag.iter().all(|lag| lag.lag == 0), "{lag:?}");
}

#[tokio::test]
async fn a_message_comes_with_all_that_it_has() {
    let ready = Ready::new(1).await;
    let sql = &ready.sql;
    // With a header that the library alone sets.
    let append = "select shardmq.append_batch(p.partition, p.topic_id, p.generation, p.day, p.day,
                    gen_random_uuid(), 1, 50, array['k', null],
                    array[null, '{\"h\": \"v\", \"shardmq.uid\": \"first\"}']::jsonb[],
                    array['a', '\\x00ff']::bytea[]) from shardmq.partition p where p.partition = 10101";
    sql.batch_execute(append).await.unwrap();
    append_texts(sql, ready.partitions[0], ["alone"]).await;
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    let pulled = "select id, uid, key, headers, payload, appended_at from shardmq.pull($1)
                  except select id, uid, key, headers, payload, appended_at
                    from shardmq.messages(10101, 0, 10)";
    assert!(sql.query(pulled, &[&token]).await.unwrap().is_empty());
    let rows = sql.query("select * from shardmq.pull($1)", &[&token]).await.unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0].get::<_, Option<&str>>("key"), Some("k"));
    assert_eq!(rows[1].get::<_, &str>("uid"), "first");
    assert_eq!(rows[1].get::<_, &[u8]>("payload"), b"\0\xff");
    assert_eq!(rows[2].get::<_, Option<&str>>("key"), None);
}

#[tokio::test]
async fn consumers_share_partitions_and_two_never_have_the_same() {
    let ready = Ready::new(6).await;
    let (a, b, c) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let first = take(&ready.sql, a, 2).await;
    let others = [ready.test.sql(0).await, ready.test.sql(0).await];
    let (second, third) = tokio::join!(take(&others[0], b, 3), take(&others[1], c, 99));
    assert!(second.len() <= 3 && first.len() == 2);
    let mut all: Vec<i32> =
        first.iter().chain(&second).chain(&third).map(|taken| taken.partition).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), first.len() + second.len() + third.len());
    // What another transaction had locked in the same moment is free the next time.
    let third = take(&others[1], c, 99).await;
    assert_eq!(first.len() + second.len() + third.len(), 6);
    // Again: the same ones, also where fewer are asked for, with the same tokens.
    assert_eq!(take(&ready.sql, a, 1).await, first);
    assert_eq!(take(&ready.sql, a, 99).await, first);
    // What is given back is free for others.
    assert_eq!(give_back(&ready.sql, c).await, i32::try_from(third.len()).unwrap());
    assert_eq!(give_back(&ready.sql, c).await, 0);
    assert_eq!(take(&ready.sql, a, 99).await.len(), 2 + third.len());
    assert_eq!(state(try_ack(&ready.sql, &third[0].token, 1).await), "SMQ01");
    assert_eq!(state(try_pull(&ready.sql, &third[0].token, 1).await), "SMQ01");
}

#[tokio::test]
async fn a_consumer_that_died_is_followed_after_its_lease_and_what_it_says_later_is_refused() {
    let ready = Ready::new(2).await;
    let sql = &ready.sql;
    for partition in &ready.partitions {
        append_texts(sql, *partition, 0..4).await;
    }
    let (died, next) = (Uuid::now_v7(), Uuid::now_v7());
    let before = take(sql, died, 2).await;
    let messages = pull(sql, &before[0].token, 10).await;
    assert!(ack(sql, &before[0].token, messages[0].0).await);
    ready.clocks.move_server("20 s").await;
    assert!(take(sql, next, 2).await.is_empty(), "the lease lasts");
    ready.clocks.move_server("11 s").await;
    let after = take_over(sql, next, 1).await;
    assert_eq!(after.len(), 1);
    assert_ne!(after[0].token, before[0].token);
    for call in [
        try_ack(sql, &before[0].token, messages[3].0).await.map(|_| ()),
        try_pull(sql, &before[0].token, 1).await.map(|_| ()),
    ] {
        let (state, words) = refusal(call);
        assert_eq!(state, "SMQ01");
        assert!(words.contains("10101") && words.contains("another"), "{words}");
    }
    assert_eq!(drain(sql, &after[0].token, 2).await, texts(1..4));
    // Of the other one nobody has heard: it is not handed out any more, but what was done counts.
    let (state, words) = refusal(try_pull(sql, &before[1].token, 1).await);
    assert_eq!((state.as_str(), words.contains("over")), ("SMQ01", true), "{words}");
    let id = messages[1].0 + 100_000_000_000_000;
    assert!(ack(sql, &before[1].token, id).await);
    // It comes back: that one is still its own, with the token that it had.
    let kept = take(sql, died, 2).await;
    assert_eq!(kept.len(), 1);
    assert_eq!((&kept[0].token, kept[0].acked_id), (&before[1].token, id));
    assert_eq!(drain(sql, &kept[0].token, 9).await, texts(2..4));
}

/// In the first seconds of a server all leases may be over, and all consumers well.
#[tokio::test]
async fn a_lease_that_is_over_is_left_alone_when_the_server_has_just_been_started() {
    let ready = Ready::new(1).await;
    let sql = &ready.sql;
    let (first, second) = (Uuid::now_v7(), Uuid::now_v7());
    assert_eq!(take(sql, first, 1).await.len(), 1);
    ready.clocks.move_server("1 hour").await;
    let shorter = "do $do$ begin execute replace(
                pg_get_functiondef('shardmq.take_free'::regproc), 'interval ''5 s''', 'interval ''1 year''');
            end $do$";
    sql.batch_execute(shorter).await.unwrap();
    assert!(take(sql, second, 1).await.is_empty());
    assert_eq!(take(sql, first, 1).await.len(), 1);
}

#[tokio::test]
async fn after_a_seek_what_was_pulled_before_is_void() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    append_texts(sql, partition, 0..6).await;
    let me = Uuid::now_v7();
    let before = take(sql, me, 1).await.remove(0).token;
    let all = pull(sql, &before, 10).await;
    assert!(ack(sql, &before, all[3].0).await);
    let seek = "select shardmq.seek('orders', 'g', null, 'epoch', null, false)";
    sql.batch_execute(seek).await.unwrap();
    let (state, words) = refusal(try_ack(sql, &before, all[5].0).await);
    assert_eq!(state, "SMQ02");
    assert!(words.contains("moved") && words.contains("10101"), "{words}");
    assert_eq!(refusal(try_pull(sql, &before, 1).await).0, "SMQ02");
    let after = take(sql, me, 1).await.remove(0);
    assert_eq!((after.partition, after.acked_id), (number(partition), 0));
    assert_eq!(pull(sql, &after.token, 10).await, all);
    assert_eq!(drain(sql, &after.token, 4).await, texts(0..6));
}

#[tokio::test]
async fn a_new_group_starts_where_it_is_told_to_and_one_that_is_known_where_it_is() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    append_texts(sql, partition, 0..2).await;
    let take = "select token from shardmq.take('orders', $1, gen_random_uuid(), start => $2)";
    let late = sql.query_one(take, &[&"late", &"latest"]).await.unwrap();
    let early = sql.query_one(take, &[&"early", &"earliest"]).await.unwrap();
    append_texts(sql, partition, 2..4).await;
    assert_eq!(drain(sql, late.get(0), 10).await, texts(2..4));
    assert_eq!(drain(sql, early.get(0), 10).await, texts(0..4));
    sql.batch_execute("delete from shardmq.cursor where group_name = 'late'").await.unwrap();
    let late = sql.query_one(take, &[&"late", &"earliest"]).await.unwrap();
    assert_eq!(drain(sql, late.get(0), 10).await, texts(2..4));
}

/// A fetch costs what it brings, and not what is stored.
#[tokio::test]
async fn few_of_many_are_pulled_by_reading_little() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    let fill = "do $$ begin for n in 1 .. 6000 loop
                    perform shardmq.append(10101, array[convert_to(n::text, 'UTF8')]); end loop; end $$";
    sql.batch_execute(fill).await.unwrap();
    let rows = "select pg_relation_size(c.oid) / 8192 from pg_class c
                 where c.relname like 'batch\\_10101\\_%' order by 1 desc limit 1";
    let size: i64 = sql.query_one(rows, &[]).await.unwrap().get(0);
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    let all = pull(sql, &token, 6000).await;
    assert_eq!(all.len(), 6000);
    for (from, statistics) in [(0, false), (3000, false), (5800, true)] {
        if from > 0 {
            assert!(ack(sql, &token, all[from - 1].0).await);
        }
        if statistics {
            sql.batch_execute("analyze").await.unwrap();
        }
        assert_eq!(pull(sql, &token, 100).await, all[from..from + 100]);
        let explain = format!(
            "explain (analyze, buffers, costs off, timing off, summary off)
             select * from shardmq.pull('{token}', 100)"
        );
        let plan = sql.query(&explain, &[]).await.unwrap();
        let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
        let hits = plan.iter().find_map(|line| line.split_once("shared hit=")).expect("buffers");
        let hits: i64 = hits.1.split(' ').next().unwrap().parse().unwrap();
        assert!(size > 80 && hits < 40, "{hits} of {size}: {plan:?}");
    }
    assert_eq!(cursor(sql, "g", partition).await.acked_id, all[5799].0);
}

#[tokio::test]
async fn a_pull_is_bounded_in_bytes_and_brings_at_least_one_message() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    let mut sizes = Vec::new();
    for batch in [vec![10; 30], vec![1000], vec![400, 400, 400, 10], vec![10], vec![300, 300]] {
        let payloads: Vec<Vec<u8>> = batch.iter().map(|size| vec![b'x'; *size]).collect();
        append(sql, partition, &payloads).await;
        sizes.extend(batch);
    }
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    let mut got = Vec::new();
    let mut calls = Vec::new();
    let text = "select id, payload from shardmq.pull($1, 100, 500)";
    loop {
        let rows = sql.query(text, &[&token]).await.unwrap();
        let Some(last) = rows.last() else { break };
        assert!(ack(sql, &token, last.get(0)).await);
        let lengths: Vec<usize> = rows.iter().map(|row| row.get::<_, &[u8]>(1).len()).collect();
        calls.push(lengths.len());
        got.extend(lengths);
    }
    assert_eq!(got, sizes);
    // A row goes in whole where it is small enough: else up to the message that exceeds the bound.
    assert_eq!(calls, [30, 1, 2, 2, 1, 2]);
}

#[tokio::test]
async fn what_can_not_be_is_refused_and_says_why() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    let first = append_texts(sql, partition, 0..2).await;
    let me = Uuid::now_v7();
    let token = take(sql, me, 1).await.remove(0).token;
    let alien = token.replace("10101", "10102");
    let group = "'orders', 'g', gen_random_uuid()";
    let calls = [
        ("take('nowhere', 'g', gen_random_uuid())".to_owned(), "42704", "nowhere"),
        ("take(null, 'g', gen_random_uuid())".to_owned(), "42704", "null"),
        ("take('orders', 'No Group', gen_random_uuid())".to_owned(), "22023", "[a-z0-9]"),
        ("take('orders', repeat('g', 101), gen_random_uuid())".to_owned(), "22023", "{0,99}"),
        ("take('orders', null, gen_random_uuid())".to_owned(), "22023", "null"),
        ("take('orders', 'g', null)".to_owned(), "22023", "uuid"),
        (format!("take('orders', 'other', '{me}')"), "22023", "another group"),
        (format!("take({group}, most => 0)"), "22023", "1 to 99"),
        (format!("take({group}, most => 100)"), "22023", "1 to 99"),
        (format!("take({group}, most => null)"), "22023", "null"),
        (format!("take({group}, lease => '0.9 s')"), "22023", "10 minutes"),
        (format!("take({group}, lease => '601 s')"), "22023", "10 minutes"),
        (format!("take({group}, lease => null)"), "22023", "null"),
        (format!("take({group}, start => 'yesterday')"), "22023", "latest"),
        ("pull('nonsense')".to_owned(), "22023", "nonsense"),
        ("pull(null)".to_owned(), "22023", "null"),
        (format!("pull('{token}x')"), "22023", "no token"),
        (format!("pull('{alien}')"), "SMQ01", "10102"),
        (format!("pull('{token}', 0)"), "22023", "100000"),
        (format!("pull('{token}', 100001)"), "22023", "100000"),
        (format!("pull('{token}', null)"), "22023", "null"),
        (format!("pull('{token}', most_bytes => 0)"), "22023", "byte"),
        (format!("ack('{token}', {})", first + 2), "22023", "no message"),
        (format!("ack('{token}', {})", first + 100_000_000), "22023", "no message"),
        (format!("ack('{token}', {})", first + 100_000_000_000_000), "22023", "no message"),
        (format!("ack('{token}', 0)"), "22023", "no message 0"),
        (format!("ack('{token}', -1)"), "22023", "no message"),
        (format!("ack('{token}', null)"), "22023", "no message null"),
        (format!("ack(null, {first})"), "22023", "null"),
    ];
    for (call, expected, word) in calls {
        let (state, words) =
            refusal(sql.batch_execute(&format!("select * from shardmq.{call}")).await);
        assert_eq!((state.as_str(), words.contains(word)), (expected, true), "{call}: {words}");
    }
    // None of it has done anything.
    assert_eq!(pull(sql, &token, 10).await.len(), 2);
    assert_eq!(take(sql, Uuid::now_v7(), 99).await, []);
    let rows =
        "select (select count(*) from shardmq.group_start), (select count(*) from shardmq.cursor)";
    let rows = sql.query_one(rows, &[]).await.unwrap();
    assert_eq!((rows.get::<_, i64>(0), rows.get::<_, i64>(1)), (1, 1));
}
