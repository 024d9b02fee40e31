//! Days that end, are dropped, or are acknowledged ahead of the position.

use shardmq::{Retention, TopicOptions};
use uuid::Uuid;

use super::{Ready, SECOND, ack, drain, pull, take, texts, try_ack, try_pull};
use crate::support::TestCluster;
use crate::support::clocks::{Clocks, look_after};
use crate::support::reading::{append_texts, cursor, take as deliveries};
use crate::support::stored::{number, table};

/// A lease lasts for ten minutes at most: after a day it is renewed.
async fn at(ready: &Ready, when: &str, member: Uuid) -> String {
    ready.clocks.set_server(when).await;
    take(&ready.sql, member, 1).await.remove(0).token
}

#[tokio::test]
async fn days_without_messages_are_stepped_over_and_the_open_one_is_not_left() {
    let ready = Ready::new(1).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    let other = Uuid::now_v7();
    let mut sent = 0;
    for (days, messages) in [(0, 3), (1, 0), (2, 2), (3, 0), (9, 1), (10, 4), (20, 0), (45, 2)] {
        let token = at(&ready, &format!("{days} days 1 hour"), me).await;
        sql.execute("select shardmq.roll($1, null)", &[&number(partition)]).await.unwrap();
        assert!(pull(sql, &token, 9).await.is_empty(), "day {days}");
        if messages > 0 {
            append_texts(sql, partition, [sent]).await;
            // Of the open day all is done; and then there is more.
            assert_eq!(drain(sql, &token, 9).await, texts([sent]));
            for n in sent + 1..sent + messages {
                append_texts(sql, partition, [n]).await;
            }
            assert_eq!(drain(sql, &token, 9).await, texts(sent + 1..sent + messages));
            sent += messages;
        }
    }
    let late = "select token from shardmq.take('orders', 'late', $1)";
    let late: String = sql.query_one(late, &[&other]).await.unwrap().get(0);
    let all: Vec<String> = pull(sql, &late, 100).await.into_iter().map(|m| m.1).collect();
    assert_eq!(all, texts(0..sent));
    assert_eq!(drain(sql, &late, 4).await, texts(0..sent));
}

/// The day is closed after it was read to its end, with one more message in it.
#[tokio::test]
async fn the_last_message_of_a_day_is_not_left_behind() {
    let ready = Ready::new(1).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    let token = at(&ready, "23:55", me).await;
    append_texts(sql, partition, 0..2).await;
    assert_eq!(drain(sql, &token, 9).await, texts(0..2));
    append_texts(sql, partition, 2..3).await;
    let token = at(&ready, "1 day 00:01", me).await;
    append_texts(sql, partition, 3..5).await;
    let got = pull(sql, &token, 9).await;
    assert_eq!(got.iter().map(|m| m.1.as_str()).collect::<Vec<_>>(), ["2", "3", "4"]);
    assert!(ack(sql, &token, got[1].0).await);
    assert_eq!(drain(sql, &token, 1).await, texts(4..5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_consumer_of_the_library_acknowledged_ahead_does_not_come_again() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    ready.clocks.set_server("12 hours").await;
    append_texts(sql, partition, 0..4).await;
    append_texts(sql, partition, 4..8).await;
    ready.clocks.set_server("1 day 1 hour").await;
    append_texts(sql, partition, 8..12).await;
    append_texts(sql, partition, 12..14).await;
    let mut messages = ready.test.cluster.consumer("orders", "g").stream().await.unwrap();
    for (n, delivery) in deliveries(&mut messages, 14).await.into_iter().enumerate() {
        // The whole second batch, and the first of the next day.
        if [1, 4, 5, 6, 7, 8, 9, 11, 12, 13].contains(&n) {
            delivery.ack().unwrap();
        }
    }
    messages.shutdown(SECOND).await.unwrap();
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    for most in [1, 2, 3, 9] {
        let got = pull(sql, &token, most).await;
        let expected = ["0", "2", "3", "10"].into_iter().take(usize::try_from(most).unwrap());
        assert_eq!(
            got.iter().map(|m| m.1.as_str()).collect::<Vec<_>>(),
            expected.collect::<Vec<_>>()
        );
    }
    let got = pull(sql, &token, 9).await;
    assert!(ack(sql, &token, got[0].0).await);
    assert_eq!(cursor(sql, "g", partition).await.acked_id, got[0].0 + 1);
    assert!(ack(sql, &token, got[2].0).await);
    // Over the end of the day, up to the one that is missing in the next.
    assert_eq!(cursor(sql, "g", partition).await.acked_id, got[3].0 - 1);
    assert_eq!(drain(sql, &token, 9).await, ["10"]);
    let end = cursor(sql, "g", partition).await;
    assert_eq!((end.acked_id, end.acked_ahead.as_str()), (got[3].0 + 3, "{}"));
    assert!(ready.test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

/// All is acknowledged, but the position does not say so: it must not keep the day from being dropped.
#[tokio::test]
async fn taking_a_partition_moves_its_position_over_what_is_acknowledged() {
    let ready = Ready::new(1).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    let first = append_texts(sql, partition, 0..5).await;
    take(sql, me, 1).await;
    super::give_back(sql, me).await;
    let ahead = "update shardmq.cursor set acked_ahead = int8multirange(int8range($1, $2))";
    sql.execute(ahead, &[&first, &(first + 3)]).await.unwrap();
    let taken = take(sql, me, 1).await.remove(0);
    assert_eq!(taken.acked_id, first + 2);
    assert_eq!(cursor(sql, "g", partition).await.acked_ahead, "{}");
    assert_eq!(drain(sql, &taken.token, 9).await, texts(3..5));
}

#[tokio::test]
async fn a_consumer_behind_the_watermark_goes_on_from_it_and_is_told_what_it_missed() {
    let test = TestCluster::new(1).await;
    let options = TopicOptions::partitions(1).retention(Retention {
        days: 1,
        drop_unread: true,
        ..Retention::default()
    });
    let partitions = test.cluster.create_topic("orders", options).await.unwrap().partitions;
    let partitions = partitions.iter().map(|p| p.partition).collect();
    let clocks = Clocks::of(&test).await;
    let sql = test.sql(0).await;
    let ready = Ready { test, sql, clocks, partitions };
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    append_texts(sql, partition, 0..10).await;
    let token = take(sql, me, 1).await.remove(0).token;
    let first = pull(sql, &token, 4).await;
    assert!(ack(sql, &token, first[3].0).await);
    let in_hand = pull(sql, &token, 2).await;
    ready.clocks.set_server("1 day 12 hours").await;
    append_texts(sql, partition, 10..17).await;
    ready.clocks.set_server("5 days 12 hours").await;
    append_texts(sql, partition, 17..20).await;
    // Between the two steps, and after both.
    for step in ["select outcome from shardmq.expire_day(10101, shardmq.clock())", ""] {
        if step.is_empty() {
            look_after(&ready.test).await;
        } else {
            sql.batch_execute(step).await.unwrap();
        }
        let taken = take(sql, me, 1).await.remove(0);
        let (missed, next) = if step.is_empty() { (13, 17) } else { (6, 10) };
        assert_eq!((taken.missed, taken.token.as_str()), (missed, token.as_str()));
        let got = pull(sql, &token, 1).await.remove(0);
        assert_eq!(got.1, next.to_string());
    }
    let warned =
        super::shown::psql(&ready.test, &format!("select count(*) from shardmq.pull('{token}')"));
    assert_eq!(warned.0.trim(), "3");
    assert!(
        warned.1.contains("WARNING") && warned.1.contains("dropped 13 messages"),
        "{}",
        warned.1
    );
    // What was in hand is done, though its day is gone.
    assert!(ack(sql, &token, in_hand[1].0).await);
    assert_eq!(take(sql, me, 1).await[0].missed, 11);
    assert_eq!(drain(sql, &token, 2).await, texts(17..20));
    assert_eq!(take(sql, me, 1).await[0].missed, 0);
}

/// Dropped in the moment between the look at the days and the read: found gone, and gone on from there.
#[tokio::test]
async fn a_table_that_retention_drops_meanwhile_is_passed_and_one_that_is_lost_is_an_error() {
    let ready = Ready::new(1).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    append_texts(sql, partition, 0..3).await;
    let today = ready.clocks.day(0).await;
    let token = at(&ready, "1 day 1 hour", me).await;
    append_texts(sql, partition, 3..5).await;
    sql.batch_execute(&format!("drop table {}", table(partition, today))).await.unwrap();
    assert_eq!(super::state(try_pull(sql, &token, 9).await), "42P01");
    // As a reader sees it whose list of days is from before.
    let dropped =
        "update shardmq.partition set low_watermark = shardmq.first_id(10101, $1) + 99999999";
    sql.execute(dropped, &[&today]).await.unwrap();
    assert_eq!(drain(sql, &token, 9).await, texts(3..5));
    let gone = cursor(sql, "g", partition).await.acked_id + 1;
    assert_eq!(super::state(try_ack(sql, &token, gone).await), "22023");
}

#[tokio::test]
async fn a_day_is_kept_until_a_group_of_sql_consumers_has_finished_it() {
    let ready = Ready::new(1).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    append_texts(sql, partition, 0..3).await;
    let token = take(sql, me, 1).await.remove(0).token;
    let first = pull(sql, &token, 2).await;
    assert!(ack(sql, &token, first[1].0).await);
    let token = at(&ready, "10 days", me).await;
    append_texts(sql, partition, 3..4).await;
    let expire = "select concat_ws(' ', outcome, group_name) from shardmq.expire_day(10101, shardmq.clock())";
    let outcome: String = sql.query_one(expire, &[]).await.unwrap().get(0);
    assert_eq!(outcome, "kept g");
    assert_eq!(drain(sql, &token, 1).await, texts(2..4));
    let outcome: String = sql.query_one(expire, &[]).await.unwrap().get(0);
    assert_eq!(outcome, "expired");
}
