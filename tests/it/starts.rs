//! Where a group starts: resolved once, to a time, and kept on every node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use shardmq::{Message, MessageId, Messages, PartitionId, Start};
use tokio_postgres::Client;

use crate::support::reading::{append_texts, cursor, next, next_text, take, text, texts_until};
use crate::support::stored::{number, stored, topic};
use crate::support::{TestCluster, database, eventually, own_server, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

async fn consume(test: &TestCluster, group: &str, start: Start) -> Messages {
    let builder = test.cluster.consumer("orders", group).start(start);
    builder.stream().await.unwrap()
}

/// Everything that a group reads of some partitions up to a message "end" in each, which it also
/// appends.
async fn rest(sql: &Client, partitions: &[PartitionId], messages: &mut Messages) -> Vec<String> {
    for partition in partitions {
        append_texts(sql, *partition, ["end"]).await;
    }
    let mut texts = Vec::new();
    for _ in partitions {
        texts.extend(texts_until(messages, "end").await);
    }
    texts.sort();
    texts
}

async fn times(sql: &Client, partition: PartitionId) -> Vec<(MessageId, SystemTime)> {
    let all = stored(sql, partition).await;
    all.into_iter().map(|m| (m.id, m.appended_at)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn earliest_latest_a_time_and_an_id_start_where_they_say() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let [a, b] = [partitions[0], partitions[1]];
    // In turn, so that the times of both interleave.
    for n in 0..3 {
        append_texts(&sql, a, [format!("a{n}"), format!("a{n}+")]).await;
        append_texts(&sql, b, [format!("b{n}"), format!("b{n}+")]).await;
    }
    let ids = times(&sql, a).await;
    let starts = [
        (
            "earliest",
            Start::Earliest,
            &["a0", "a0+", "a1", "a1+", "a2", "a2+", "b0", "b0+", "b1", "b1+", "b2", "b2+"][..],
        ),
        ("latest", Start::Latest, &[]),
        ("time", Start::At(ids[2].1), &["a1", "a1+", "a2", "a2+", "b1", "b1+", "b2", "b2+"]),
        (
            "between",
            Start::At(ids[2].1 + Duration::from_micros(1)),
            &["a2", "a2+", "b1", "b1+", "b2", "b2+"],
        ),
        // Exact in its own partition, in the middle of a batch; the batch's time in the other.
        ("id", Start::Id(ids[3].0), &["a1+", "a2", "a2+", "b1", "b1+", "b2", "b2+"]),
        (
            "past",
            Start::At(SystemTime::UNIX_EPOCH),
            &["a0", "a0+", "a1", "a1+", "a2", "a2+", "b0", "b0+", "b1", "b1+", "b2", "b2+"],
        ),
    ];
    let mut streams = Vec::new();
    for (group, start, _) in starts {
        let mut messages = consume(&test, group, start).await;
        eventually("both are taken", 20 * SECOND, async || {
            messages.handle().held_partitions() == 2
        })
        .await;
        messages.flush().await.unwrap();
        streams.push((group, messages.shutdown(SECOND).await));
        assert!(messages.next().await.is_none());
    }
    for partition in partitions {
        append_texts(&sql, partition, ["end"]).await;
    }
    for (group, start, expected) in starts {
        let mut messages = consume(&test, group, start).await;
        let mut texts = texts_until(&mut messages, "end").await;
        texts.extend(texts_until(&mut messages, "end").await);
        texts.sort();
        assert_eq!(texts, expected, "{group}");
        messages.shutdown(SECOND).await.unwrap();
    }
    assert!(streams.into_iter().all(|(_, outcome)| outcome.is_ok()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_start_counts_and_later_ones_move_nothing() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    let (one, two) = (test.sql(0).await, test.sql(1).await);
    append_texts(&one, partitions[0], ["old"]).await;
    append_texts(&two, partitions[1], ["old"]).await;
    // Resolved when the stream is made, before it owns anything.
    drop(consume(&test, "g", Start::Latest).await);
    append_texts(&one, partitions[0], ["new 1"]).await;
    append_texts(&two, partitions[1], ["new 2"]).await;
    let mut messages = consume(&test, "g", Start::Earliest).await;
    let mut texts: Vec<String> = take(&mut messages, 2).await.iter().map(text).collect();
    texts.sort();
    assert_eq!(texts, ["new 1", "new 2"]);
    messages.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_first_consumers_with_different_starts_one_decides_for_each_node() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 4).await;
    for partition in &partitions {
        append_texts(&sql, *partition, ["old"]).await;
    }
    for round in 0..5 {
        let group = format!("g{round}");
        let (a, b) = tokio::join!(
            consume(&test, &group, Start::Earliest),
            consume(&test, &group, Start::Latest)
        );
        let known: i64 = sql
            .query_one("select count(*) from shardmq.group_start where group_name = $1", &[&group])
            .await
            .unwrap()
            .get(0);
        assert_eq!(known, 1);
        eventually("all are taken", 20 * SECOND, async || {
            a.handle().held_partitions() + b.handle().held_partitions() == 4
        })
        .await;
        let mut starts = Vec::new();
        for partition in &partitions {
            starts.push(cursor(&sql, &group, *partition).await.acked_id == 0);
        }
        starts.dedup();
        assert_eq!(starts.len(), 1, "all partitions start alike");
        a.shutdown(Duration::ZERO).await.unwrap();
        b.shutdown(Duration::ZERO).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_made_after_the_group_starts_at_its_first_message() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let first = topic(&test, "orders", 1).await[0];
    append_texts(&sql, first, ["old"]).await;
    drop(consume(&test, "g", Start::Latest).await);
    let made: i32 = sql
        .query_one("select max(c) from shardmq.partition p, shardmq.claim_partitions('orders', p.topic_id, 1, 2, 2, '{}') c", &[])
        .await
        .unwrap()
        .get(0);
    sql.execute(
        "insert into shardmq_control.partition (partition, topic, generation) values ($1, 'orders', 1)",
        &[&made],
    )
    .await
    .unwrap();
    let second = PartitionId::try_from(u32::try_from(made).unwrap()).unwrap();
    assert_ne!(first, second);
    append_texts(&sql, second, ["first of all"]).await;
    let mut messages = consume(&test, "g", Start::Latest).await;
    assert_eq!(rest(&sql, &[first, second], &mut messages).await, ["first of all"]);
    messages.shutdown(SECOND).await.unwrap();
}

/// Which messages of the absent node came before the group's beginning can't be asked: it starts a
/// minute early, and never late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_when_a_group_began_at_latest_starts_a_minute_before() {
    let away = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&away).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 2).await;
    let (one, two) = (test.sql(0).await, test.sql(1).await);
    append_texts(&one, partitions[0], ["old"]).await;
    append_texts(&two, partitions[1], ["old", "old"]).await;
    let day: i32 = two.query_one("select day from shardmq.partition", &[]).await.unwrap().get(0);
    // The first of the two rows is made older than a minute.
    append_texts(&two, partitions[1], ["recent"]).await;
    let table = crate::support::stored::table(partitions[1], day);
    two.batch_execute(&format!(
        "update {table} set appended_at = appended_at - interval '61 seconds' where count = 2;
         update shardmq.partition set created_at = created_at - interval '1 hour'"
    ))
    .await
    .unwrap();
    away.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    let mut messages = consume(&test, "g", Start::Latest).await;
    append_texts(&one, partitions[0], ["new"]).await;
    assert_eq!(next_text(&mut messages).await, "new");
    away.start_server().await.unwrap();
    let two = test.sql(1).await;
    append_texts(&two, partitions[1], ["new"]).await;
    let texts: Vec<String> = take(&mut messages, 2).await.iter().map(text).collect();
    assert_eq!(texts, ["recent", "new"]);
    messages.shutdown(Duration::ZERO).await.unwrap();
}

/// Not the group of another topic's life: a topic that is made again begins anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_was_deleted_and_made_again_has_no_group_that_knows_it() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, ["gone"]).await;
    let mut messages = consume(&test, "g", Start::Earliest).await;
    next(&mut messages).await.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    test.cluster.delete_topic("orders", true).await.unwrap();
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, ["old"]).await;
    let mut messages = consume(&test, "g", Start::Latest).await;
    assert_eq!(rest(&sql, &[partition], &mut messages).await, Vec::<String>::new());
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_is_not_there_yet_and_a_fixed_list_of_partitions() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let id = producer.send(Message::new("x")).await.unwrap();
    let later = MessageId::new(id.partition(), id.day(), id.sequence() + 2).unwrap();
    let builder = test.cluster.consumer("orders", "g").start(Start::Id(later));
    // The reader has looked already, and seen the log end before its position.
    let looked = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&looked);
    let builder = builder.failpoint(move |place| {
        seen.fetch_or(place == "empty", Ordering::SeqCst);
        Box::pin(std::future::ready(()))
    });
    let mut messages = builder.partitions([id.partition()]).stream().await.unwrap();
    eventually("the reader looks", 20 * SECOND, async || looked.load(Ordering::SeqCst)).await;
    append_texts(&sql, id.partition(), ["before", "at", "end"]).await;
    assert_eq!(texts_until(&mut messages, "end").await, ["at"]);
    messages.shutdown(SECOND).await.unwrap();

    let stranger = PartitionId::new(1, 99).unwrap();
    assert!(!partitions.contains(&stranger) && number(stranger) == 10_199);
    for list in [vec![stranger], vec![]] {
        let builder = test.cluster.consumer("orders", "g").partitions(list);
        assert!(builder.stream().await.is_err());
    }
}

/// As after a failover that lost the end of the log: the node knows neither the group nor its
/// cursors, and a member is there that waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_forgot_where_a_group_starts_is_told_again_by_who_waits() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, ["before"]).await;
    let now: SystemTime = sql.query_one("select clock_timestamp()", &[]).await.unwrap().get(0);
    let builder = test.cluster.consumer("orders", "g").start(Start::At(now));
    let mut messages = builder.lease(SECOND).partitions([partition]).stream().await.unwrap();
    let holds = async || messages.handle().held_partitions() == 1;
    eventually("it is held", 20 * SECOND, holds).await;
    // Somebody else has it, and lives.
    let taken = "with stranger as (
                     insert into shardmq.member (member, group_name, leased_until, lease_secs)
                     values (gen_random_uuid(), 'g', now() + interval '1 hour', 3600) returning member)
                 update shardmq.cursor c
                    set member = s.member, owner = gen_random_uuid(), epoch = epoch + 1
                   from stranger s";
    sql.batch_execute(taken).await.unwrap();
    let lost = async || messages.handle().held_partitions() == 0;
    eventually("it is lost", 20 * SECOND, lost).await;
    let known = async || {
        let start = "select exists (select from shardmq.group_start)";
        sql.query_one(start, &[]).await.unwrap().get::<_, bool>(0)
    };
    for forgotten in
        ["delete from shardmq.group_start", "truncate shardmq.group_start, shardmq.cursor"]
    {
        sql.batch_execute(forgotten).await.unwrap();
        eventually("the node is told", 20 * SECOND, known).await;
    }
    append_texts(&sql, partition, ["after"]).await;
    // The loss is news in the stream before it.
    let delivered = async {
        loop {
            if let Ok(delivery) = messages.next().await.unwrap() {
                break delivery;
            }
        }
    };
    assert_eq!(text(&within(20 * SECOND, "the message", delivered).await), "after");
}
