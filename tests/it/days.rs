//! Readers go from day to day: none is left with a message in it, and lag is right over its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use shardmq::{ConsumerBuilder, PartitionId};
use tokio::sync::{Semaphore, mpsc};
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::reading::{append_texts, cursor, take, text, texts_until};
use crate::support::stored::{number, table, topic};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// A topic of one partition in a database whose clock can be moved.
async fn ready() -> (TestCluster, Client, PartitionId, Clocks) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let clocks = Clocks::of(&test).await;
    clocks.set_server("12 hours").await;
    let sql = test.sql(0).await;
    (test, sql, partition, clocks)
}

fn consumer(test: &TestCluster) -> ConsumerBuilder {
    let builder = test.cluster.consumer("orders", "g");
    builder.poll_interval(SECOND / 50)
}

fn texts(range: impl IntoIterator<Item = usize>) -> Vec<String> {
    range.into_iter().map(|n| n.to_string()).collect()
}

/// Stops a reader at a named place until the test lets it go on.
struct Stop {
    reached: mpsc::UnboundedReceiver<()>,
    go: Arc<Semaphore>,
}

impl Stop {
    fn at(
        place: &'static str,
    ) -> (Self, impl Fn(&'static str) -> BoxFuture<'static, ()> + Send + Sync) {
        let (sender, reached) = mpsc::unbounded_channel();
        let go = Arc::new(Semaphore::new(0));
        let stop = Self { reached, go: Arc::clone(&go) };
        let hook = move |name: &'static str| -> BoxFuture<'static, ()> {
            let (sender, go) = (sender.clone(), Arc::clone(&go));
            Box::pin(async move {
                if name == place {
                    sender.send(()).ok();
                    go.acquire().await.unwrap().forget();
                }
            })
        };
        (stop, hook)
    }

    async fn reached(&mut self) {
        within(20 * SECOND, "the reader gets there", self.reached.recv()).await.unwrap();
    }

    /// It goes on, and stops nowhere any more.
    fn release(&self) {
        self.go.add_permits(1000);
    }
}

/// The reader has seen today empty. Before it asks whether the day is closed, a late batch comes, and
/// somebody rolls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_comes_between_empty_and_closed_is_read() {
    let (test, sql, partition, clocks) = ready().await;
    append_texts(&sql, partition, 0..3).await;
    let (mut stop, hook) = Stop::at("empty");
    let mut messages = consumer(&test).failpoint(hook).stream().await.unwrap();
    take(&mut messages, 3).await.into_iter().for_each(|d| d.ack().unwrap());
    stop.reached().await;
    append_texts(&sql, partition, 3..5).await;
    clocks.set_server("24 hours 1 second").await;
    append_texts(&sql, partition, 5..7).await;
    append_texts(&sql, partition, ["end"]).await;
    stop.release();
    assert_eq!(texts_until(&mut messages, "end").await, texts(3..7));
    messages.shutdown(SECOND).await.unwrap();
}

/// The writer of the last batch holds the lock over midnight: until it commits, nobody closes the day,
/// and the reader does not leave it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_after_midnight_into_yesterday_is_read_before_todays() {
    let (test, sql, partition, clocks) = ready().await;
    append_texts(&sql, partition, 0..2).await;
    let (mut stop, hook) = Stop::at("closed");
    let mut messages = consumer(&test).failpoint(hook).stream().await.unwrap();
    take(&mut messages, 2).await.into_iter().for_each(|d| d.ack().unwrap());
    let late = test.sql(0).await;
    late.batch_execute("begin").await.unwrap();
    append_texts(&late, partition, 2..4).await;
    clocks.set_server("24 hours 1 second").await;
    let next = test.sql(0).await;
    let rolling = tokio::spawn(async move { append_texts(&next, partition, 4..6).await });
    eventually("the next day's writer waits", 20 * SECOND, async || {
        crate::support::stored::waiting(&sql, partition).await == 1
    })
    .await;
    late.batch_execute("commit").await.unwrap();
    rolling.await.unwrap();
    append_texts(&sql, partition, ["end"]).await;
    // It may have read the late batch before it saw the day closed, or has yet to.
    stop.reached().await;
    stop.release();
    assert_eq!(texts_until(&mut messages, "end").await, texts(2..6));
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_many_midnights_with_writers_at_work_nothing_is_lost() {
    let (test, sql, partition, clocks) = ready().await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicI64::new(0));
    let mut writers = Vec::new();
    for _ in 0..3 {
        let (client, stop, sent) = (test.sql(0).await, Arc::clone(&stop), Arc::clone(&sent));
        writers.push(tokio::spawn(async move {
            let payloads = vec![b"x".to_vec(), b"y".to_vec()];
            while !stop.load(Ordering::Relaxed) {
                let append = "select shardmq.append($1, $2)";
                let appended = client.query(append, &[&number(partition), &payloads]).await;
                // Refused where midnight falls into the statement itself.
                if appended.is_ok() {
                    sent.fetch_add(2, Ordering::Relaxed);
                }
            }
        }));
    }
    for day in 1..=20 {
        let before = sent.load(Ordering::Relaxed);
        clocks.set_server(&format!("{day} days")).await;
        eventually("the day is written to", 20 * SECOND, async || {
            sent.load(Ordering::Relaxed) > before + 6
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    append_texts(&sql, partition, ["end"]).await;
    let mut ids = Vec::new();
    loop {
        let delivery = crate::support::reading::next(&mut messages).await;
        if text(&delivery) == "end" {
            break;
        }
        ids.push(delivery.id());
        delivery.ack().unwrap();
    }
    assert!(ids.is_sorted());
    assert_eq!(ids.len(), usize::try_from(sent.load(Ordering::Relaxed)).unwrap());
    messages.shutdown(SECOND).await.unwrap();
}

/// Days with messages and without, read by one who is far behind, and by one who was there all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn days_without_messages_are_stepped_over() {
    let (test, sql, partition, clocks) = ready().await;
    let mut there = consumer(&test).stream().await.unwrap();
    let mut sent = 0;
    for (days, messages) in
        [(0, 3), (1, 0), (2, 2), (3, 0), (9, 1), (10, 4), (20, 0), (21, 0), (45, 2)]
    {
        clocks.set_server(&format!("{days} days 1 hour")).await;
        let roll = "select shardmq.roll($1, null)";
        sql.execute(roll, &[&number(partition)]).await.unwrap();
        if messages > 0 {
            append_texts(&sql, partition, sent..sent + messages).await;
            sent += messages;
        }
    }
    append_texts(&sql, partition, ["end"]).await;
    let closed: i64 = sql.query_one("select count(*) from shardmq.day", &[]).await.unwrap().get(0);
    assert_eq!(closed, 4, "those with messages, and not today");
    assert_eq!(texts_until(&mut there, "end").await, texts(0..sent));
    there.shutdown(SECOND).await.unwrap();
    let behind = test.cluster.consumer("orders", "late");
    let mut behind = behind.stream().await.unwrap();
    assert_eq!(texts_until(&mut behind, "end").await, texts(0..sent));
    behind.shutdown(SECOND).await.unwrap();
}

/// Acknowledged ahead in the day after the one that is not finished: not delivered again, though ids
/// leap between days.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_ahead_in_a_later_day_is_kept() {
    let (test, sql, partition, clocks) = ready().await;
    append_texts(&sql, partition, 0..4).await;
    clocks.set_server("1 day 1 hour").await;
    append_texts(&sql, partition, 4..9).await;
    append_texts(&sql, partition, ["end"]).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    for (n, delivery) in take(&mut messages, 9).await.into_iter().enumerate() {
        if [0, 1, 2, 4, 5].contains(&n) {
            delivery.ack().unwrap();
        }
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(lag_and_count(&test, &sql, partition).await, 5);

    // The one that was missing in the first day is answered as soon as it comes.
    let mut messages = consumer(&test).stream().await.unwrap();
    let delivery = crate::support::reading::next(&mut messages).await;
    assert_eq!(text(&delivery), "3");
    delivery.ack().unwrap();
    messages.flush().await.unwrap();
    let rest: Vec<String> = take(&mut messages, 4).await.iter().map(text).collect();
    assert_eq!(rest, ["6", "7", "8", "end"]);
    messages.shutdown(Duration::ZERO).await.unwrap();
    // Now the watermark is at the end of a day, with some of the next one acknowledged.
    let mut messages = consumer(&test).stream().await.unwrap();
    assert_eq!(texts_until(&mut messages, "end").await, ["6", "7", "8"]);
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(lag_and_count(&test, &sql, partition).await, 0);
}

/// The lag that is computed; fails where a count of the messages says otherwise.
async fn lag_and_count(test: &TestCluster, sql: &Client, partition: PartitionId) -> u64 {
    let row = sql
        .query_one(
            "select count(*), min(m.appended_at)
               from shardmq.cursor c, shardmq.messages(c.partition, 0, 1000000) m
              where c.group_name = 'g' and c.partition = $1 and m.id > c.acked_id and not m.id <@ c.acked_ahead",
            &[&number(partition)],
        )
        .await
        .unwrap();
    let counted = u64::try_from(row.get::<_, i64>(0)).unwrap();
    let lag = test.cluster.lag("orders").await.unwrap();
    let lag = lag.iter().find(|lag| lag.partition == partition && lag.group == "g");
    let lag = lag.expect("the group has a cursor");
    assert_eq!(lag.lag, counted, "{lag:?}");
    assert_eq!(lag.lag_secs.is_some(), counted > 0, "{lag:?}");
    counted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lag_is_right_before_at_and_after_the_end_of_a_day() {
    let (test, sql, partition, clocks) = ready().await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let mut in_hand = Vec::new();
    let mut sent = 0;
    for day in 0..4 {
        clocks.set_server(&format!("{day} days 23 hours")).await;
        for batch in [1, 3] {
            append_texts(&sql, partition, sent..sent + batch).await;
            sent += batch;
        }
        in_hand.extend(take(&mut messages, 4).await);
        // The second message of the day first, then all that is older.
        in_hand.remove(in_hand.len() - 3).ack().unwrap();
        messages.flush().await.unwrap();
        lag_and_count(&test, &sql, partition).await;
        while in_hand.len() > 2 {
            in_hand.remove(0).ack().unwrap();
            messages.flush().await.unwrap();
            lag_and_count(&test, &sql, partition).await;
        }
    }
    for delivery in in_hand {
        delivery.ack().unwrap();
    }
    messages.flush().await.unwrap();
    assert_eq!(lag_and_count(&test, &sql, partition).await, 0);
    clocks.set_server("5 days").await;
    sql.execute("select shardmq.roll($1, null)", &[&number(partition)]).await.unwrap();
    assert_eq!(lag_and_count(&test, &sql, partition).await, 0);
    append_texts(&sql, partition, ["x"]).await;
    let day = clocks.day(5).await;
    assert_eq!(count(&sql, &table(partition, day)).await, 1);
    eventually("it comes", 20 * SECOND, async || lag_and_count(&test, &sql, partition).await == 1)
        .await;
    messages.shutdown(SECOND).await.unwrap();
    assert!(cursor(&sql, "g", partition).await.member.is_none());
}

async fn count(sql: &Client, table: &str) -> i64 {
    sql.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0)
}
