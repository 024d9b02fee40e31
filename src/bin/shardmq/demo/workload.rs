//! What the demo sends: numbered messages, half of them with one of two hundred keys.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use shardmq::{Cluster, Message, Producer};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::TOPIC;
use crate::failure::Failure;
use crate::output::{note, progress};

/// Tasks that send at the same time. Messages of one key are all sent by one of them.
const TASKS: u32 = 4;
const CUSTOMERS: u32 = 400;
const CHUNK: usize = 2_500;
const MOST_SLOW: u32 = 1_000;
const SLOW_INTERVAL: Duration = Duration::from_millis(4);
const SHUTDOWN: Duration = Duration::from_secs(10);

/// The payload.
#[derive(Serialize, Deserialize)]
pub(super) struct Order {
    /// Unique, and rising within a key.
    pub(super) number: u32,
    customer: u32,
    /// Microseconds since 1970.
    sent_at: u64,
    /// Whether it was sent slowly, so that its age is the latency.
    pub(super) is_timed: bool,
}

impl Order {
    fn new(number: u32, is_timed: bool) -> Self {
        let customer = number % CUSTOMERS;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sent_at = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Self { number, customer, sent_at, is_timed }
    }

    /// How long ago it was sent.
    pub(super) fn age(&self) -> Duration {
        let sent_at = UNIX_EPOCH + Duration::from_micros(self.sent_at);
        sent_at.elapsed().unwrap_or_default()
    }

    fn message(&self) -> shardmq::Result<Message> {
        let message = Message::json(self)?;
        Ok(match key(self.number) {
            Some(customer) => message.key(format!("customer-{customer}")),
            None => message,
        })
    }
}

/// The customer whose messages must stay in order; none where the order does not matter.
pub(super) fn key(number: u32) -> Option<u32> {
    let customer = number % CUSTOMERS;
    (customer >= CUSTOMERS / 2).then_some(customer)
}

/// The producer's side of the demo.
pub(super) struct Workload {
    producer: Producer,
    total: u32,
    slow: u32,
    /// By number: whether the message was acknowledged.
    sent: Vec<bool>,
}

impl Workload {
    pub(super) async fn new(cluster: &Cluster, total: u32) -> shardmq::Result<Self> {
        let producer = cluster.producer(TOPIC).build().await?;
        let slow = MOST_SLOW.min(total / 10);
        let sent = vec![false; total as usize];
        Ok(Self { producer, total, slow, sent })
    }

    /// How many are sent as fast as possible; the rest is sent slowly.
    pub(super) fn bulk(&self) -> u32 {
        self.total - self.slow
    }

    pub(super) fn total(&self) -> u32 {
        self.total
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.sent.iter().filter(|sent| **sent).count() as u64
    }

    pub(super) fn is_acknowledged(&self, number: u32) -> bool {
        self.sent.get(number as usize).copied().unwrap_or(false)
    }

    pub(super) fn refused(&self) -> u64 {
        u64::from(self.total) - self.acknowledged()
    }

    /// Sends all but the slow ones; returns how many a second.
    pub(super) async fn send_bulk(&mut self) -> Result<f64, Failure> {
        let bar = progress(u64::from(self.bulk()), "produced");
        let began = Instant::now();
        let bulk = self.bulk();
        let tasks = (0..TASKS).map(|task| {
            let (producer, bar) = (self.producer.clone(), bar.clone());
            async move {
                let numbers: Vec<u32> = (task..bulk).step_by(TASKS as usize).collect();
                let mut acknowledged = Vec::new();
                for chunk in numbers.chunks(CHUNK) {
                    acknowledged.extend(send_chunk(&producer, chunk).await?);
                    bar.inc(chunk.len() as u64);
                }
                Ok::<_, shardmq::Error>(acknowledged)
            }
        });
        for number in try_join_all(tasks).await?.into_iter().flatten() {
            self.acknowledge(number);
        }
        bar.finish_and_clear();
        Ok(f64::from(bulk) / began.elapsed().as_secs_f64())
    }

    /// Sends the rest at an even pace, for its latency.
    pub(super) async fn send_slowly(&mut self) -> shardmq::Result<()> {
        let mut pace = interval(SLOW_INTERVAL);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut receipts = Vec::new();
        for number in self.bulk()..self.total {
            pace.tick().await;
            let message = Order::new(number, true).message()?;
            receipts.push((number, self.producer.enqueue(message).await?));
        }
        for (number, receipt) in receipts {
            match receipt.await {
                Ok(_) => self.acknowledge(number),
                Err(error) => note(&format!("warning: send: {}", error.chain())),
            }
        }
        Ok(())
    }

    pub(super) async fn close(&self) -> shardmq::Result<()> {
        self.producer.shutdown(SHUTDOWN).await
    }

    fn acknowledge(&mut self, number: u32) {
        if let Some(sent) = self.sent.get_mut(number as usize) {
            *sent = true;
        }
    }
}

/// Sends these numbers; returns those that were acknowledged.
async fn send_chunk(producer: &Producer, numbers: &[u32]) -> shardmq::Result<Vec<u32>> {
    let messages: shardmq::Result<Vec<Message>> =
        numbers.iter().map(|number| Order::new(*number, false).message()).collect();
    let results = producer.send_all(messages?).await;
    if let Some(error) = results.iter().find_map(|result| result.as_ref().err()) {
        note(&format!("warning: send: {}", error.chain()));
    }
    let sent = numbers.iter().zip(results).filter(|(_, result)| result.is_ok());
    Ok(sent.map(|(number, _)| *number).collect())
}
