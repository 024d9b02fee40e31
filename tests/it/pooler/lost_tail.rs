//! The server behind the pooler comes back without the end of its log. The pooler is told to pause
//! meanwhile, so that no client sees more than a slow answer: connections survive, as through any
//! failover behind a pooler.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use shardmq::embedded::Server;
use shardmq::notifier::LocalNotifier;
use shardmq::{ClusterBuilder, Delivery, Error, ErrorKind, Message, Messages, Producer};
use tokio_postgres::Client;

use super::{NEVER, SECOND, SOON};
use crate::support::pgbouncer::{PgBouncer, Unknown, cluster_with};
use crate::support::put_back::{Snapshot, put_back, snapshot};
use crate::support::reading::{append_texts, cursor, take, text};
use crate::support::stored::{Stored, assert_dense, stored, topic};
use crate::support::{TestCluster, own_server, within};

/// A server of the test's own behind a pooler, with a topic of one partition.
struct Behind {
    server: Server,
    pooler: PgBouncer,
    test: TestCluster,
    partition: shardmq::PartitionId,
    producer: Producer,
}

impl Behind {
    async fn new() -> Self {
        // What is sent comes at once, what is appended by SQL when somebody looks.
        let hinted = |builder: ClusterBuilder| builder.notifier(LocalNotifier::new());
        let server = own_server().await;
        let pooler = PgBouncer::start(&server, 2, Unknown::Refused).await;
        let test = cluster_with(&server, pooler.port(), hinted).await;
        let partition = topic(&test, "orders", 1).await[0];
        let producer = test.cluster.producer("orders").build().await.unwrap();
        Self { server, pooler, test, partition, producer }
    }

    async fn send(&self, name: &str, count: u32) {
        for n in 0..count {
            self.producer.send(Message::new(format!("{name}{n}"))).await.unwrap();
        }
    }

    /// A copy of the server's data.
    async fn snapshot(&self) -> Snapshot {
        let console = self.pause().await;
        let before = snapshot(&self.server).await;
        resume(&console).await;
        before
    }

    /// Waits until all transactions have ended, and begins no other.
    async fn pause(&self) -> Client {
        let console = self.pooler.console().await;
        within(SOON, "the pause", console.simple_query("pause")).await.unwrap();
        console
    }

    /// Puts the server back without any client's notice, and appends so many new messages before
    /// anybody can look.
    async fn put_back_unseen(&self, before: &Snapshot, new: u32) {
        assert!(self.pooler.clients().await > 0);
        let console = self.pause().await;
        put_back(&self.server, before).await;
        let sql = self.test.sql(0).await;
        for n in 0..new {
            append_texts(&sql, self.partition, [format!("new{n}")]).await;
        }
        resume(&console).await;
        // Who waited for too long has ended its own.
        assert_eq!(self.pooler.ended(), [""; 0]);
    }

    async fn acked(&self) -> i64 {
        let sql = self.test.sql(0).await;
        cursor(&sql, "g", self.partition).await.acked_id % 100_000_000
    }

    async fn stored(&self) -> Vec<Stored> {
        let all = stored(&self.test.sql(0).await, self.partition).await;
        assert_dense(&all);
        all
    }
}

async fn resume(console: &Client) {
    console.simple_query("resume").await.unwrap();
}

/// The next message's text; news is put aside.
async fn next(messages: &mut Messages, news: &mut Vec<Error>) -> (String, Delivery) {
    loop {
        match within(2 * SOON, "a delivery", messages.next()).await.unwrap() {
            Ok(delivery) => return (text(&delivery), delivery),
            Err(error) => news.push(error),
        }
    }
}

fn ack_all(deliveries: Vec<Delivery>) {
    deliveries.into_iter().for_each(|delivery| delivery.ack().unwrap());
}

/// No hint tells it: it looks when its lease is renewed. There are more new messages than it had read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_consumer_skips_no_new_message_under_a_reused_id() {
    let behind = Behind::new().await;
    behind.send("kept", 5).await;
    let consumer = behind.test.cluster.consumer("orders", "g").poll_interval(NEVER);
    let mut messages = consumer.stream().await.unwrap();
    ack_all(take(&mut messages, 5).await);
    messages.flush().await.unwrap();
    let before = behind.snapshot().await;
    behind.send("lost", 5).await;
    let mut old = take(&mut messages, 5).await;
    let held_back = old.split_off(3);
    ack_all(old);
    behind.put_back_unseen(&before, 8).await;
    let mut news = Vec::new();
    for n in 0..8 {
        let (text, delivery) = next(&mut messages, &mut news).await;
        assert_eq!(text, format!("new{n}"));
        delivery.ack().unwrap();
    }
    assert!(
        news.iter().any(|e| e.kind() == ErrorKind::LeaseLost && e.to_string().contains("lost"))
    );
    for delivery in held_back {
        assert_eq!(delivery.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    // It tells of the acknowledgements that were void.
    let _ = messages.shutdown(SECOND).await;
    assert_eq!(behind.acked().await, 13);
    assert_eq!(behind.test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledgements_of_the_old_history_move_nothing() {
    let behind = Behind::new().await;
    behind.send("kept", 2).await;
    let consumer = behind.test.cluster.consumer("orders", "g");
    let consumer = consumer.flush_interval(60 * SECOND).poll_interval(SECOND / 20);
    let mut messages = consumer.stream().await.unwrap();
    ack_all(take(&mut messages, 2).await);
    messages.flush().await.unwrap();
    let before = behind.snapshot().await;
    behind.send("lost", 5).await;
    let mut read = 0;
    let mut news = Vec::new();
    while read < 5 {
        next(&mut messages, &mut news).await.1.ack().unwrap();
        read += 1;
    }
    let early = behind.acked().await;
    behind.put_back_unseen(&before, 0).await;
    let handle = messages.handle();
    let flushed = within(SOON, "the flush", handle.flush()).await;
    assert_eq!(behind.acked().await, 2, "{flushed:?}");
    let error = flushed.expect_err(&format!("{early} were committed before: {news:?}"));
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    behind.send("new", 5).await;
    for n in 0..5 {
        let (text, delivery) = next(&mut messages, &mut news).await;
        assert_eq!(text, format!("new{n}"));
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(behind.test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

/// Everything that is there at the end was delivered, whatever was lost in between.
async fn under_load(pooler_sees: bool) {
    let behind = Arc::new(Behind::new().await);
    behind.send("kept", 5).await;
    let consumer = behind.test.cluster.consumer("orders", "g").poll_interval(SECOND / 20);
    let mut messages = consumer.stream().await.unwrap();
    ack_all(take(&mut messages, 5).await);
    messages.flush().await.unwrap();
    let before = behind.snapshot().await;
    let ended = Arc::new(AtomicBool::new(false));
    let senders: Vec<_> = (0..3).map(|sender| send_on(&behind, sender, &ended)).collect();
    let reader = tokio::spawn(read_until(messages, "last"));
    behind.send("before", 40).await;
    if pooler_sees {
        put_back(&behind.server, &before).await;
    } else {
        behind.put_back_unseen(&before, 0).await;
    }
    behind.send("after", 40).await;
    ended.store(true, Ordering::SeqCst);
    for sender in senders {
        sender.await.unwrap();
    }
    behind.send("last", 1).await;
    let delivered = within(6 * SOON, "the last message", reader).await.unwrap();
    let all = behind.stored().await;
    let kept = all.iter().filter(|message| message.text().starts_with("kept")).count();
    let lost = all.iter().all(|message| !message.text().starts_with("before0"));
    assert!(kept == 5 && lost, "the server was not put back");
    for message in &all[5..] {
        let there = (message.id.sequence(), message.text().to_owned());
        assert!(delivered.contains(&there), "{there:?} was skipped");
    }
    assert_eq!(behind.test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

/// Sends until told to end.
fn send_on(
    behind: &Arc<Behind>,
    sender: u32,
    ended: &Arc<AtomicBool>,
) -> tokio::task::JoinHandle<()> {
    let (behind, ended) = (Arc::clone(behind), Arc::clone(ended));
    tokio::spawn(async move {
        let mut n = 0;
        while !ended.load(Ordering::SeqCst) {
            let text = format!("{sender}:{n}");
            behind.producer.send(Message::new(text)).await.unwrap();
            n += 1;
        }
    })
}

/// Acknowledges everything up to a message, which others may follow only as repeats.
async fn read_until(mut messages: Messages, last: &str) -> HashSet<(u32, String)> {
    let mut delivered = HashSet::new();
    let mut news = Vec::new();
    loop {
        let (text, delivery) = next(&mut messages, &mut news).await;
        let is_last = text.starts_with(last);
        delivered.insert((delivery.id().sequence(), text));
        // That of an old history is refused.
        let _ = delivery.ack();
        if is_last {
            break;
        }
    }
    let _ = messages.shutdown(SECOND).await;
    delivered
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_nothing_is_skipped_whose_loss_no_connection_shows() {
    under_load(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_nothing_is_skipped_when_the_pooler_loses_its_server() {
    under_load(true).await;
}

/// The pooler's other server connections: a restart alone costs no lease and repeats nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_restart_costs_no_lease() {
    let behind = Behind::new().await;
    behind.send("a", 5).await;
    let consumer = behind.test.cluster.consumer("orders", "g").poll_interval(SECOND / 20);
    let mut messages = consumer.stream().await.unwrap();
    let mut held = take(&mut messages, 5).await;
    let console = behind.pause().await;
    behind.server.restart(shardmq::embedded::StopMode::Immediate).await.unwrap();
    resume(&console).await;
    behind.send("b", 3).await;
    held.extend(take(&mut messages, 3).await);
    ack_all(held);
    within(SOON, "the flush", messages.flush()).await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(behind.acked().await, 8);
}
