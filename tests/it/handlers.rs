//! Handlers: as many at a time as order allows, repeated where they fail.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use shardmq::{ConsumerBuilder, ConsumerHandle, Delivery, Order, PartitionId};
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::reading::{append_texts, cursor, next, text};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, within};

mod bounds;
mod crowded;
mod revoked;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// What was handled, in the order in which it was done: partition, text and attempt.
type Log = Arc<Mutex<Vec<(PartitionId, String, u32)>>>;
/// The texts of each batch.
type Batches = Arc<Mutex<Vec<(PartitionId, Vec<String>)>>>;

fn note(log: &Log, delivery: &Delivery) {
    log.lock().unwrap().push((delivery.partition(), text(delivery), delivery.attempt()));
}

fn texts(log: &Log, partition: PartitionId) -> Vec<String> {
    let log = log.lock().unwrap();
    log.iter().filter(|(of, ..)| *of == partition).map(|(_, text, _)| text.clone()).collect()
}

/// What is in hand, and what was while it was already. A handler that panics is called again: it notes
/// what is wrong, and the test fails.
#[derive(Default)]
struct InHand(Mutex<(HashSet<String>, Vec<String>)>);

impl InHand {
    fn begin(&self, what: &str) {
        let (in_hand, twice) = &mut *self.0.lock().unwrap();
        if !in_hand.insert(what.to_owned()) {
            twice.push(what.to_owned());
        }
    }

    fn end(&self, what: &str) {
        self.0.lock().unwrap().0.remove(what);
    }

    fn twice(&self) -> Vec<String> {
        self.0.lock().unwrap().1.clone()
    }
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

fn consumer(test: &TestCluster, order: Order) -> ConsumerBuilder {
    let builder = test.cluster.consumer("orders", "g").order(order);
    builder.poll_interval(SECOND / 5).flush_interval(SECOND / 5)
}

/// Runs a handler until the returned handle is shut down.
async fn run<F>(
    builder: ConsumerBuilder,
    concurrency: usize,
    handler: impl Fn(Delivery) -> F + Send + Sync + 'static,
) -> (ConsumerHandle, JoinHandle<()>)
where
    F: Future<Output = Result<(), String>> + Send + 'static,
{
    let messages = builder.stream().await.unwrap();
    (messages.handle(), tokio::spawn(messages.run(concurrency, handler)))
}

async fn stop((handle, task): (ConsumerHandle, JoinHandle<()>)) {
    handle.shutdown(5 * SECOND).await.unwrap();
    within(SOON, "the run ends", task).await.unwrap();
}

/// Messages with keys; the text is the key and a number.
async fn append_keyed(sql: &Client, partition: PartitionId, keys: &[&str]) {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let mut payloads = Vec::new();
    for key in keys {
        let count = counts.entry(key).or_default();
        *count += 1;
        payloads.push(format!("{key}{count}").into_bytes());
    }
    sql.query_one("select shardmq.append($1, $2, $3)", &[&number(partition), &payloads, &keys])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_go_in_parallel_and_each_in_its_order() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 4).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..50).await;
    }
    let (log, met) = (Log::default(), Arc::new(Barrier::new(4)));
    let in_hand: Arc<InHand> = Arc::default();
    let running = run(consumer(&test, Order::ByPartition), 8, {
        let (log, in_hand) = (Arc::clone(&log), Arc::clone(&in_hand));
        move |delivery| {
            let (log, met, in_hand) = (Arc::clone(&log), Arc::clone(&met), Arc::clone(&in_hand));
            async move {
                let partition = delivery.partition().to_string();
                in_hand.begin(&partition);
                // Each waits until all four are here.
                met.wait().await;
                in_hand.end(&partition);
                note(&log, &delivery);
                Ok(())
            }
        }
    })
    .await;
    eventually("all is done", SOON, async || log.lock().unwrap().len() >= 200).await;
    stop(running).await;
    assert_eq!(in_hand.twice(), Vec::<String>::new(), "two messages of a partition at a time");
    for partition in &partitions {
        assert_eq!(texts(&log, *partition), numbers(50));
    }
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_a_partition_go_in_parallel_and_each_in_its_order() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_keyed(&sql, partition, &["a", "b", "a", "c", "b", "a", "c", "b"]).await;
    let (log, gate) = (Log::default(), Arc::new(Semaphore::new(0)));
    let in_hand: Arc<InHand> = Arc::default();
    let running = run(consumer(&test, Order::ByKey), 8, {
        let (log, gate, in_hand) = (Arc::clone(&log), Arc::clone(&gate), Arc::clone(&in_hand));
        move |delivery| {
            let (log, gate, in_hand) = (Arc::clone(&log), Arc::clone(&gate), Arc::clone(&in_hand));
            async move {
                let key = delivery.key().unwrap();
                in_hand.begin(key);
                if key == "a" {
                    gate.acquire().await.unwrap().forget();
                }
                note(&log, &delivery);
                in_hand.end(key);
                Ok(())
            }
        }
    })
    .await;
    eventually("the others are done", SOON, async || log.lock().unwrap().len() == 5).await;
    let of = |key: &str| -> Vec<String> {
        texts(&log, partition).into_iter().filter(|text| text.starts_with(key)).collect()
    };
    assert_eq!((of("a"), of("b"), of("c")), (vec![], numbered("b", 3), numbered("c", 2)));
    // A message that comes later waits behind those of its key.
    append_keyed(&sql, partition, &["d", "a"]).await;
    eventually("the new key", SOON, async || log.lock().unwrap().len() == 6).await;
    gate.add_permits(2);
    eventually("two of them", SOON, async || of("a").len() == 2).await;
    // What was acknowledged out of order stays so, whoever comes next.
    running.0.flush().await.unwrap();
    let kept = cursor(&sql, "g", partition).await;
    assert_eq!(kept.acked_id % 100_000_000, 5, "up to the third a: {kept:?}");
    gate.add_permits(9);
    eventually("all", SOON, async || log.lock().unwrap().len() == 10).await;
    stop(running).await;
    assert_eq!(in_hand.twice(), Vec::<String>::new(), "two messages of a key at a time");
    assert_eq!(of("a"), [numbered("a", 3), vec!["a1".to_owned()]].concat());
}

fn numbered(key: &str, count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("{key}{n}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_repeats_only_what_was_not_acknowledged() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    for batch in 0..10 {
        append_texts(&sql, partition, batch * 100..batch * 100 + 100).await;
    }
    let (log, stuck) = (Log::default(), ["0", "99", "100", "555"]);
    let running = run(consumer(&test, Order::Unordered), 16, {
        let log = Arc::clone(&log);
        move |delivery| {
            let log = Arc::clone(&log);
            async move {
                if stuck.contains(&text(&delivery).as_str()) {
                    std::future::pending::<()>().await;
                }
                note(&log, &delivery);
                Ok(())
            }
        }
    })
    .await;
    eventually("all others", SOON, async || log.lock().unwrap().len() == 996).await;
    running.0.shutdown(Duration::ZERO).await.unwrap();
    within(SOON, "the run ends", running.1).await.unwrap();
    assert_eq!(Arc::strong_count(&log), 1, "calls that are under way are aborted");
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    for expected in stuck {
        let delivery = next(&mut messages).await;
        assert_eq!(text(&delivery), expected);
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let lag = test.cluster.lag("orders").await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

/// Of ten messages of each partition the third fails: twice by an error, once by a panic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_is_repeated_in_its_place_and_stops_nobody_else() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..10).await;
    }
    let (log, poisoned) = (Log::default(), partitions[0]);
    let (others, mended) = (partitions[1], Arc::new(AtomicUsize::new(0)));
    // One place alone: whoever waits to be repeated does not take it.
    let running = run(consumer(&test, Order::ByPartition), 1, {
        let (log, mended) = (Arc::clone(&log), Arc::clone(&mended));
        move |delivery| {
            let (log, mended) = (Arc::clone(&log), Arc::clone(&mended));
            async move {
                note(&log, &delivery);
                if delivery.partition() == poisoned && text(&delivery) == "2" {
                    assert_ne!(delivery.attempt(), 2, "the second time it panics");
                    if mended.load(Ordering::SeqCst) == 0 {
                        return Err("not yet".to_owned());
                    }
                }
                Ok(())
            }
        }
    })
    .await;
    eventually("the others are through", SOON, async || texts(&log, others).len() == 10).await;
    let attempts = || {
        let log = log.lock().unwrap();
        let of_it = log.iter().filter(|(of, text, _)| *of == poisoned && text == "2");
        of_it.map(|(.., attempt)| *attempt).collect::<Vec<u32>>()
    };
    eventually("it is repeated", SOON, async || attempts().len() >= 3).await;
    mended.store(1, Ordering::SeqCst);
    eventually("it goes on", SOON, async || texts(&log, poisoned).last().unwrap() == "9").await;
    stop(running).await;
    let expected: Vec<u32> = (1..).take(attempts().len()).collect();
    assert_eq!(attempts(), expected);
    let mut seen = texts(&log, poisoned);
    seen.dedup();
    assert_eq!(seen, numbers(10));
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_waits_for_what_is_in_hand_and_starts_nothing_new() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let (log, gate) = (Log::default(), Arc::new(Semaphore::new(0)));
    let begun = Arc::new(AtomicUsize::new(0));
    let (handle, task) = run(consumer(&test, Order::Unordered), 3, {
        let (log, gate, begun) = (Arc::clone(&log), Arc::clone(&gate), Arc::clone(&begun));
        move |delivery| {
            let (log, gate) = (Arc::clone(&log), Arc::clone(&gate));
            begun.fetch_add(1, Ordering::SeqCst);
            async move {
                gate.acquire().await.unwrap().forget();
                note(&log, &delivery);
                Ok(())
            }
        }
    })
    .await;
    eventually("three are in hand", SOON, async || begun.load(Ordering::SeqCst) == 3).await;
    let asked = handle.clone();
    let ending = tokio::spawn(async move { asked.shutdown(10 * SECOND).await });
    eventually("it ends", SOON, async || handle.is_shutting_down()).await;
    gate.add_permits(9);
    within(SOON, "the shutdown", ending).await.unwrap().unwrap();
    within(SOON, "the run ends", task).await.unwrap();
    assert_eq!((begun.load(Ordering::SeqCst), log.lock().unwrap().len()), (3, 3));
    assert_eq!(cursor(&sql, "g", partition).await.acked_id % 100_000_000, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_have_what_is_there_of_one_partition() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, 0..25).await;
    }
    let batches = Batches::default();
    let messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let handle = messages.handle();
    let seen = Arc::clone(&batches);
    let task = tokio::spawn(messages.run_batches(4, 10, move |batch: Vec<Delivery>| {
        let seen = Arc::clone(&seen);
        async move {
            let first = batch[0].partition();
            assert!(batch.iter().all(|delivery| delivery.partition() == first));
            let failed = batch[0].attempt() == 1 && text(&batch[0]) == "10";
            if failed {
                // What it acknowledges itself does not come again.
                batch.into_iter().take(3).for_each(|delivery| delivery.ack().unwrap());
                return Err("the rest comes again");
            }
            seen.lock().unwrap().push((first, batch.iter().map(text).collect()));
            Ok(())
        }
    }));
    let count = || batches.lock().unwrap().iter().map(|(_, texts)| texts.len()).sum::<usize>();
    eventually("all is done", SOON, async || count() == 44).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", task).await.unwrap();
    for partition in &partitions {
        let all = batches.lock().unwrap();
        let of: Vec<_> = all.iter().filter(|(of, _)| of == partition).collect();
        assert_eq!(of.iter().map(|(_, texts)| texts.len()).collect::<Vec<_>>(), [10, 7, 5]);
        let texts: Vec<String> = of.iter().flat_map(|(_, texts)| texts.clone()).collect();
        let expected: Vec<String> = (0..10).chain(13..25).map(|n| n.to_string()).collect();
        assert_eq!(texts, expected);
    }
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_was_begun_from_the_stream_goes_on_with_the_handler() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let first = next(&mut messages).await;
    let (handle, log) = (messages.handle(), Log::default());
    let seen = Arc::clone(&log);
    let task = tokio::spawn(messages.run(4, move |delivery| {
        note(&seen, &delivery);
        async { Ok::<(), String>(()) }
    }));
    eventually("the rest", SOON, async || log.lock().unwrap().len() == 9).await;
    assert_eq!((text(&first), texts(&log, partition)), ("0".to_owned(), numbers(10).split_off(1)));
    first.ack().unwrap();
    stop((handle, task)).await;
    assert_eq!(cursor(&sql, "g", partition).await.acked_id % 100_000_000, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_are_taken_from_the_stream_as_they_are_there() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..25).await;
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let mut sizes = Vec::new();
    for _ in 0..3 {
        let batch = within(SOON, "a batch", messages.next_batch(10)).await.unwrap().unwrap();
        sizes.push(batch.len());
        batch.into_iter().for_each(|delivery| delivery.ack().unwrap());
    }
    assert_eq!(sizes, [10, 10, 5]);
    messages.shutdown(SECOND).await.unwrap();
    assert!(messages.next_batch(10).await.is_none());
    assert_eq!(cursor(&sql, "g", partition).await.acked_id % 100_000_000, 25);
}

/// What waits for its key is bounded; then its partition waits, and no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stuck_key_stops_its_partition_at_the_bound_and_no_other() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let big = "x".repeat(10_000);
    for partition in &partitions {
        for n in 0..40 {
            let (payload, keys) =
                (vec![format!("{n} {big}").into_bytes()], vec![["stuck", "free"][n % 2]]);
            let append = "select shardmq.append($1, $2, $3)";
            sql.query_one(append, &[&number(*partition), &payload, &keys]).await.unwrap();
        }
    }
    let (log, stuck, gate) = (Log::default(), partitions[0], Arc::new(Semaphore::new(0)));
    let builder = consumer(&test, Order::ByKey).prefetch_bytes(64 << 10);
    let running = run(builder, 4, {
        let (log, gate) = (Arc::clone(&log), Arc::clone(&gate));
        move |delivery| {
            let (log, gate) = (Arc::clone(&log), Arc::clone(&gate));
            async move {
                if delivery.partition() == stuck && delivery.key() == Some("stuck") {
                    gate.acquire().await.unwrap().forget();
                }
                note(&log, &delivery);
                Ok(())
            }
        }
    })
    .await;
    eventually("the other is through", SOON, async || texts(&log, partitions[1]).len() == 40).await;
    // Six rows of 10,000 bytes fit into 64 KiB: one in hand, six kept, and their neighbours.
    eventually("it waits", SOON, async || texts(&log, stuck).len() == 7).await;
    // It stays so, while the other goes on.
    append_keyed(&sql, partitions[1], &["free"]).await;
    eventually("what is new", SOON, async || texts(&log, partitions[1]).len() == 41).await;
    assert_eq!(texts(&log, stuck).len(), 7);
    gate.add_permits(100);
    eventually("all", SOON, async || texts(&log, stuck).len() == 40).await;
    stop(running).await;
    let all = texts(&log, stuck);
    let of = |rest: usize| -> Vec<usize> {
        let numbers = all.iter().map(|text| text.split(' ').next().unwrap().parse().unwrap());
        numbers.filter(|n: &usize| n % 2 == rest).collect()
    };
    assert!(of(0).is_sorted() && of(1).is_sorted());
}

/// Whatever is fetched ahead, and however long each message takes: the lease is the process', not the
/// message's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_slower_than_the_lease_keeps_its_partition() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..1_000).await;
    let lease = 4 * SECOND;
    let (log, turns) = (Log::default(), Arc::new(Semaphore::new(0)));
    let slow = run(consumer(&test, Order::ByPartition).lease(lease), 1, {
        let (log, turns) = (Arc::clone(&log), Arc::clone(&turns));
        move |delivery| {
            let (log, turns) = (Arc::clone(&log), Arc::clone(&turns));
            async move {
                note(&log, &delivery);
                turns.acquire().await.unwrap().forget();
                Ok(())
            }
        }
    })
    .await;
    eventually("the first is in hand", SOON, async || log.lock().unwrap().len() == 1).await;
    let other = consumer(&test, Order::ByPartition).lease(lease).stream().await.unwrap();
    let before = cursor(&sql, "g", partition).await;
    let leased_until = async || {
        let until = "select leased_until from shardmq.member join shardmq.cursor using (member)";
        sql.query_one(until, &[]).await.unwrap().get::<_, SystemTime>(0)
    };
    let later = leased_until().await + 3 * lease;
    let several_leases = async || leased_until().await > later;
    eventually("several leases are over", 2 * SOON, several_leases).await;
    turns.add_permits(2_000);
    eventually("all", SOON, async || log.lock().unwrap().len() == 1_000).await;
    assert_eq!(texts(&log, partition), numbers(1_000));
    slow.0.flush().await.unwrap();
    let after = cursor(&sql, "g", partition).await;
    assert_eq!((before.owner, before.epoch), (after.owner, after.epoch));
    other.shutdown(SECOND).await.unwrap();
    stop(slow).await;
}
