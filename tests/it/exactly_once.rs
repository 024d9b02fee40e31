//! Messages that are acknowledged inside a transaction: their effects and the group's position happen
//! together, whatever fails in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use shardmq::{ConsumerBuilder, Delivery, ErrorKind, Messages, Order, PartitionId, RetryPolicy};
use tokio_postgres::Client;

use crate::support::reading::{append_texts, cursor, cursors, next, next_text, seek, take, text};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, client, eventually, shared_server, within};

mod orders;
mod waiting;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);
/// Within a day.
const SEQUENCE: i64 = 100_000_000;

fn consumer(test: &TestCluster) -> ConsumerBuilder {
    let builder = test.cluster.consumer("orders", "g").poll_interval(SECOND / 5);
    builder.flush_interval(SECOND / 10)
}

/// Where effects are counted.
async fn effects(test: &TestCluster) -> Client {
    let sql = test.sql(0).await;
    sql.batch_execute("create table effect (message text, id bigint)").await.unwrap();
    sql
}

const EFFECT: &str = "insert into effect values ($1, $2)";

async fn apply(sql: &impl tokio_postgres::GenericClient, delivery: &Delivery) {
    sql.execute(EFFECT, &[&text(delivery), &delivery.id().number()]).await.unwrap();
}

async fn counts(sql: &Client) -> BTreeMap<String, i64> {
    let rows = sql.query("select message, count(*) from effect group by 1", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effects_and_the_position_are_committed_together_or_not_at_all() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut sql = effects(&test).await;
    let watch = test.sql(0).await;
    append_texts(&watch, partition, 0..10).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    for expected in 0..10 {
        let mut delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected.to_string());
        // Taken back: still in hand, and nothing has happened.
        let transaction = sql.transaction().await.unwrap();
        apply(&transaction, &delivery).await;
        let _ = delivery.commit_in(&transaction).await.unwrap();
        transaction.rollback().await.unwrap();
        assert_eq!(cursor(&watch, "g", partition).await.acked_id % SEQUENCE, expected);
        let transaction = sql.transaction().await.unwrap();
        apply(&transaction, &delivery).await;
        let acknowledged = delivery.commit_in(&transaction).await.unwrap();
        transaction.commit().await.unwrap();
        acknowledged.committed();
        // With the transaction, and not with a flush.
        assert_eq!(cursor(&watch, "g", partition).await.acked_id % SEQUENCE, expected + 1);
    }
    assert_eq!(cursor(&watch, "g", partition).await.acked_ahead, "{}");
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(counts(&watch).await, (0..10).map(|n| (n.to_string(), 1)).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_was_lost_is_not_repeated() {
    let calls = commits_without_an_answer(Order::ByPartition).await;
    assert!(calls > 20, "each was tried again, in its place");
    // Where it would be parked, that is seen to be needless.
    assert_eq!(commits_without_an_answer(Order::Unordered).await, 20);
}

/// How often the handler was called for twenty messages.
async fn commits_without_an_answer(order: Order) -> usize {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let watch = effects(&test).await;
    append_texts(&watch, partition, 0..20).await;
    let messages = consumer(&test).order(order).stream().await.unwrap();
    let (handle, calls) = (messages.handle(), Arc::new(AtomicUsize::new(0)));
    let url = test.node_urls[0].clone();
    let counted = Arc::clone(&calls);
    let running = tokio::spawn(messages.run(4, move |mut delivery: Delivery| {
        let (url, counted) = (url.clone(), Arc::clone(&counted));
        async move {
            counted.fetch_add(1, Ordering::SeqCst);
            let mut sql = client(&url).await;
            let transaction = sql.transaction().await.unwrap();
            apply(&transaction, &delivery).await;
            drop(delivery.commit_in(&transaction).await.map_err(|error| error.chain())?);
            transaction.commit().await.unwrap();
            // Nobody tells that it was committed.
            Err("the answer was lost".to_owned())
        }
    }));
    let all = async || {
        let cursors = cursors(&watch, "g").await;
        cursors.iter().any(|(_, cursor)| cursor.acked_id % SEQUENCE == 20)
    };
    eventually("the group is through", SOON, all).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    assert_eq!(counts(&watch).await, (0..20).map(|n| (n.to_string(), 1)).collect());
    calls.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_takes_nothing_back_that_a_transaction_has_acknowledged() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut sql = test.sql(0).await;
    append_texts(&sql, partition, 0..6).await;
    let mut messages = consumer(&test).flush_interval(60 * SECOND).stream().await.unwrap();
    let mut hand = take(&mut messages, 6).await;
    // The consumer is not told of these.
    for place in [4, 2] {
        let transaction = sql.transaction().await.unwrap();
        drop(hand[place].commit_in(&transaction).await.unwrap());
        transaction.commit().await.unwrap();
    }
    hand.remove(3).ack().unwrap();
    messages.flush().await.unwrap();
    let base = hand[0].id().number() - 1;
    let first = cursor(&sql, "g", partition).await;
    assert_eq!(first.acked_ahead, format!("{{[{},{})}}", base + 3, base + 6));
    // What has joined the watermark goes from the runs.
    hand.remove(0).ack().unwrap();
    hand.remove(0).ack().unwrap();
    messages.flush().await.unwrap();
    let second = cursor(&sql, "g", partition).await;
    assert_eq!(second.acked_id, base + 2);
    drop(hand);
    messages.shutdown(SECOND).await.unwrap();
    let mut messages = consumer(&test).stream().await.unwrap();
    assert_eq!(next_text(&mut messages).await, "5");
    messages.shutdown(SECOND).await.unwrap();
}

/// Until when all members have their leases. It rises with renewals.
async fn leased_until(sql: &Client) -> SystemTime {
    let latest = "select min(leased_until) from shardmq.member";
    sql.query_one(latest, &[]).await.unwrap().get(0)
}

/// The next of a partition; those of others are dropped, and come again.
async fn next_of(messages: &mut Messages, partition: PartitionId) -> Delivery {
    loop {
        let delivery = next(messages).await;
        if delivery.partition() == partition {
            return delivery;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_stays_open_keeps_nobody_from_a_lease() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    append_texts(&watch, partitions[0], ["held", "after"]).await;
    // What is dropped comes again soon, however often it was.
    let policy = || RetryPolicy::fixed(SECOND / 10).for_ever();
    let builder = || consumer(&test).lease(SECOND).drain_timeout(SECOND / 2).retry_policy(policy());
    let mut messages = builder().stream().await.unwrap();
    let mut held = next(&mut messages).await;
    let transaction = sql.transaction().await.unwrap();
    let acknowledged = held.commit_in(&transaction).await.unwrap();
    // For three leases: the other partition goes on, and is committed.
    let before = cursor(&watch, "g", partitions[1]).await;
    let until = leased_until(&watch).await;
    let mut sent = 0;
    while leased_until(&watch).await < until + 3 * SECOND {
        append_texts(&watch, partitions[1], [sent]).await;
        next_of(&mut messages, partitions[1]).await.ack().unwrap();
        sent += 1;
        let committed = async || {
            let now = cursor(&watch, "g", partitions[1]).await;
            assert_eq!((now.owner, now.epoch), (before.owner, before.epoch));
            now.acked_id % SEQUENCE == sent
        };
        eventually("the other partition is committed", SOON, committed).await;
    }
    append_texts(&watch, partitions[1], ["held too"]).await;
    let mut held_too = next_of(&mut messages, partitions[1]).await;
    let mut other_sql = test.sql(0).await;
    let other_transaction = other_sql.transaction().await.unwrap();
    let acknowledged_too = held_too.commit_in(&other_transaction).await.unwrap();
    // Another one joins, and one partition is given up, which can't be given back while it is locked.
    // Nobody loses a lease by that, as who waits for a lock would for up to 5 s.
    let mut second = builder().stream().await.unwrap();
    let until = leased_until(&watch).await;
    let all_lease = "select bool_and(leased_until > clock_timestamp() - interval '3 s')
                       from shardmq.member";
    let passed = async || {
        assert!(watch.query_one(all_lease, &[]).await.unwrap().get::<_, bool>(0));
        leased_until(&watch).await > until + 8 * SECOND
    };
    eventually("eight leases have passed", 2 * SOON, passed).await;
    transaction.commit().await.unwrap();
    acknowledged.committed();
    other_transaction.commit().await.unwrap();
    acknowledged_too.committed();
    let (one, other) = (messages.handle(), second.handle());
    let shared = async || one.held_partitions() == 1 && other.held_partitions() == 1;
    eventually("each has one", SOON, shared).await;
    assert_eq!(cursor(&watch, "g", partitions[0]).await.acked_id % SEQUENCE, 1);
    messages.shutdown(SECOND).await.unwrap();
    // Nothing is skipped: what was dropped comes again.
    let rest = next(&mut second).await;
    assert_eq!(text(&rest), "after");
    second.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_of_one_partition_wait_for_each_other_and_all_count() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let watch = test.sql(0).await;
    append_texts(&watch, partition, 0..3).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let mut hand = take(&mut messages, 3).await;
    let (mut third, mut second, mut first) = (hand.remove(2), hand.remove(1), hand.remove(0));
    let (mut one, mut other) = (test.sql(0).await, test.sql(0).await);
    let transaction = one.transaction().await.unwrap();
    let acknowledged = third.commit_in(&transaction).await.unwrap();
    let waiting = tokio::spawn(async move {
        let transaction = other.transaction().await.unwrap();
        drop(second.commit_in(&transaction).await.unwrap());
        transaction.commit().await.unwrap();
        (second, other)
    });
    let waits = "select count(*) = 1 from pg_stat_activity
                  where wait_event_type = 'Lock' and datname = current_database()";
    let blocked = async || watch.query_one(waits, &[]).await.unwrap().get::<_, bool>(0);
    eventually("the second waits for the first", SOON, blocked).await;
    transaction.commit().await.unwrap();
    acknowledged.committed();
    let (second, mut other) = within(SOON, "the second", waiting).await.unwrap();
    second.ack().unwrap();
    let transaction = other.transaction().await.unwrap();
    let acknowledged = first.commit_in(&transaction).await.unwrap();
    transaction.commit().await.unwrap();
    acknowledged.committed();
    let all = async || {
        let cursor = cursor(&watch, "g", partition).await;
        cursor.acked_id % SEQUENCE == 3 && cursor.acked_ahead == "{}"
    };
    eventually("all count", SOON, all).await;
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_not_heard_of_a_seek_is_told_and_moves_nothing() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut sql = test.sql(0).await;
    append_texts(&sql, partition, 0..2).await;
    let builder = consumer(&test).lease(600 * SECOND).flush_interval(60 * SECOND);
    let mut messages = builder.partitions([partition]).stream().await.unwrap();
    let mut hand = take(&mut messages, 2).await;
    let before = cursor(&sql, "g", partition).await;
    seek(&sql, "g", partition, before.acked_id).await;
    let transaction = sql.transaction().await.unwrap();
    let error = hand[1].commit_in(&transaction).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Reset, "{}", error.chain());
    transaction.rollback().await.unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, before.acked_id);
    let _ = messages.shutdown(SECOND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_acknowledge_is_told_why_and_moves_nothing() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    let mut sql = test.sql(0).await;
    append_texts(&sql, partitions[0], 0..4).await;
    // It asks nobody by itself whether it has it still.
    let builder = consumer(&test).lease(600 * SECOND).flush_interval(60 * SECOND);
    let mut messages = builder.partitions([partitions[0]]).stream().await.unwrap();
    let mut hand = take(&mut messages, 4).await;
    // On the other node, and in a database that is none.
    let none = client(&shared_server().await.url("postgres")).await;
    let mut elsewhere = [test.sql(1).await, none];
    for elsewhere in &mut elsewhere {
        let transaction = elsewhere.transaction().await.unwrap();
        let error = hand[0].commit_in(&transaction).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("not on node 01"), "{}", error.chain());
        transaction.rollback().await.unwrap();
    }
    let before = cursor(&sql, "g", partitions[0]).await;
    // Another owner that it has not heard of.
    let steal = "update shardmq.cursor set owner = gen_random_uuid(), epoch = epoch + 1
                  where partition = $1";
    sql.execute(steal, &[&number(partitions[0])]).await.unwrap();
    let transaction = sql.transaction().await.unwrap();
    let error = hand[2].commit_in(&transaction).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{}", error.chain());
    transaction.rollback().await.unwrap();
    // It hears of it, and asks nobody. Refused at once where it has heard already.
    let _ = hand.remove(0).ack();
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    let transaction = elsewhere[0].transaction().await.unwrap();
    let error = hand[0].commit_in(&transaction).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{}", error.chain());
    transaction.rollback().await.unwrap();
    assert_eq!(cursor(&sql, "g", partitions[0]).await.acked_id, before.acked_id);
    let _ = messages.shutdown(SECOND).await;
}
