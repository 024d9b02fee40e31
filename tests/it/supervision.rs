//! Tasks of the library that panic, here in what users bring along: they are told and started again, and no
//! partition stays held with nobody in it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use shardmq::notifier::{Health, Hint, Hints, LocalNotifier, Notifier};
use shardmq::{Cluster, Error, ErrorKind, Message, Messages, NodeId, PartitionId};
use tracing::Level;

use crate::support::reading::{append_texts, text};
use crate::support::said::said;
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// What a consumer got: texts of deliveries, which may come again, and news.
#[derive(Default)]
struct Got {
    texts: BTreeSet<String>,
    news: Vec<Error>,
}

impl Got {
    /// Takes in and acknowledges until something holds.
    async fn until(&mut self, messages: &mut Messages, what: &str, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            match within(20 * SECOND, what, messages.next()).await.unwrap() {
                Ok(delivery) => {
                    self.texts.insert(text(&delivery));
                    // Refused where its partition is read anew: then it comes again.
                    let _ = delivery.ack();
                }
                Err(error) => self.news.push(error),
            }
        }
    }

    fn told(&self, what: &str) -> usize {
        self.news.iter().filter(|error| error.to_string().contains(what)).count()
    }
}

/// Goes on acknowledging until nothing is left, and ends the consumer.
async fn finish(test: &TestCluster, mut messages: Messages) {
    let done = async || test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0);
    tokio::select! {
        () = eventually("all is done", 20 * SECOND, done) => {}
        () = async { Got::default().until(&mut messages, "more", |_| false).await } => {}
    }
    let ended = within(20 * SECOND, "the shutdown", messages.shutdown(SECOND)).await;
    // It tells of acknowledgements that came to nothing.
    ended.unwrap_or_else(|error| assert_eq!(error.kind(), ErrorKind::LeaseLost));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_panics_is_told_and_its_partition_is_read_anew() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let sql = test.sql(0).await;
    let left = AtomicU32::new(2);
    let hook = move |place| -> BoxFuture<'static, ()> {
        let panics = place == "empty" && take(&left);
        async move { assert!(!panics, "a reader is startled") }.boxed()
    };
    let consumer = test.cluster.consumer("orders", "g").poll_interval(SECOND / 10);
    let mut messages = consumer.failpoint(hook).stream().await.unwrap();
    let mut got = Got::default();
    // A reader panics where it is through with what there was.
    got.until(&mut messages, "the panics", |got| got.told("a reader is startled") == 2).await;
    for (partition, text) in partitions.iter().zip(["one", "two"]) {
        append_texts(&sql, *partition, [text]).await;
    }
    got.until(&mut messages, "the messages", |got| got.texts.len() == 2).await;
    finish(&test, messages).await;
    assert_eq!(said(Level::ERROR, "panic", "a reader is startled").len(), 2);
}

/// Panics where a hint arrives, a few times.
#[derive(Debug)]
struct Startled {
    inner: LocalNotifier,
    left: Arc<AtomicU32>,
}

impl Notifier for Startled {
    fn publish(&self, partitions: &[PartitionId]) {
        self.inner.publish(partitions);
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let left = Arc::clone(&self.left);
        let hints = self.inner.subscribe(partitions);
        Box::pin(hints.inspect(move |hint| {
            assert!(!matches!(hint, Hint::Partitions(_)) || !take(&left), "a member is startled");
        }))
    }

    fn health(&self, node: NodeId) -> Health {
        self.inner.health(node)
    }
}

/// Takes one of what is left.
fn take(left: &AtomicU32) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_panics_is_started_again_and_takes_its_partitions_anew() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let sql = test.sql(0).await;
    let left = Arc::new(AtomicU32::new(0));
    let notifier = Startled { inner: LocalNotifier::new(), left: Arc::clone(&left) };
    let cluster = Cluster::builder(&test.control_url).upkeep(false).notifier(notifier);
    let cluster = cluster.connect().await.unwrap();
    for partition in &partitions {
        append_texts(&sql, *partition, [partition]).await;
    }
    let mut messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let mut got = Got::default();
    got.until(&mut messages, "the first messages", |got| got.texts.len() == 2).await;
    left.store(1, Ordering::SeqCst);
    let producer = cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("hint")).await.unwrap();
    got.until(&mut messages, "the panic", |got| got.told("a member is startled") == 2).await;
    for partition in &partitions {
        append_texts(&sql, *partition, [format!("after in {partition}")]).await;
    }
    got.until(&mut messages, "the rest", |got| got.texts.len() == 5).await;
    finish(&test, messages).await;
    assert_eq!(said(Level::ERROR, "panic", "a member is startled").len(), 1);
}
