//! Messages that are not handled: they come again in their order or are parked, and are given up at last;
//! nothing is lost, and nobody waits who need not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{
    ConsumerBuilder, ConsumerHandle, DeadLetter, DeadLetterFilter, Delivery, ErrorKind, Messages,
    Order, PartitionId, RetryPolicy,
};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::Client;
use tracing::Level;

use crate::support::reading::{append_texts, cursor, cursors, next, take, text, texts_until};
use crate::support::said::said;
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, own_server, within};

mod dead_letters;
mod parked;
mod prefetched;

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const SOON: Duration = Duration::from_secs(15);

async fn ready() -> (TestCluster, PartitionId, Client) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    (test, partition, sql)
}

fn consumer(test: &TestCluster, order: Order) -> ConsumerBuilder {
    let policy = RetryPolicy::fixed(20 * MS).attempts(3);
    let builder = test.cluster.consumer("orders", "g").order(order).retry_policy(policy);
    builder.poll_interval(SECOND / 5).flush_interval(SECOND / 10)
}

/// One batch of messages with keys: each text is its key and a number, `a1`.
async fn append_keyed(sql: &Client, partition: PartitionId, texts: &[&str]) {
    let keys: Vec<String> = texts.iter().map(|text| text[..1].to_owned()).collect();
    let payloads: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
    let append = "select shardmq.append($1, $2, $3)";
    sql.query_one(append, &[&number(partition), &payloads, &keys]).await.unwrap();
}

async fn count(sql: &Client, table: &str) -> i64 {
    sql.query_one(&format!("select count(*) from shardmq.{table}"), &[]).await.unwrap().get(0)
}

async fn letters(test: &TestCluster) -> Vec<DeadLetter> {
    let all = DeadLetterFilter::default();
    test.cluster.dead_letters(&all, None, 1_000).await.unwrap().letters
}

/// Everything up to here is acknowledged, without a hole.
async fn is_done(sql: &Client, partition: PartitionId, messages: i64) -> bool {
    let cursors = cursors(sql, "g").await;
    let found = cursors.iter().find(|(of, _)| *of == number(partition));
    found.is_some_and(|(_, c)| c.acked_id % 100_000_000 == messages && c.acked_ahead == "{}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_partition_it_comes_again_before_what_is_not_handed_out() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=6).await;
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let mut hand = take(&mut messages, 2).await;
    let first = hand.remove(0);
    let (id, seen) = (first.id(), first.first_seen());
    assert_eq!((first.attempt(), first.failures().len()), (1, 0));
    let begun = Instant::now();
    first.retry_after(300 * MS, "not now");
    let again = next(&mut messages).await;
    assert!(begun.elapsed() >= 300 * MS);
    assert_eq!((again.id(), again.attempt(), again.first_seen()), (id, 2, seen));
    let failures = again.failures();
    assert_eq!((failures[0].attempt, failures[0].error.as_str()), (1, "not now"));
    again.ack().unwrap();
    hand.remove(0).ack().unwrap();
    assert_eq!(texts_until(&mut messages, "6").await, ["3", "4", "5"]);
    messages.shutdown(SECOND).await.unwrap();
    assert!(is_done(&sql, partition, 6).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_partitions_go_on_meanwhile() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 1..=50).await;
    }
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let first = next(&mut messages).await;
    let stopped = first.partition();
    first.retry_after(3600 * SECOND, "not today");
    for _ in 0..50 {
        let other = next(&mut messages).await;
        assert_ne!(other.partition(), stopped);
        other.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_key_its_key_waits_and_no_other() {
    let (test, partition, sql) = ready().await;
    append_keyed(&sql, partition, &["a1", "b1", "a2", "b2", "a3", "c1", "a4", "b3"]).await;
    let mut messages = consumer(&test, Order::ByKey).stream().await.unwrap();
    next(&mut messages).await.retry_after(SECOND, "a is stuck");
    let mut done = Vec::new();
    for _ in 0..7 {
        let delivery = next(&mut messages).await;
        done.push(format!("{}.{}", text(&delivery), delivery.attempt()));
        // A second of the key fails after the first has come again, and holds the rest of it back.
        if text(&delivery) == "a2" && delivery.attempt() == 1 {
            delivery.retry("once more");
        } else {
            delivery.ack().unwrap();
        }
    }
    let mut rest = texts_until(&mut messages, "a4").await;
    rest.insert(0, done.split_off(6).remove(0));
    assert_eq!(done, ["b1.1", "b2.1", "c1.1", "b3.1", "a1.2", "a2.1"]);
    assert_eq!(rest, ["a2.2", "a3"]);
    messages.shutdown(SECOND).await.unwrap();
    assert!(is_done(&sql, partition, 8).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dropped_without_an_answer_comes_again() {
    for order in [Order::ByPartition, Order::ByKey, Order::Unordered] {
        let (test, partition, sql) = ready().await;
        append_keyed(&sql, partition, &["a1", "a2", "a3"]).await;
        let mut messages = consumer(&test, order).stream().await.unwrap();
        drop(next(&mut messages).await);
        let mut seen = BTreeMap::new();
        while seen.len() < 3 {
            let delivery = next(&mut messages).await;
            seen.insert(text(&delivery), delivery.attempt());
            delivery.ack().unwrap();
        }
        let expected = [("a1", 2), ("a2", 1), ("a3", 1)].map(|(text, n)| (text.to_owned(), n));
        assert_eq!(seen, BTreeMap::from(expected), "{order:?}");
        messages.shutdown(SECOND).await.unwrap();
        assert!(is_done(&sql, partition, 3).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_back_comes_as_if_it_had_not_come() {
    for order in [Order::ByPartition, Order::ByKey, Order::Unordered] {
        let (test, partition, sql) = ready().await;
        append_keyed(&sql, partition, &["a1", "a2"]).await;
        let policy = RetryPolicy::delays([]);
        let mut messages = consumer(&test, order).retry_policy(policy).stream().await.unwrap();
        next(&mut messages).await.give_back();
        let mut seen = BTreeMap::new();
        while seen.len() < 2 {
            let delivery = next(&mut messages).await;
            seen.insert(text(&delivery), (delivery.attempt(), delivery.failures().len()));
            delivery.ack().unwrap();
        }
        let expected = ["a1", "a2"].map(|text| (text.to_owned(), (1, 0)));
        assert_eq!(seen, BTreeMap::from(expected), "{order:?}");
        messages.shutdown(SECOND).await.unwrap();
        assert!(is_done(&sql, partition, 2).await && count(&sql, "retry").await == 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_drops_all_it_gets_says_so_once() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, 1..=3).await;
    let builder = test.cluster.consumer("orders", "careless").poll_interval(SECOND / 5);
    let mut messages = builder.retry_policy(RetryPolicy::fixed(MS)).stream().await.unwrap();
    for _ in 0..5 {
        drop(next(&mut messages).await);
    }
    drop(next(&mut messages).await);
    messages.shutdown(SECOND).await.unwrap();
    let said = said(Level::WARN, "group", "careless");
    let about = said.iter().filter(|said| said.has("dropped", "true")).count();
    assert_eq!(about, 1, "{said:?}");
}

/// A handler that counts, and fails at some messages for ever.
struct Poisoned {
    handle: ConsumerHandle,
    running: JoinHandle<()>,
    done: Arc<Mutex<Vec<String>>>,
    tries: Arc<AtomicUsize>,
}

async fn run(builder: ConsumerBuilder, poison: &'static str) -> Poisoned {
    let messages = builder.stream().await.unwrap();
    let (handle, done, tries) =
        (messages.handle(), Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicUsize>::default());
    let (log, counted) = (Arc::clone(&done), Arc::clone(&tries));
    let running = tokio::spawn(messages.run(4, move |delivery: Delivery| {
        let (log, counted) = (Arc::clone(&log), Arc::clone(&counted));
        async move {
            if text(&delivery) == poison {
                counted.fetch_add(1, Ordering::SeqCst);
                return Err(format!("attempt {} at poison", delivery.attempt()));
            }
            log.lock().unwrap().push(text(&delivery));
            Ok(())
        }
    }));
    Poisoned { handle, running, done, tries }
}

impl Poisoned {
    fn done(&self) -> Vec<String> {
        self.done.lock().unwrap().clone()
    }

    async fn stop(self) {
        self.handle.shutdown(5 * SECOND).await.unwrap();
        within(SOON, "the run ends", self.running).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_goes_to_the_dead_letters_in_every_mode_and_all_else_goes_on() {
    for order in [Order::ByPartition, Order::ByKey, Order::Unordered] {
        let (test, partition, sql) = ready().await;
        append_keyed(&sql, partition, &["a1", "b1", "a2", "b2", "a3"]).await;
        let running = run(consumer(&test, order), "a2").await;
        eventually("all are done", SOON, async || is_done(&sql, partition, 5).await).await;
        let buried = async || count(&sql, "dead_letter").await == 1;
        eventually("one is dead", SOON, buried).await;
        let done = running.done();
        assert_eq!(running.tries.load(Ordering::SeqCst), 3, "{order:?}");
        let of = |key: &str| {
            done.iter().filter(|text| text.starts_with(key)).cloned().collect::<Vec<_>>()
        };
        assert_eq!(BTreeSet::from_iter(done.clone()).len(), 4, "{order:?}: {done:?}");
        match order {
            Order::ByPartition => assert_eq!(done, ["a1", "b1", "b2", "a3"]),
            Order::ByKey => {
                assert_eq!((of("a"), of("b")), (strings(&["a1", "a3"]), strings(&["b1", "b2"])));
            }
            _ => {}
        }
        running.stop().await;
        let letter = letters(&test).await.remove(0);
        assert_eq!((letter.message.payload.as_slice(), letter.attempts), (&b"a2"[..], 3));
        let errors: Vec<_> =
            letter.failures.iter().map(|f| (f.attempt, f.error.as_str())).collect();
        let expected = ["attempt 1 at poison", "attempt 2 at poison", "attempt 3 at poison"];
        assert_eq!(errors, (1..).zip(expected).collect::<Vec<_>>());
        assert!(letter.first_seen <= letter.failures[0].at && letter.group.as_str() == "g");
        assert_eq!(count(&sql, "retry").await, 0);
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_may_choose_and_a_rule_may_too() {
    let (test, partition, sql) = ready().await;
    append_keyed(&sql, partition, &["r1", "l1", "f1", "p1", "o1"]).await;
    let policy = RetryPolicy::fixed(20 * MS)
        .attempts(2)
        .dead_letter_if(|error| error.downcast_ref::<std::num::ParseIntError>().is_some());
    let builder = consumer(&test, Order::ByPartition).retry_policy(policy);
    let messages = builder.stream().await.unwrap();
    let (handle, seen) = (messages.handle(), Arc::<Mutex<Vec<(String, u32)>>>::default());
    let log = Arc::clone(&seen);
    let running = tokio::spawn(messages.run(1, move |delivery: Delivery| {
        let log = Arc::clone(&log);
        async move {
            let (text, attempt) = (text(&delivery), delivery.attempt());
            log.lock().unwrap().push((text.clone(), attempt));
            match text.as_str() {
                // Whatever it returns.
                "r1" => delivery.reject("never"),
                "l1" if attempt == 1 => delivery.retry_after(100 * MS, "later"),
                "f1" => _ = "x".parse::<u32>()?,
                "p1" if attempt == 1 => panic!("once"),
                _ => {}
            }
            Ok::<(), std::num::ParseIntError>(())
        }
    }));
    eventually("all are done", SOON, async || is_done(&sql, partition, 5).await).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    let seen = seen.lock().unwrap().clone();
    let expected = [("r1", 1), ("l1", 1), ("l1", 2), ("f1", 1), ("p1", 1), ("p1", 2), ("o1", 1)];
    assert_eq!(seen, expected.map(|(text, attempt)| (text.to_owned(), attempt)));
    let letters = letters(&test).await;
    let told: Vec<_> = letters.iter().map(|l| (l.attempts, l.failures[0].error.as_str())).collect();
    assert_eq!(told, [(1, "never"), (1, "invalid digit found in string")]);
}

/// Of a batch, what is given up goes, what may succeed comes again, and what was acknowledged stays so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_batch_each_message_has_a_fate_of_its_own() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=4).await;
    let messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let (handle, seen) = (messages.handle(), Arc::<Mutex<Vec<Vec<(String, u32)>>>>::default());
    let log = Arc::clone(&seen);
    let running = tokio::spawn(messages.run_batches(1, 10, move |batch: Vec<Delivery>| {
        let log = Arc::clone(&log);
        async move {
            let texts = batch.iter().map(|delivery| (text(delivery), delivery.attempt()));
            log.lock().unwrap().push(texts.collect());
            if batch.iter().all(|delivery| delivery.attempt() > 1) {
                return Ok(());
            }
            for delivery in batch {
                match text(&delivery).as_str() {
                    "1" => delivery.ack().unwrap(),
                    "2" => delivery.reject("bad"),
                    _ => {}
                }
            }
            Err("some failed")
        }
    }));
    eventually("all are done", SOON, async || is_done(&sql, partition, 4).await).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    let batch = |texts: &[(&str, u32)]| texts.iter().map(|(t, n)| ((*t).to_owned(), *n)).collect();
    let expected: [Vec<_>; 2] =
        [batch(&[("1", 1), ("2", 1), ("3", 1), ("4", 1)]), batch(&[("3", 2), ("4", 2)])];
    assert_eq!(*seen.lock().unwrap(), expected);
    let letters = letters(&test).await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].message.payload, b"2");
}

/// Acknowledged and kept happen together: while the node is away neither does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_up_while_its_node_is_away_is_kept_when_it_is_back() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, 1..=3).await;
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let first = next(&mut messages).await;
    server.stop_server(StopMode::Immediate).await.unwrap();
    first.reject("bad");
    server.start_server().await.unwrap();
    assert_eq!(texts_until(&mut messages, "3").await, ["2"]);
    messages.flush().await.unwrap();
    let letters = letters(&test).await;
    assert_eq!((letters.len(), letters[0].message.payload.as_slice()), (1, &b"1"[..]));
    assert!(is_done(&test.sql(0).await, partition, 3).await);
    messages.shutdown(SECOND).await.unwrap();
}

/// What the stream has handed out and failed, and what failed in hands that still have it, comes in its order
/// when a handler goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_given_to_a_handler_leaves_nothing_behind() {
    for order in [Order::ByPartition, Order::ByKey, Order::Unordered] {
        let (test, partition, sql) = ready().await;
        append_keyed(&sql, partition, &["a1", "b1", "a2", "b2", "a3"]).await;
        let mut messages = consumer(&test, order).stream().await.unwrap();
        next(&mut messages).await.retry_after(SECOND / 5, "before");
        let kept = if order == Order::ByPartition { None } else { Some(next(&mut messages).await) };
        let (handle, done) = (messages.handle(), Arc::<Mutex<Vec<String>>>::default());
        let log = Arc::clone(&done);
        let running = tokio::spawn(messages.run(4, move |delivery: Delivery| {
            log.lock().unwrap().push(text(&delivery));
            async { Ok::<(), String>(()) }
        }));
        drop(kept);
        eventually("all are done", SOON, async || is_done(&sql, partition, 5).await).await;
        eventually("nothing is parked", SOON, async || count(&sql, "retry").await == 0).await;
        // What was in hand when it was read anew is refused, and has come again.
        let _ = handle.shutdown(SECOND).await;
        within(SOON, "the run ends", running).await.unwrap();
        let done = done.lock().unwrap().clone();
        // The last time of each counts: what was read anew may come twice.
        let mut last: Vec<String> = Vec::new();
        for text in &done {
            last.retain(|before| before != text);
            last.push(text.clone());
        }
        let of =
            |key: &str| last.iter().filter(|t| t.starts_with(key)).cloned().collect::<Vec<_>>();
        assert_eq!(last.len(), 5, "{order:?}: {done:?}");
        if order != Order::Unordered {
            assert_eq!(
                (of("a"), of("b")),
                (strings(&["a1", "a2", "a3"]), strings(&["b1", "b2"])),
                "{done:?}"
            );
        }
    }
}
