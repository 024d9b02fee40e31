//! A member of the group: it notes what it is handed, acknowledges it, and says how far it committed.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::FutureExt;
use shardmq::verify::{Payload, Value};
use shardmq::{ConsumerHandle, Delivery, MessageId, Messages, PartitionId, Result};
use tokio::time::{MissedTickBehavior, interval};

use super::clock::Clock;
use super::seen::Seen;
use crate::failure::Failure;

/// Between two commits whose end is noted. The library commits by itself too.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Messages that are noted and acknowledged together.
const MOST_TAKEN: usize = 1_000;
/// How long a member may take to commit and leave.
pub(super) const SHUTDOWN: Duration = Duration::from_secs(10);

/// Where a member's events go.
pub(super) trait Log: Send {
    fn note(&mut self, seen: Seen) -> std::result::Result<(), Failure>;

    /// When it returns, what was noted outlives the member. Before that nothing is acknowledged.
    fn flush(&mut self) -> impl Future<Output = std::result::Result<(), Failure>> + Send;
}

/// How far a partition is acknowledged, and under which acquisition.
struct Position {
    token: u64,
    upto: MessageId,
    /// When that was acknowledged: from then on the library may commit it at any time, by itself or as
    /// it gives the partition back. Where a flush waits for another node, that is long before it is
    /// confirmed, and others may have the partition by then.
    acked: Duration,
}

type Positions = HashMap<PartitionId, Position>;
/// A commit under way: what it covers, and whether it was confirmed.
type Commit = Pin<Box<dyn Future<Output = (Positions, Result<()>)> + Send>>;

pub(super) struct Member<L> {
    clock: Clock,
    log: L,
    acked: Positions,
}

impl<L: Log> Member<L> {
    pub(super) fn new(clock: Clock, log: L) -> Self {
        Self { clock, log, acked: HashMap::new() }
    }

    /// Consumes until the stream ends.
    pub(super) async fn work(mut self, mut messages: Messages) -> std::result::Result<L, Failure> {
        let mut pace = interval(COMMIT_EVERY);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let handle = messages.handle();
        let mut commit: Option<Commit> = None;
        loop {
            tokio::select! {
                received = messages.next() => {
                    let Some(first) = received else { break };
                    let Batch { deliveries, lost_tails } = batch(&mut messages, first);
                    for partition in lost_tails {
                        self.log.note(Seen::TailNoticed { at: self.clock.now(), partition })?;
                    }
                    self.take(deliveries).await?;
                }
                _ = pace.tick(), if commit.is_none() => commit = self.commit(&handle),
                committed = async { commit.as_mut()?.await.into() }, if commit.is_some() => {
                    commit = None;
                    if let Some(committed) = committed {
                        self.committed(committed).await?;
                    }
                }
            }
        }
        Ok(self.log)
    }

    /// Notes all of them, flushes, then acknowledges.
    async fn take(&mut self, batch: Vec<Delivery>) -> std::result::Result<(), Failure> {
        let mut noted = Vec::with_capacity(batch.len());
        for delivery in batch {
            let (at, token, id) = (self.clock.now(), delivery.fencing_token(), delivery.id());
            let (uid, value) = (delivery.uid(), value_of(&delivery).map(Value::number));
            self.log.note(Seen::Taken { at, token, id, uid, value })?;
            noted.push((delivery, Position { token, upto: id, acked: at }));
        }
        self.log.flush().await?;
        for (delivery, position) in noted {
            // Refused where the partition went to another member meanwhile, which is handed it too.
            if delivery.ack().is_ok() {
                self.acked.insert(position.upto.partition(), position);
            }
        }
        Ok(())
    }

    /// Asks for a commit of what was acknowledged since the last one.
    fn commit(&mut self, handle: &ConsumerHandle) -> Option<Commit> {
        let (covered, handle) = (std::mem::take(&mut self.acked), handle.clone());
        (!covered.is_empty()).then(|| -> Commit {
            Box::pin(async move {
                let outcome = handle.flush().await;
                (covered, outcome)
            })
        })
    }

    async fn committed(
        &mut self,
        (covered, outcome): (Positions, Result<()>),
    ) -> std::result::Result<(), Failure> {
        if let Err(error) = outcome {
            // Of some partition; which others were committed is not known.
            tracing::debug!(error = %error.chain(), "a commit failed");
            return Ok(());
        }
        let at = self.clock.now();
        for Position { token, upto, acked } in covered.into_values() {
            self.log.note(Seen::Committed { at, token, upto, asked: acked })?;
        }
        self.log.flush().await
    }
}

/// What a stream yields at once.
#[derive(Default)]
struct Batch {
    deliveries: Vec<Delivery>,
    /// Partitions whose servers have lost the end of their logs.
    lost_tails: Vec<PartitionId>,
}

/// A message, and what else is there without waiting.
fn batch(messages: &mut Messages, first: Result<Delivery>) -> Batch {
    let (mut batch, mut next) = (Batch::default(), Some(first));
    while let Some(received) = next {
        match received {
            Ok(delivery) => batch.deliveries.push(delivery),
            Err(news) => {
                tracing::debug!(news = %news.chain(), "the group's news");
                batch.lost_tails.extend(news.lost_tail());
            }
        }
        let full = batch.deliveries.len() >= MOST_TAKEN;
        next = if full { None } else { messages.next().now_or_never().flatten() };
    }
    batch
}

/// What a message carries; none where it is not what was sent.
pub(super) fn value_of(delivery: &Delivery) -> Option<Value> {
    let payload = Payload::decode(delivery.payload()).ok()?;
    (payload.key == delivery.key()).then_some(payload.value)
}
