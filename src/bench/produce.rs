//! Sending: many tasks that await each message, or some that send many at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::bench::floor::{self, BATCH, Bare, Work};
use crate::bench::payloads::Payloads;
use crate::bench::slices::{Contest, Latency, Outcome, Tally, alternate, pairs_in};
use crate::bench::stage::{FLOOR_CONNECTIONS, Stage};
use crate::error::Result;
use crate::message::Message;
use crate::producer::Producer;

/// Messages under way for each partition, up to so many partitions: the producer's buffer takes twice as
/// many, and what is beyond it only waits.
const UNDER_WAY: usize = 2_000;
const BUSY_PARTITIONS: usize = 100;
/// One in so many messages is timed, so that reading the clock is not what is measured.
const SAMPLE: usize = 16;

pub(super) async fn measure(stage: &Stage) -> Result<Outcome> {
    let contest = Produce {
        source: Arc::new(Source {
            producer: stage.producing.producer(stage.name()).build().await?,
            payloads: stage.payloads,
            over: AtomicBool::new(false),
        }),
        batch: stage.options.batch,
        tasks: tasks(stage.options.partitions, stage.options.batch),
        bare: Bare::each(&stage.producing, &stage.floor, FLOOR_CONNECTIONS).await?,
        work: Work::Append(stage.payloads.batches(BATCH).into()),
    };
    alternate(contest, pairs_in(stage.options.seconds)).await
}

/// How many tasks send.
fn tasks(partitions: usize, batch: Option<usize>) -> usize {
    let busy = partitions.min(BUSY_PARTITIONS);
    let under_way = UNDER_WAY * busy;
    batch.map_or(under_way, |batch| under_way.div_ceil(batch).max(2 * busy))
}

struct Produce {
    source: Arc<Source>,
    batch: Option<usize>,
    tasks: usize,
    bare: Vec<Bare>,
    work: Work,
}

impl Contest for Produce {
    async fn library(&mut self, slice: Duration) -> Result<Tally> {
        let begun = Instant::now();
        let mut set = JoinSet::new();
        self.source.over.store(false, Ordering::Relaxed);
        for next in 0..self.tasks {
            let source = Arc::clone(&self.source);
            let sender = Sender { source, next };
            match self.batch {
                None => set.spawn(sender.send()),
                Some(batch) => set.spawn(sender.send_all(batch)),
            };
        }
        tokio::time::sleep_until(begun + slice).await;
        self.source.over.store(true, Ordering::Relaxed);
        let (mut messages, mut latency) = (0, Latency::new());
        while let Some(done) = set.join_next().await {
            let Ok(done) = done else { continue };
            let (count, times) = done?;
            messages += count;
            for time in times {
                latency.record(time);
            }
        }
        Ok(Tally { messages, elapsed: begun.elapsed(), latency })
    }

    async fn floor(&mut self, slice: Duration) -> Result<Tally> {
        floor::slice(&mut self.bare, &self.work, slice).await
    }
}

/// What all tasks send with.
struct Source {
    producer: Producer,
    payloads: Payloads,
    /// The slice is over.
    over: AtomicBool,
}

/// One task.
struct Sender {
    source: Arc<Source>,
    next: usize,
}

/// How many messages are on disk, and how long some of them took.
type Sent = Result<(u64, Vec<Duration>)>;

impl Sender {
    async fn send(mut self) -> Sent {
        let (mut count, mut times) = (0, Vec::new());
        while !self.source.over.load(Ordering::Relaxed) {
            let message = self.message();
            if self.next.is_multiple_of(SAMPLE) {
                let begun = Instant::now();
                self.source.producer.send(message).await?;
                times.push(begun.elapsed());
            } else {
                self.source.producer.send(message).await?;
            }
            count += 1;
        }
        Ok((count, times))
    }

    async fn send_all(mut self, batch: usize) -> Sent {
        let (mut count, mut times) = (0, Vec::new());
        while !self.source.over.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let source = Arc::clone(&self.source);
            let messages = std::iter::repeat_with(|| self.message()).take(batch);
            for result in source.producer.send_all(messages).await {
                result?;
            }
            times.push(begun.elapsed());
            count += batch as u64;
        }
        Ok((count, times))
    }

    fn message(&mut self) -> Message {
        self.next += 1;
        Message::new(self.source.payloads.nth(self.next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_tasks_for_every_partition_but_not_millions() {
        assert_eq!(tasks(4, None), 8_000);
        assert_eq!(tasks(4, Some(1_000)), 8);
        assert_eq!(tasks(4, Some(1_000_000)), 8);
        assert_eq!(tasks(9_801, None), 200_000);
        assert_eq!(tasks(9_801, Some(1_000)), 200);
    }
}
