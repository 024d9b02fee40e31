//! Filters: what they choose comes, and all else counts as done.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::{ConsumerBuilder, Delivery, ErrorKind, Filter, Message, Order};

use crate::support::reading::{append_texts, next, text};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

fn consumer(test: &TestCluster) -> ConsumerBuilder {
    let builder = test.cluster.consumer("orders", "g").poll_interval(SECOND / 5);
    builder.flush_interval(SECOND / 5)
}

/// Whether the group has begun, and is through everywhere.
async fn is_through(test: &TestCluster) -> bool {
    let lag = test.cluster.lag("orders").await.unwrap();
    !lag.is_empty() && lag.iter().all(|lag| lag.lag == 0)
}

/// Messages from 0 on: every third is paid, every second is in Europe, every fifth has no key.
async fn send(test: &TestCluster, count: usize) {
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let messages = (0..count).map(|n| {
        let message = Message::new(n.to_string());
        let kind = if n.is_multiple_of(3) { "paid" } else { "sent" };
        let place = if n.is_multiple_of(2) { "eu" } else { "us" };
        let message = message.header("kind", kind).header("number", n.to_string());
        if n.is_multiple_of(5) { message } else { message.key(format!("{place}/{n}")) }
    });
    for receipt in producer.send_all(messages.collect::<Vec<_>>()).await {
        receipt.unwrap();
    }
    producer.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_chosen_comes_and_the_rest_is_done_for_the_group() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 4).await;
    send(&test, 1_000).await;
    let filter = Filter::header("kind", "paid").and(Filter::key_prefix("eu/"));
    let filter = filter.or(Filter::header("number", "999"));
    let wanted = |n: usize| n.is_multiple_of(6) && !n.is_multiple_of(5) || n == 999;
    let mut messages = consumer(&test).filter(filter).stream().await.unwrap();
    let mut found = Vec::new();
    while found.len() < (0..1_000).filter(|n| wanted(*n)).count() {
        let delivery = next(&mut messages).await;
        found.push(text(&delivery).parse::<usize>().unwrap());
        delivery.ack().unwrap();
    }
    found.sort_unstable();
    assert_eq!(found, (0..1_000).filter(|n| wanted(*n)).collect::<Vec<_>>());
    // What lies behind the last one that was chosen is passed over while more is waited for.
    let passed = async {
        tokio::select! {
            more = messages.next() => panic!("{more:?}"),
            () = eventually("all is done", SOON, async || is_through(&test).await) => {}
        }
    };
    passed.await;
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nothing_is_chosen_the_group_keeps_up_all_the_same() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    // Neither keys nor headers.
    for _ in 0..20 {
        append_texts(&sql, partitions[0], 0..500).await;
    }
    let filter = Filter::key_prefix("");
    // Much less is read ahead than there is.
    let builder = consumer(&test).filter(filter).max_unacked(600).prefetch_messages(600);
    let mut messages = builder.stream().await.unwrap();
    tokio::select! {
        more = messages.next() => panic!("{more:?}"),
        () = eventually("all is done", SOON, async || is_through(&test).await) => {}
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_any_order_are_not_stopped_by_what_is_passed_over() {
    for order in [Order::ByPartition, Order::ByKey, Order::Unordered] {
        let test = TestCluster::new(1).await;
        topic(&test, "orders", 2).await;
        send(&test, 3_000).await;
        // Runs of what is done lie between all that is chosen, more than may be kept.
        let builder = consumer(&test).order(order).max_acked_runs(4).max_unacked(100);
        let messages = builder.filter(Filter::header("kind", "paid")).stream().await.unwrap();
        let handle = messages.handle();
        let (handled, count) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (log, counter) = (Arc::clone(&handled), Arc::clone(&count));
        let running = tokio::spawn(messages.run(8, move |delivery: Delivery| {
            log.lock().unwrap().push(text(&delivery).parse::<usize>().unwrap());
            counter.fetch_add(1, Ordering::SeqCst);
            async { Ok::<(), String>(()) }
        }));
        eventually("all is done", SOON, async || is_through(&test).await).await;
        handle.shutdown(SECOND).await.unwrap();
        within(SOON, "the run ends", running).await.unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 1_000, "{order:?}");
        let mut handled = handled.lock().unwrap().clone();
        handled.sort_unstable();
        assert_eq!(handled, (0..3_000).step_by(3).collect::<Vec<_>>(), "{order:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_of_another_kind_counts_as_its_text_and_a_reserved_header_is_refused() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    let append = "select shardmq.append($1, array['one', 'two', 'three']::bytea[], null,
                      array['{\"n\": 1}', '{\"n\": \"1\"}', '{\"n\": [1]}']::jsonb[])";
    sql.query_one(append, &[&number(partitions[0])]).await.unwrap();
    let mut messages = consumer(&test).filter(Filter::header("n", "1")).stream().await.unwrap();
    for expected in ["one", "two"] {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected);
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let reserved = consumer(&test).filter(Filter::header("shardmq.uid", "x")).stream().await;
    assert_eq!(reserved.unwrap_err().kind(), ErrorKind::Invalid);
}
