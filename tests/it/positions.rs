//! A position may be anywhere in a batch: exactly what comes after it is read.

use std::collections::BTreeSet;
use std::time::Duration;

use shardmq::{ErrorKind, Messages, PartitionId};
use tokio_postgres::Client;

use crate::support::reading::{
    append_texts, cursor, next, next_error, next_text, seek, take, text, texts_until,
};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);

/// A topic of one partition with batches of these sizes, whose messages are numbers from 0.
async fn filled(batches: &[usize]) -> (TestCluster, Client, PartitionId, Vec<i64>) {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut ids = Vec::new();
    for size in batches {
        let from = ids.len();
        let first = append_texts(&sql, partition, from..from + size).await;
        ids.extend(first..first + i64::try_from(*size).unwrap());
    }
    (test, sql, partition, ids)
}

async fn consume(test: &TestCluster, group: &str) -> Messages {
    test.cluster.consumer("orders", group).stream().await.unwrap()
}

fn numbers(range: impl IntoIterator<Item = usize>) -> Vec<String> {
    range.into_iter().map(|n| n.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_anywhere_in_a_batch_exactly_the_rest_comes() {
    let (test, sql, partition, ids) = filled(&[4, 1, 5]).await;
    append_texts(&sql, partition, ["end"]).await;
    for done in 0..=ids.len() {
        let group = format!("g{done}");
        let mut messages = consume(&test, &group).await;
        for delivery in take(&mut messages, done).await {
            delivery.ack().unwrap();
        }
        messages.shutdown(SECOND).await.unwrap();
        if done > 0 {
            assert_eq!(cursor(&sql, &group, partition).await.acked_id, ids[done - 1]);
        }
        let mut messages = consume(&test, &group).await;
        let rest = texts_until(&mut messages, "end").await;
        assert_eq!(rest, numbers(done..ids.len()), "after {done}");
        messages.shutdown(SECOND).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seek_to_any_message_of_a_batch_reads_from_the_next_one_on() {
    let (test, sql, partition, ids) = filled(&[3, 6, 1]).await;
    append_texts(&sql, partition, ["end"]).await;
    let mut messages = consume(&test, "g").await;
    drop(next(&mut messages).await);
    messages.shutdown(SECOND).await.unwrap();
    for (at, id) in ids.iter().enumerate() {
        seek(&sql, "g", partition, *id).await;
        let mut messages = consume(&test, "g").await;
        let rest = texts_until(&mut messages, "end").await;
        assert_eq!(rest, numbers(at + 1..ids.len()), "after message {at}");
        messages.shutdown(SECOND).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_out_of_order_is_not_delivered_again() {
    let (test, sql, partition, ids) = filled(&[4, 1, 5]).await;
    let mut messages = consume(&test, "g").await;
    for (n, delivery) in take(&mut messages, 10).await.into_iter().enumerate() {
        // The others are dropped without an answer.
        if [0, 2, 3, 4, 7, 9].contains(&n) {
            delivery.ack().unwrap();
        }
    }
    messages.flush().await.unwrap();
    let kept = cursor(&sql, "g", partition).await;
    let range = |from: usize, to: usize| format!("[{},{})", ids[from], ids[to] + 1);
    assert_eq!(kept.acked_id, ids[0]);
    assert_eq!(kept.acked_ahead, format!("{{{},{},{}}}", range(2, 4), range(7, 7), range(9, 9)));
    messages.shutdown(SECOND).await.unwrap();

    append_texts(&sql, partition, ["end"]).await;
    let mut messages = consume(&test, "g").await;
    let rest = texts_until(&mut messages, "end").await;
    assert_eq!(rest, numbers([1, 5, 6, 8]));
    messages.shutdown(SECOND).await.unwrap();
    let kept = cursor(&sql, "g", partition).await;
    assert_eq!((kept.acked_id, kept.acked_ahead.as_str()), (ids[9] + 1, "{}"));
}

/// Restarts and acknowledgements as a small generator draws them: whatever was committed never comes
/// again, everything else comes again each time, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_many_restarts_only_what_is_left_comes() {
    let (test, _sql, _, ids) = filled(&[1, 7, 2, 13, 1, 1, 9, 30]).await;
    let mut left: BTreeSet<usize> = (0..ids.len()).collect();
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    let mut draw = move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        random >> 60
    };
    for round in 0.. {
        let mut messages = consume(&test, "g").await;
        let taken = take(&mut messages, left.len()).await;
        let came: Vec<usize> = taken.iter().map(|d| text(d).parse().unwrap()).collect();
        assert_eq!(came, left.iter().copied().collect::<Vec<_>>(), "round {round}");
        for (n, delivery) in came.into_iter().zip(taken) {
            if draw() < 6 || round > 6 {
                delivery.ack().unwrap();
                left.remove(&n);
            }
        }
        messages.shutdown(SECOND).await.unwrap();
        if left.is_empty() {
            break;
        }
    }
    let lag = test.cluster.lag("orders").await.unwrap();
    assert_eq!(lag[0].lag, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seek_under_a_running_consumer_takes_it_along_and_no_late_flush_undoes_it() {
    let (test, sql, partition, ids) = filled(&[10]).await;
    let mut messages = test
        .cluster
        .consumer("orders", "g")
        .flush_interval(Duration::from_mins(1))
        .lease(2 * SECOND)
        .stream()
        .await
        .unwrap();
    let mut taken = take(&mut messages, 10).await;
    let in_hand = taken.pop().unwrap();
    for delivery in taken {
        delivery.ack().unwrap();
    }
    // These nine are not committed yet when the seek comes.
    seek(&sql, "g", partition, ids[4]).await;
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::Reset);
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::Reset);
    assert_eq!(in_hand.ack().unwrap_err().kind(), ErrorKind::Reset);
    let moved = cursor(&sql, "g", partition).await;
    assert_eq!((moved.acked_id, moved.reset_epoch), (ids[4], 1));

    append_texts(&sql, partition, ["end"]).await;
    assert_eq!(texts_until(&mut messages, "end").await, numbers(5..10));
    messages.flush().await.unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, ids[9] + 1);

    // Without a flush the next renewal notices.
    seek(&sql, "g", partition, ids[8]).await;
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::Reset);
    assert_eq!(next_text(&mut messages).await, "9");
    messages.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_acknowledged_nothing_leaves_its_cursor_alone() {
    let (test, sql, partition, _) = filled(&[3]).await;
    let mut messages = consume(&test, "g").await;
    drop(take(&mut messages, 3).await);
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
    let before = cursor(&sql, "g", partition).await;
    assert_eq!((before.acked_id, before.member), (0, None));
    let mut messages = consume(&test, "g").await;
    assert_eq!(next_text(&mut messages).await, "0");
    messages.shutdown(Duration::ZERO).await.unwrap();
    eventually("the partition is free", SECOND, async || {
        cursor(&sql, "g", partition).await.owner.is_none()
    })
    .await;
}
