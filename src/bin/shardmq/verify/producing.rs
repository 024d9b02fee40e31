//! The producers: each sends at its share of the rate, and records what became of every message.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use shardmq::verify::{Event, Payload, Recorder, Value, lane_of};
use shardmq::{Cluster, ErrorKind, Message, MessageId, PartitionId, Producer, Result};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::Run;
use crate::failure::{Failure, UNFINISHED};

const TURN: Duration = Duration::from_millis(5);
/// A producer that was held up makes up for so much at most.
const MOST_LATE: Duration = Duration::from_secs(1);
/// Longer than a message is tried.
const SHUTDOWN: Duration = Duration::from_mins(1);

/// All producers at work.
pub(super) struct Producers {
    tasks: Vec<JoinHandle<Result<()>>>,
}

impl Producers {
    pub(super) async fn start(run: &Arc<Run>, count: u16, rate: u32) -> Result<Self> {
        let mut tasks = Vec::new();
        for writer in 1..=count {
            let cluster = Cluster::connect(&run.url).await?;
            let producer = cluster.producer(&run.topic).build().await?;
            let sender = Sender {
                run: Arc::clone(run),
                recorder: run.history.recorder()?,
                producer,
                writer,
                rate: f64::from(rate) / f64::from(count),
                sent: 0,
                forgiven: 0,
                highest: Highest::default(),
            };
            tasks.push(tokio::spawn(async move {
                let sent = sender.work().await;
                cluster.shutdown().await;
                sent
            }));
        }
        Ok(Self { tasks })
    }

    /// Waits until every message has an outcome, after the run was told that it is enough.
    pub(super) async fn finish(self) -> std::result::Result<(), Failure> {
        let ended = try_join_all(self.tasks).await;
        let ended = ended.map_err(|e| Failure::new(UNFINISHED, format!("a producer: {e}")))?;
        Ok(ended.into_iter().collect::<Result<()>>()?)
    }
}

struct Sender {
    run: Arc<Run>,
    recorder: Recorder,
    producer: Producer,
    writer: u16,
    /// Messages a second.
    rate: f64,
    sent: u64,
    /// Messages that were due and will not be made up for.
    forgiven: u64,
    highest: Highest,
}

impl Sender {
    async fn work(mut self) -> Result<()> {
        let mut pace = interval(TURN);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut under_way = FuturesUnordered::new();
        let (began, enough) = (self.run.now(), self.run.enough.clone());
        loop {
            tokio::select! {
                _ = pace.tick(), if !enough.is_cancelled() => {
                    for _ in 0..self.due(began) {
                        let value = Value::new(self.writer, self.sent)?;
                        let sent = Sent { value, at: self.run.now() };
                        self.sent += 1;
                        match self.send(value).await? {
                            Ok(receipt) => under_way.push(async move { (sent, receipt.await) }),
                            Err(error) => self.came_to(sent, &Err(error))?,
                        }
                    }
                }
                Some((sent, outcome)) = under_way.next() => self.came_to(sent, &outcome)?,
                () = enough.cancelled(), if !enough.is_cancelled() => {}
                else => break,
            }
        }
        self.recorder.close()?;
        self.producer.shutdown(SHUTDOWN).await
    }

    /// How many messages are to be sent now.
    fn due(&mut self, began: Duration) -> u64 {
        let planned = self.run.now().saturating_sub(began).as_secs_f64() * self.rate;
        // Not negative, and far below 2^53.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let (planned, most) = (planned as u64, (self.rate * MOST_LATE.as_secs_f64()) as u64 + 1);
        let late = planned.saturating_sub(self.sent + self.forgiven);
        self.forgiven += late.saturating_sub(most);
        late.min(most)
    }

    /// Every other message has one of the keys.
    async fn send(&mut self, value: Value) -> Result<Result<shardmq::Receipt>> {
        let (counter, keys) = (value.counter(), u64::from(self.run.keys));
        let keyed = keys > 0 && counter % 2 == 1;
        let key = keyed.then(|| format!("key-{}", counter / 2 % keys));
        let payload = Payload { value, key: key.as_deref() }.encode(self.run.size)?;
        let lane = key.as_deref().map(lane_of);
        let mut message = Message::new(payload);
        if let Some(key) = key {
            message = message.key(key);
        }
        self.recorder.record(self.run.now(), &Event::Sending { value, lane })?;
        Ok(self.producer.enqueue(message).await)
    }

    fn came_to(&mut self, sent: Sent, outcome: &Result<MessageId>) -> Result<()> {
        let value = sent.value;
        let event = match outcome {
            Ok(id) => Event::Acknowledged { value, id: *id },
            Err(error) => {
                tracing::debug!(%value, error = %error.chain(), "not sent");
                match error.kind() {
                    ErrorKind::Unknown => Event::Unknown { value },
                    _ => Event::Refused { value },
                }
            }
        };
        let now = self.run.now();
        self.recorder.record(now, &event)?;
        if let Ok(id) = outcome
            && self.highest.went_back(*id, sent.at, now)
        {
            let partition = id.partition();
            self.recorder.record(now, &Event::TailNoticed { partition })?;
        }
        Ok(())
    }
}

/// A message under way, and when it was sent.
#[derive(Clone, Copy)]
struct Sent {
    value: Value,
    at: Duration,
}

/// The highest id that was acknowledged in each partition, and when.
#[derive(Default)]
struct Highest(HashMap<PartitionId, (MessageId, Duration)>);

impl Highest {
    /// Whether this id shows that the server has lost the end of its log: a message that was sent after
    /// another had been acknowledged has a lower id.
    fn went_back(&mut self, id: MessageId, sent: Duration, now: Duration) -> bool {
        let (highest, since) = self.0.entry(id.partition()).or_insert((id, now));
        let back = id < *highest && sent > *since;
        if back || id > *highest {
            (*highest, *since) = (id, now);
        }
        back
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_id_of_a_later_send_shows_a_lost_tail_once() {
        let id = |sequence: u32| format!("10101261122{sequence:08}").parse().unwrap();
        let (mut highest, at) = (Highest::default(), Duration::from_secs);
        assert!(!highest.went_back(id(1), at(1), at(2)));
        assert!(!highest.went_back(id(9), at(3), at(4)));
        // Sent before the other was acknowledged: in either order.
        assert!(!highest.went_back(id(8), at(3), at(5)));
        assert!(highest.went_back(id(5), at(6), at(7)));
        assert!(!highest.went_back(id(6), at(8), at(9)));
        // Another partition.
        assert!(!highest.went_back("1020126112200000001".parse().unwrap(), at(8), at(9)));
    }
}
