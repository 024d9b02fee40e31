//! Beside the log: messages that are tried again later.

use shardmq::Retention;
use shardmq::TopicOptions;

use super::*;
use crate::support::clocks::{Clocks, look_after};
use crate::support::reading::{next_error, seek};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_delays_nothing_and_comes_when_it_is_due() {
    let (test, partition, sql) = ready().await;
    append_keyed(&sql, partition, &["a1", "a2", "a3"]).await;
    // It is not looked for when the lease is renewed.
    let builder = consumer(&test, Order::Unordered).lease(600 * SECOND);
    let mut messages = builder.stream().await.unwrap();
    let first = next(&mut messages).await;
    let (id, uid, seen, at) = (first.id(), first.uid(), first.first_seen(), first.appended_at());
    let begun = Instant::now();
    first.retry_after(SECOND, "not now");
    assert_eq!(texts_until(&mut messages, "a3").await, ["a2"]);
    let done = async || is_done(&sql, partition, 3).await;
    eventually("it counts as acknowledged once it is parked", SOON, done).await;
    assert_eq!(count(&sql, "retry").await, 1);
    let again = next(&mut messages).await;
    let waited = begun.elapsed();
    assert!(waited >= SECOND, "{waited:?}");
    assert_eq!((again.id(), again.uid(), again.attempt()), (id, uid, 2));
    assert_eq!((again.key(), text(&again).as_str()), (Some("a"), "a1"));
    assert_eq!((again.first_seen(), again.appended_at()), (seen, at));
    assert_eq!(again.failures()[0].error, "not now");
    again.ack().unwrap();
    messages.flush().await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_outlives_its_consumer_and_counts_on() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=2).await;
    let mut first = consumer(&test, Order::Unordered).stream().await.unwrap();
    next(&mut first).await.retry_after(300 * MS, "one");
    next(&mut first).await.ack().unwrap();
    eventually("it is parked", SOON, async || count(&sql, "retry").await == 1).await;
    first.shutdown(SECOND).await.unwrap();
    let mut second = consumer(&test, Order::Unordered).stream().await.unwrap();
    let again = next(&mut second).await;
    assert_eq!((text(&again).as_str(), again.attempt()), ("1", 2));
    again.retry("two");
    let again = next(&mut second).await;
    assert_eq!(again.attempt(), 3);
    // The last that the policy grants.
    again.retry("three");
    eventually("it is dead", SOON, async || count(&sql, "dead_letter").await == 1).await;
    let letter = letters(&test).await.remove(0);
    let errors: Vec<_> = letter.failures.iter().map(|failure| failure.error.as_str()).collect();
    assert_eq!((letter.attempts, errors), (3, vec!["one", "two", "three"]));
    assert_eq!(count(&sql, "retry").await, 0);
    second.shutdown(SECOND).await.unwrap();
}

/// The next owner may have it in hand by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_up_while_another_takes_the_partition_is_no_dead_letter() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=1).await;
    let tried = Arc::new(tokio::sync::Semaphore::new(0));
    let told = Arc::clone(&tried);
    let builder = consumer(&test, Order::Unordered).lease(600 * SECOND).failpoint(move |name| {
        told.add_permits(usize::from(name == "settle parked"));
        Box::pin(async {})
    });
    let mut messages = builder.stream().await.unwrap();
    next(&mut messages).await.retry("once");
    let again = next(&mut messages).await;
    assert_eq!(again.attempt(), 2);
    let mut other = test.sql(0).await;
    let taking = other.transaction().await.unwrap();
    let take = "update shardmq.cursor set owner = gen_random_uuid(), epoch = epoch + 1";
    taking.execute(take, &[]).await.unwrap();
    again.reject("no");
    within(20 * SECOND, "an attempt", tried.acquire()).await.unwrap().forget();
    taking.commit().await.unwrap();
    let error = next_error(&mut messages).await;
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{error:?}");
    assert_eq!((count(&sql, "dead_letter").await, count(&sql, "retry").await), (0, 1));
    // The first answer may not have been committed when the partition was taken: that is told here
    // then.
    if let Err(error) = messages.shutdown(SECOND).await {
        assert_eq!(error.kind(), ErrorKind::LeaseLost);
    }
}

/// The copy is all that is left of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_day_may_be_dropped_meanwhile() {
    let test = TestCluster::new(1).await;
    let retention = Retention { days: 1, ..Retention::default() };
    let options = TopicOptions::partitions(1).retention(retention);
    let partition =
        test.cluster.create_topic("orders", options).await.unwrap().partitions[0].partition;
    let (sql, clocks) = (test.sql(0).await, Clocks::of(&test).await);
    append_texts(&sql, partition, 1..=3).await;
    // That the clock was moved is seen when the lease is renewed.
    let builder = consumer(&test, Order::Unordered).lease(SECOND);
    let mut messages = builder.stream().await.unwrap();
    let first = next(&mut messages).await;
    let id = first.id();
    first.retry_after(4 * 24 * 3600 * SECOND, "in four days");
    texts_until(&mut messages, "3").await;
    // Its time counts from when it is parked.
    eventually("it is parked", SOON, async || count(&sql, "retry").await == 1).await;
    messages.flush().await.unwrap();
    clocks.move_server("3 days").await;
    append_texts(&sql, partition, 4..=4).await;
    assert_eq!(texts_until(&mut messages, "4").await, Vec::<String>::new());
    messages.flush().await.unwrap();
    look_after(&test).await;
    assert_eq!(test.cluster.message(id).await.unwrap(), None, "its day is dropped");
    clocks.move_server("2 days").await;
    let again = next(&mut messages).await;
    assert_eq!((again.id(), text(&again).as_str(), again.attempt()), (id, "1", 2));
    again.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0);
}

/// All of many fail once: none is lost, none twice, and what is kept in memory is bounded by the
/// node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_everything_fails_everything_is_parked_and_comes_again() {
    let (test, partition, sql) = ready().await;
    for from in (0..5_000).step_by(500) {
        append_texts(&sql, partition, from..from + 500).await;
    }
    let done: Arc<Mutex<Vec<u32>>> = Arc::default();
    let builder = consumer(&test, Order::Unordered).prefetch_bytes(64 << 10);
    let messages = builder.stream().await.unwrap();
    let (handle, log) = (messages.handle(), Arc::clone(&done));
    let running = tokio::spawn(messages.run(32, move |delivery: Delivery| {
        let log = Arc::clone(&log);
        async move {
            if delivery.attempt() == 1 {
                return Err("down");
            }
            log.lock().unwrap().push(text(&delivery).parse().unwrap());
            Ok(())
        }
    }));
    eventually("all are done", 3 * SOON, async || done.lock().unwrap().len() >= 5_000).await;
    handle.shutdown(5 * SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    let mut done = done.lock().unwrap().clone();
    done.sort_unstable();
    assert_eq!(done, (0..5_000).collect::<Vec<_>>());
    assert!(is_done(&sql, partition, 5_000).await);
    assert_eq!((count(&sql, "retry").await, count(&sql, "dead_letter").await), (0, 0));
}

/// More than may be in hand come one after the other, and not at each renewal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_that_are_due_come_as_fast_as_they_are_handled() {
    let (test, partition, sql) = ready().await;
    for from in (0..4_000).step_by(500) {
        append_texts(&sql, partition, from..from + 500).await;
    }
    let builder = consumer(&test, Order::Unordered).lease(120 * SECOND);
    let messages = builder.stream().await.unwrap();
    let (handle, again) = (messages.handle(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&again);
    let running = tokio::spawn(messages.run(4, move |delivery: Delivery| {
        let count = Arc::clone(&count);
        async move {
            if delivery.attempt() == 1 {
                return Err("down");
            }
            // They are fetched faster.
            tokio::time::sleep(MS).await;
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }));
    let all = async || again.load(Ordering::SeqCst) == 4_000;
    eventually("all are done", 30 * SECOND, all).await;
    handle.shutdown(5 * SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_and_in_hand_is_refused_after_its_partition_was_lost() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=1).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    next(&mut messages).await.retry("once");
    let again = next(&mut messages).await;
    assert_eq!(again.attempt(), 2);
    messages.flush().await.unwrap();
    seek(&sql, "g", partition, cursor(&sql, "g", partition).await.acked_id).await;
    within(SOON, "it hears of it", again.revoked().cancelled()).await;
    assert_eq!(again.ack().unwrap_err().kind(), ErrorKind::Reset);
    // Nobody has acknowledged it.
    let third = loop {
        if let Ok(delivery) = within(SOON, "it comes", messages.next()).await.unwrap() {
            break delivery;
        }
    };
    assert_eq!((text(&third).as_str(), third.attempt()), ("1", 2));
    third.ack().unwrap();
    messages.flush().await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_parked_may_be_done_in_the_users_transaction() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=1).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    next(&mut messages).await.retry("once");
    let mut again = next(&mut messages).await;
    let mut other = test.sql(0).await;
    let transaction = other.transaction().await.unwrap();
    drop(again.commit_in(&transaction).await.unwrap());
    transaction.rollback().await.unwrap();
    assert_eq!(count(&sql, "retry").await, 1);
    let transaction = other.transaction().await.unwrap();
    // The commit's answer is lost.
    drop(again.commit_in(&transaction).await.unwrap());
    transaction.commit().await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0);
    let transaction = other.transaction().await.unwrap();
    let known = again.commit_in(&transaction).await.unwrap_err();
    assert_eq!(known.kind(), ErrorKind::Conflict);
    transaction.rollback().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

/// The statement is committed, and its answer never comes: it is repeated, and nothing is there
/// twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_answer_was_lost_is_not_kept_twice() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=2).await;
    let asked = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&asked);
    let builder = consumer(&test, Order::Unordered).failpoint(move |name| {
        let is_first = name == "put aside" && counted.fetch_add(1, Ordering::SeqCst) == 0;
        if is_first { Box::pin(std::future::pending()) } else { Box::pin(async {}) }
    });
    let mut messages = builder.stream().await.unwrap();
    let mut hand = take(&mut messages, 2).await.into_iter();
    hand.next().unwrap().reject("bad");
    hand.next().unwrap().retry_after(3600 * SECOND, "later");
    eventually("both are done", SOON, async || {
        messages.flush().await.unwrap();
        is_done(&sql, partition, 2).await
    })
    .await;
    let tried = async || asked.load(Ordering::SeqCst) > 1;
    eventually("it was repeated", SOON, tried).await;
    assert_eq!((count(&sql, "dead_letter").await, count(&sql, "retry").await), (1, 1));
    messages.shutdown(SECOND).await.unwrap();
}

/// A user's transaction has the group's row: what failed waits for it, and others do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_holds_the_cursor_delays_the_copy_and_nothing_else() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=3).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    let mut hand = take(&mut messages, 3).await;
    let mut other = test.sql(0).await;
    let transaction = other.transaction().await.unwrap();
    drop(hand[2].commit_in(&transaction).await.unwrap());
    hand.remove(0).reject("bad");
    hand.remove(0).ack().unwrap();
    let renewed = "select leased_until from shardmq.member";
    let before: std::time::SystemTime = sql.query_one(renewed, &[]).await.unwrap().get(0);
    let later = async || {
        sql.query_one(renewed, &[]).await.unwrap().get::<_, std::time::SystemTime>(0) > before
    };
    eventually("the lease is renewed", SOON, later).await;
    assert_eq!(count(&sql, "dead_letter").await, 0);
    transaction.commit().await.unwrap();
    eventually("it is kept", SOON, async || count(&sql, "dead_letter").await == 1).await;
    drop(hand);
    eventually("all are done", SOON, async || is_done(&sql, partition, 3).await).await;
    messages.shutdown(SECOND).await.unwrap();
}

/// A failover may lose what was written last: the copy, and that the message was acknowledged with
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_a_failover_has_lost_is_made_again_from_the_log() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    append_texts(&sql, partition, 1..=4).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    let mut hand = take(&mut messages, 4).await;
    let before = "create table public.before as select * from shardmq.cursor";
    sql.batch_execute(before).await.unwrap();
    hand.remove(0).reject("bad");
    hand.remove(0).retry_after(3600 * SECOND, "later");
    let aside = async || count(&sql, "dead_letter").await + count(&sql, "retry").await == 2;
    eventually("both are put aside", SOON, aside).await;
    hand.remove(1).ack().unwrap();
    messages.flush().await.unwrap();
    // The promoted standby has the log, and nothing of what followed.
    sql.batch_execute(
        "delete from shardmq.dead_letter; delete from shardmq.retry;
         update shardmq.cursor c set acked_id = b.acked_id, acked_ahead = b.acked_ahead
           from public.before b where b.partition = c.partition",
    )
    .await
    .unwrap();
    server.restart(StopMode::Fast).await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < 4 {
        if let Ok(delivery) = within(SOON, "it comes again", messages.next()).await.unwrap() {
            seen.insert(text(&delivery));
            delivery.ack().unwrap();
        }
    }
    messages.flush().await.unwrap();
    assert!(is_done(&test.sql(0).await, partition, 4).await);
    messages.shutdown(SECOND).await.unwrap();
}

/// The server that lost nothing is believed, after a restart too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_loses_nothing_brings_nothing_again() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&test.sql(0).await, partition, 1..=3).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    let mut hand = take(&mut messages, 3).await;
    hand.remove(0).reject("bad");
    let sql = test.sql(0).await;
    eventually("it is dead", SOON, async || count(&sql, "dead_letter").await == 1).await;
    server.restart(StopMode::Fast).await.unwrap();
    let sql = test.sql(0).await;
    append_texts(&sql, partition, 4..=4).await;
    assert_eq!(texts_until(&mut messages, "4").await, Vec::<String>::new());
    hand.into_iter().for_each(|delivery| delivery.ack().unwrap());
    within(SOON, "the commit", messages.flush()).await.unwrap();
    assert!(is_done(&sql, partition, 4).await);
    messages.shutdown(SECOND).await.unwrap();
}

/// A user's transaction has what is parked: nobody waits for it, not even a commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_holds_what_is_parked_delays_nothing_else() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=3).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    next(&mut messages).await.retry("once");
    let (mut parked, mut rest) = (None, Vec::new());
    while parked.is_none() || rest.len() < 2 {
        let delivery = next(&mut messages).await;
        if delivery.attempt() == 2 { parked = Some(delivery) } else { rest.push(delivery) }
    }
    let mut parked = parked.unwrap();
    let mut other = test.sql(0).await;
    let transaction = other.transaction().await.unwrap();
    drop(parked.commit_in(&transaction).await.unwrap());
    // It fails, and is to be parked again: after the transaction.
    parked.retry("no answer");
    rest.pop().unwrap().reject("bad");
    eventually("another is put aside", SOON, async || count(&sql, "dead_letter").await == 1).await;
    rest.pop().unwrap().ack().unwrap();
    // Sooner than it gives up to wait for a lock.
    within(4 * SECOND, "the commit", messages.flush()).await.unwrap();
    transaction.rollback().await.unwrap();
    let again = next(&mut messages).await;
    assert_eq!((text(&again).as_str(), again.attempt()), ("1", 3));
    again.ack().unwrap();
    messages.flush().await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0);
    messages.shutdown(SECOND).await.unwrap();
}

/// Each time when it is due, and not with the next look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_again_and_again_comes_when_it_is_due() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=1).await;
    let policy = RetryPolicy::fixed(50 * MS).attempts(9);
    let builder = consumer(&test, Order::Unordered).lease(60 * SECOND).retry_policy(policy);
    let running = run(builder, "1").await;
    let begun = Instant::now();
    eventually("it is dead", SOON, async || count(&sql, "dead_letter").await == 1).await;
    assert!(begun.elapsed() < 10 * SECOND, "{:?}", begun.elapsed());
    running.stop().await;
}

/// What comes later is looked for by the index, however much is parked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_due_is_not_looked_at() {
    let (test, partition, sql) = ready().await;
    let messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    sql.execute(
        "insert into shardmq.retry (group_name, topic, partition, message_id, producer, sequence,
                message_index, payload, appended_at, first_seen, attempts, due_at)
         select 'g', 'orders', $1::int, $1::int * 100000000000000 + n, gen_random_uuid(), 1, 0, 'x', now(), now(), 1, now() + interval '1 day'
           from generate_series(1, 50000) n",
        &[&number(partition)],
    )
    .await
    .unwrap();
    sql.batch_execute("vacuum analyze shardmq.retry").await.unwrap();
    let text = include_str!("../../../src/store/sql/parked.sql");
    let body: String =
        text.lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n");
    sql.batch_execute(&format!(
        "set plan_cache_mode = force_generic_plan;
         prepare parked (text, int[], uuid[], int, bigint, timestamptz) as {body}"
    ))
    .await
    .unwrap();
    let explain = format!(
        "explain (analyze, buffers, costs off, timing off, summary off)
         execute parked ('g', array[{partition}], '{{}}', 256, 1000000, null)"
    );
    let rows = sql.query(&explain, &[]).await.unwrap();
    let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().all(|line| !line.contains("Rows Removed")), "{}", plan.join("\n"));
    messages.shutdown(SECOND).await.unwrap();
}
