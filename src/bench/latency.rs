//! From when a message is due to when it was received. Messages are due at fixed times, whatever the
//! library does meanwhile: one that was held up by others before it counts from when it was due, not
//! from when it could be sent at last.
//!
//! ```text
//! pacer (a thread) ─> due ─> enqueue ─> append ─> hint ─> fetch ─> received
//!                      └───────────────── latency ────────────────────┘
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::bench::floor::Bare;
use crate::bench::payloads::{Payloads, arrays};
use crate::bench::slices::{Contest, Latency, Outcome, Tally, alternate, pairs_in};
use crate::bench::stage::Stage;
use crate::consumer::{Messages, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::message::Message;
use crate::producer::{Producer, Receipt};

/// Digits of the time that begins a payload.
const DIGITS: usize = 16;
/// How long to wait for what was sent.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn measure(stage: &Stage) -> Result<Outcome> {
    let clock = Clock { begun: Instant::now(), rate: stage.options.rate };
    let consumer = stage.consuming.consumer(stage.name(), "latency").start(Start::Earliest);
    let arrivals = Arc::new(Mutex::new(Vec::new()));
    let reader = tokio::spawn(receive(consumer.stream().await?, clock, Arc::clone(&arrivals)));
    let contest = Lag {
        clock,
        producer: stage.producing.producer(stage.name()).build().await?,
        payloads: stage.payloads,
        arrivals,
        bare: Bare::each(&stage.producing, &stage.floor, 1).await?,
    };
    let outcome = alternate(contest, pairs_in(stage.options.seconds)).await;
    reader.abort();
    outcome
}

/// Tells when messages are due, in nanoseconds since the run began.
#[derive(Clone, Copy)]
struct Clock {
    begun: Instant,
    rate: u32,
}

impl Clock {
    fn since(self, due: u64) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_nanos(due))
    }

    /// Yields the time of each message of a slice as it comes. A thread of its own, since the
    /// runtime's timers are no finer than a millisecond.
    fn pace(self, slice: Duration) -> mpsc::UnboundedReceiver<u64> {
        let (sender, ticks) = mpsc::unbounded_channel();
        let start = self.begun.elapsed();
        thread::spawn(move || {
            for n in 0_u32.. {
                let offset = Duration::from_secs(1) * n / self.rate;
                if offset >= slice {
                    return;
                }
                let due = start + offset;
                thread::sleep(due.saturating_sub(self.begun.elapsed()));
                if sender.send(u64::try_from(due.as_nanos()).unwrap_or(u64::MAX)).is_err() {
                    return;
                }
            }
        });
        ticks
    }
}

/// The payload of a message that is due then: the time comes first, the size stays.
fn stamped(payloads: Payloads, due: u64) -> Vec<u8> {
    let mut payload = format!("{due:0DIGITS$}").into_bytes();
    let text = payloads.nth(usize::try_from(due >> 10).unwrap_or(0));
    payload.extend_from_slice(text.get(DIGITS..).unwrap_or_default());
    payload
}

fn due_of(payload: &[u8]) -> Option<u64> {
    std::str::from_utf8(payload.get(..DIGITS)?).ok()?.parse().ok()
}

async fn receive(mut messages: Messages, clock: Clock, arrivals: Arc<Mutex<Vec<Duration>>>) {
    while let Some(delivery) = messages.next().await {
        let Ok(delivery) = delivery else { continue };
        if let Some(due) = due_of(delivery.payload()) {
            let late = clock.since(due);
            arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(late);
        }
        let _ = delivery.ack();
    }
}

struct Lag {
    clock: Clock,
    producer: Producer,
    payloads: Payloads,
    /// How late each message of this slice was received.
    arrivals: Arc<Mutex<Vec<Duration>>>,
    bare: Vec<Bare>,
}

impl Contest for Lag {
    async fn library(&mut self, slice: Duration) -> Result<Tally> {
        let begun = Instant::now();
        let mut ticks = self.clock.pace(slice);
        let (receipts, waiting) = mpsc::unbounded_channel();
        let stored = tokio::spawn(all_stored(waiting));
        let mut messages = 0;
        while let Some(due) = ticks.recv().await {
            let message = Message::new(stamped(self.payloads, due));
            let _ = receipts.send(self.producer.enqueue(message).await?);
            messages += 1;
        }
        drop(receipts);
        let ended = Error::closed("the bench");
        stored.await.map_err(|_| ended)??;
        let arrived = self.arrived(messages, Instant::now() + PATIENCE).await?;
        let mut latency = Latency::new();
        for late in arrived {
            latency.record(late);
        }
        Ok(Tally { messages: messages as u64, elapsed: begun.elapsed(), latency })
    }

    /// What could not be appended in twice the time counts for as long as it was late by then.
    async fn floor(&mut self, slice: Duration) -> Result<Tally> {
        let begun = Instant::now();
        let mut ticks = self.clock.pace(slice);
        let (mut messages, mut latency) = (0, Latency::new());
        while let Some(due) = ticks.recv().await {
            if begun.elapsed() < slice * 2 {
                let payload = stamped(self.payloads, due);
                for bare in &mut self.bare {
                    bare.append(&arrays(&[&payload])).await?;
                }
                messages += 1;
            }
            latency.record(self.clock.since(due));
        }
        Ok(Tally { messages, elapsed: begun.elapsed(), latency })
    }

    /// By the median latency: rates are the same where both keep up.
    fn ratio(library: &Tally, floor: &Tally) -> f64 {
        floor.latency.quantile(0.5) / library.latency.quantile(0.5).max(1e-3)
    }
}

impl Lag {
    /// Waits until so many messages have come, and takes their times.
    async fn arrived(&self, messages: usize, until: Instant) -> Result<Vec<Duration>> {
        loop {
            {
                let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                if arrivals.len() >= messages {
                    return Ok(std::mem::take(&mut *arrivals));
                }
            }
            if Instant::now() > until {
                return Err(Error::new(ErrorKind::Timeout, "messages did not come in time"));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// The first failure, or none.
async fn all_stored(mut receipts: mpsc::UnboundedReceiver<Receipt>) -> Result<()> {
    while let Some(receipt) = receipts.recv().await {
        receipt.await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_tells_when_it_was_due_and_keeps_its_size() {
        let payload = stamped(Payloads::new(100), 123_456_789_012);
        assert_eq!((payload.len(), due_of(&payload)), (100, Some(123_456_789_012)));
        assert_eq!(due_of(b"{\"order\":1}"), None);
    }
}
