//! Partitions that are held back: paused by their consumer, or too far ahead of what is acknowledged.

use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use shardmq::{ConsumerBuilder, Delivery, ErrorKind, Messages, PartitionId};

use crate::support::reading::{append, append_texts, cursor, cursors, next, take, text};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, own_server, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// It looks for nothing by itself: whatever waits must be woken by what it waits for.
fn consumer(test: &TestCluster) -> ConsumerBuilder {
    let builder = test.cluster.consumer("orders", "g").poll_interval(60 * SECOND);
    builder.flush_interval(SECOND / 5)
}

/// Nothing more comes for a while.
async fn is_still(messages: &mut Messages) -> bool {
    tokio::time::timeout(SECOND, messages.next()).await.is_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_partition_keeps_still_and_goes_on_where_it_was() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..100).await;
        append_texts(&sql, *partition, 100..200).await;
    }
    // SQL tells nobody that it has appended something.
    let mut messages = consumer(&test).poll_interval(SECOND / 5).stream().await.unwrap();
    let handle = messages.handle();
    // In the middle of a batch.
    let mut in_hand = Vec::new();
    while in_hand.len() < 50 {
        let delivery = next(&mut messages).await;
        if delivery.partition() == partitions[0] {
            in_hand.push(delivery);
        } else {
            delivery.ack().unwrap();
        }
    }
    handle.pause([partitions[0]]).unwrap();
    assert_eq!(handle.partitions(), [(partitions[0], true), (partitions[1], false)]);
    append_texts(&sql, partitions[0], 200..300).await;
    append_texts(&sql, partitions[1], ["last"]).await;
    loop {
        let delivery = next(&mut messages).await;
        assert_eq!(delivery.partition(), partitions[1]);
        let is_last = text(&delivery) == "last";
        delivery.ack().unwrap();
        if is_last {
            break;
        }
    }
    assert!(is_still(&mut messages).await);
    // It is still this consumer's: what is in hand counts.
    in_hand.drain(..).for_each(|delivery| delivery.ack().unwrap());
    messages.flush().await.unwrap();
    assert_eq!(cursor(&sql, "g", partitions[0]).await.acked_id % 100_000_000, 50);
    assert_eq!(handle.held_partitions(), 2);

    handle.resume(partitions.clone()).unwrap();
    for expected in 50..300 {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected.to_string());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let stranger = PartitionId::new(9, 9).unwrap();
    assert_eq!(handle.pause([stranger]).unwrap_err().kind(), ErrorKind::NotFound);
}

/// More is paused than fits into memory: nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_partitions_take_no_room_from_others() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 8).await;
    for partition in &partitions {
        for n in 0..20 {
            append(&sql, *partition, &[format!("{n:02}{}", "x".repeat(20_000)).into_bytes()]).await;
        }
    }
    let builder = consumer(&test).prefetch_bytes(64 << 10);
    let mut messages = builder.stream().await.unwrap();
    let handle = messages.handle();
    eventually("it has all", SOON, async || handle.held_partitions() == 8).await;
    eventually("memory is full", SOON, async || handle.status().prefetched_bytes >= 48 << 10).await;
    handle.pause(partitions[..7].to_vec()).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 20 {
        let delivery = next(&mut messages).await;
        assert_eq!(delivery.partition(), partitions[7]);
        seen.push(text(&delivery)[..2].to_owned());
        delivery.ack().unwrap();
    }
    assert!(seen.is_sorted());
    handle.resume(partitions.clone()).unwrap();
    let mut all = take(&mut messages, 140).await;
    all.sort_by_key(Delivery::id);
    let numbers: Vec<String> = all.iter().map(|delivery| text(delivery)[..2].to_owned()).collect();
    let expected: Vec<String> = (0..140).map(|n| format!("{:02}", n % 20)).collect();
    assert_eq!(numbers, expected);
    all.into_iter().for_each(|delivery| delivery.ack().unwrap());
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_with_a_stuck_message_waits_at_the_bound_and_others_go_on() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        for batch in 0..30 {
            append_texts(&sql, *partition, batch * 10..batch * 10 + 10).await;
        }
    }
    let mut messages = consumer(&test).max_unacked(100).stream().await.unwrap();
    let mut stuck = None;
    let mut counts = [0, 0];
    // Nothing is acknowledged before all have come.
    let all = take(&mut messages, 200).await;
    assert!(is_still(&mut messages).await);
    for delivery in all {
        let which = usize::from(delivery.partition() == partitions[1]);
        counts[which] += 1;
        if which == 0 && stuck.is_none() {
            stuck = Some(delivery);
        } else {
            delivery.ack().unwrap();
        }
    }
    assert_eq!(counts, [100, 100]);
    let all = take(&mut messages, 100).await;
    assert!(is_still(&mut messages).await);
    for delivery in all {
        assert_eq!(delivery.partition(), partitions[1], "the other one waits");
        counts[1] += 1;
        delivery.ack().unwrap();
    }
    stuck.unwrap().ack().unwrap();
    while counts != [300, 300] {
        let delivery = next(&mut messages).await;
        counts[usize::from(delivery.partition() == partitions[1])] += 1;
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}

/// Every second message is acknowledged: each is a run of its own, and all are stored with the cursor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_of_acknowledged_messages_are_bounded() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..500).await;
    let mut messages = consumer(&test).max_acked_runs(20).stream().await.unwrap();
    let mut kept = Vec::new();
    while kept.len() < 40 {
        let delivery = next(&mut messages).await;
        if kept.len() % 2 == 0 {
            kept.push(Some(delivery));
        } else {
            delivery.ack().unwrap();
            kept.push(None);
        }
    }
    assert!(is_still(&mut messages).await, "twenty runs");
    messages.flush().await.unwrap();
    let ranges =
        "select count(*) from shardmq.cursor c, unnest(c.acked_ahead) where partition = $1";
    let runs: i64 = sql.query_one(ranges, &[&number(partition)]).await.unwrap().get(0);
    assert_eq!(runs, 20);
    kept.drain(..).flatten().for_each(|delivery| delivery.ack().unwrap());
    for expected in 40..500 {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected.to_string());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_works_on_a_partition_hears_that_it_was_lost() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, ["work"]).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let delivery = next(&mut messages).await;
    let revoked = delivery.revoked();
    assert!(revoked.cancelled().now_or_never().is_none());
    let take = "update shardmq.cursor set member = gen_random_uuid(), owner = gen_random_uuid(),
                       epoch = epoch + 1";
    sql.batch_execute(take).await.unwrap();
    within(SOON, "it is told", revoked.cancelled()).await;
    assert_eq!(delivery.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    messages.shutdown(SECOND).await.unwrap();
}

/// A member that joins waits for what is in hand up to the deadline, and no longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_hand_of_a_partition_that_moves_may_be_answered_until_the_deadline() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..3).await;
    }
    let mut first = consumer(&test).drain_timeout(8 * SECOND).stream().await.unwrap();
    let mut in_hand = take(&mut first, 6).await;
    let mut second = consumer(&test).stream().await.unwrap();
    let mine = async || first.handle().held_partitions() == 1;
    eventually("one is given up", SOON, mine).await;
    let kept = first.handle().partitions()[0].0;
    let moving = in_hand.iter().position(|delivery| delivery.partition() != kept).unwrap();
    let answered = in_hand.remove(moving);
    assert_eq!(text(&answered), "0");
    answered.ack().unwrap();
    let rest = take(&mut second, 2).await;
    assert_eq!(rest.iter().map(text).collect::<Vec<_>>(), ["1", "2"]);
    for delivery in in_hand {
        let moved = delivery.partition() != kept;
        assert_eq!(delivery.ack().is_err(), moved);
    }
    rest.into_iter().for_each(|delivery| delivery.ack().unwrap());
    first.shutdown(SECOND).await.unwrap();
    second.shutdown(SECOND).await.unwrap();
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

/// Whoever reads nothing must say all the same that the new server has what was read: the lease of all
/// partitions there waits for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_under_partitions_that_wait_costs_neither_their_lease_nor_the_others() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 3).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..100).await;
        append_texts(&sql, *partition, 100..200).await;
    }
    let builder = consumer(&test).lease(2 * SECOND).max_unacked(100);
    let mut messages = builder.stream().await.unwrap();
    let handle = messages.handle();
    // One is paused, one waits behind a message in hand, one goes on.
    let mut stuck = Vec::new();
    let mut seen = [0; 3];
    while seen[..2] != [100; 2] || seen[2] < 100 {
        let delivery = next(&mut messages).await;
        let which = partitions.iter().position(|p| *p == delivery.partition()).unwrap();
        seen[which] += 1;
        if which == 1 {
            stuck.push(delivery);
        } else {
            delivery.ack().unwrap();
        }
        if seen[0] == 100 {
            handle.pause([partitions[0]]).unwrap();
        }
    }
    messages.flush().await.unwrap();
    let before: Vec<_> =
        cursors(&sql, "g").await.into_iter().map(|(_, c)| (c.owner, c.epoch)).collect();
    server.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    server.start_server().await.unwrap();
    let sql = test.sql(0).await;
    // Later than any renewal before the restart could have led to.
    let until = "select now() + interval '3 s'";
    let until: SystemTime = sql.query_one(until, &[]).await.unwrap().get(0);
    let renewed = async || {
        let live = "select count(*) from shardmq.member where leased_until > $1";
        sql.query_one(live, &[&until]).await.unwrap().get::<_, i64>(0) == 1
    };
    eventually("the lease is renewed on the new server", SOON, renewed).await;
    stuck.drain(..).for_each(|delivery| delivery.ack().unwrap());
    handle.resume(partitions.clone()).unwrap();
    while seen != [200; 3] {
        let delivery = next(&mut messages).await;
        seen[partitions.iter().position(|p| *p == delivery.partition()).unwrap()] += 1;
        delivery.ack().unwrap();
    }
    messages.flush().await.unwrap();
    let after: Vec<_> =
        cursors(&sql, "g").await.into_iter().map(|(_, c)| (c.owner, c.epoch)).collect();
    assert_eq!(after, before);
    messages.shutdown(SECOND).await.unwrap();
}

/// What waits behind the bound is dropped by a pause, and read again after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_at_the_bound_does_not_stop_the_partition_for_ever() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    for batch in 0..30 {
        append_texts(&sql, partition, batch * 10..batch * 10 + 10).await;
    }
    let mut messages = consumer(&test).max_unacked(100).stream().await.unwrap();
    let handle = messages.handle();
    next(&mut messages).await.ack().unwrap();
    eventually("the reader waits", SOON, async || handle.status().prefetched_bytes > 0).await;
    handle.pause([partition]).unwrap();
    assert!(is_still(&mut messages).await);
    handle.resume([partition]).unwrap();
    for expected in 1..300 {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected.to_string());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}

/// More runs than are allowed now were acknowledged before: it goes on, and each comes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_of_a_former_owner_do_not_stop_the_next_one() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..200).await;
    let mut first = consumer(&test).stream().await.unwrap();
    for (n, delivery) in take(&mut first, 100).await.into_iter().enumerate() {
        if n % 2 == 1 {
            delivery.ack().unwrap();
        }
    }
    first.shutdown(SECOND).await.unwrap();
    let mut second = consumer(&test).max_acked_runs(5).stream().await.unwrap();
    let handle = second.handle();
    for (n, expected) in (0..100).step_by(2).chain(100..200).enumerate() {
        let delivery = next(&mut second).await;
        assert_eq!(text(&delivery), expected.to_string());
        delivery.ack().unwrap();
        if n % 7 == 0 {
            // What was fetched is dropped and read again: what is acknowledged does not come again.
            handle.pause([partition]).unwrap();
            assert!(second.next().now_or_never().is_none());
            handle.resume([partition]).unwrap();
        }
    }
    second.shutdown(SECOND).await.unwrap();
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}
