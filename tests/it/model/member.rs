//! A member on a thread of its own, as if it was a process.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use shardmq::{Cluster, Delivery, Messages};

use super::{LEASE, SECOND, SOON};
use crate::command::verify::Random;
use crate::support::within;

/// What a member has seen or done.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    Delivered {
        id: i64,
        token: u64,
    },
    /// Accepted, which does not say that it was committed.
    Acked {
        id: i64,
        token: u64,
    },
    /// Everything that was accepted before is committed; or some of it is not, and never will be.
    Flushed {
        good: bool,
    },
}

type Step = Box<dyn FnOnce(&mut Hands) + Send>;

/// A member on a thread of its own, which stands still between two steps unless it is told to run.
pub struct Member {
    pub steps: mpsc::Sender<Step>,
    pub events: mpsc::Receiver<Event>,
    pub thread: std::thread::JoinHandle<()>,
    /// Accepted acknowledgements that no flush has confirmed.
    pub unconfirmed: BTreeSet<i64>,
    pub name: usize,
}

/// What a member works with.
pub struct Hands {
    pub runtime: Option<tokio::runtime::Runtime>,
    pub messages: Option<Messages>,
    pub in_hand: Vec<Delivery>,
    pub events: mpsc::Sender<Event>,
}

impl Hands {
    /// Takes so many messages, if they come in time; with none it lets the rest of the member run.
    pub fn take(&mut self, most: usize, patience: Duration) {
        let (Some(runtime), Some(messages)) = (&self.runtime, &mut self.messages) else { return };
        let until = tokio::time::Instant::now() + patience;
        if most == 0 {
            return runtime.block_on(async { tokio::time::sleep_until(until).await });
        }
        for _ in 0..most {
            let next =
                runtime.block_on(async { tokio::time::timeout_at(until, messages.next()).await });
            match next {
                Ok(Some(Ok(delivery))) => {
                    let (id, token) = (delivery.id().number(), delivery.fencing_token());
                    self.events.send(Event::Delivered { id, token }).unwrap();
                    self.in_hand.push(delivery);
                }
                // News of a partition that was lost.
                Ok(Some(Err(_))) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    pub fn ack(&mut self, mut random: Random, percent: u64) {
        let mut kept = Vec::new();
        while !self.in_hand.is_empty() {
            let at = usize::try_from(random.below(self.in_hand.len() as u64)).unwrap();
            let delivery = self.in_hand.swap_remove(at);
            if random.below(100) >= percent {
                kept.push(delivery);
                continue;
            }
            let (id, token) = (delivery.id().number(), delivery.fencing_token());
            if delivery.ack().is_ok() {
                self.events.send(Event::Acked { id, token }).unwrap();
            }
        }
        self.in_hand = kept;
    }

    pub fn flush(&mut self) {
        let (Some(runtime), Some(messages)) = (&self.runtime, &self.messages) else { return };
        let flushed =
            runtime.block_on(async { tokio::time::timeout(8 * SECOND, messages.flush()).await });
        let good = matches!(flushed, Ok(Ok(())));
        self.events.send(Event::Flushed { good }).unwrap();
    }

    pub fn leave(&mut self) {
        self.in_hand.clear();
        if let (Some(runtime), Some(messages)) = (&self.runtime, self.messages.take()) {
            let good = runtime.block_on(messages.shutdown(SECOND)).is_ok();
            self.events.send(Event::Flushed { good }).unwrap();
        }
    }

    /// All its connections end, and nothing else.
    pub fn die(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
        self.in_hand.clear();
        self.messages = None;
    }
}

impl Member {
    pub fn join(name: usize, control_url: &str) -> Self {
        let (steps, receiver) = mpsc::channel::<Step>();
        let (sender, events) = mpsc::channel();
        let url = control_url.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let messages = runtime.block_on(async {
                let cluster = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
                let builder = cluster.consumer("orders", "g").lease(LEASE);
                let builder = builder.flush_interval(LEASE / 4).poll_interval(LEASE / 5);
                // Small: what is fetched and not handed out must not be lost track of either.
                builder.prefetch_messages(30).max_unacked(60).stream().await.unwrap()
            });
            let mut hands = Hands {
                runtime: Some(runtime),
                messages: Some(messages),
                in_hand: Vec::new(),
                events: sender,
            };
            while let Ok(step) = receiver.recv() {
                step(&mut hands);
            }
        });
        Self { steps, events, thread, unconfirmed: BTreeSet::new(), name }
    }

    pub async fn run<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Hands) -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = tokio::sync::oneshot::channel();
        let step = move |hands: &mut Hands| sender.send(step(hands)).ok().unwrap();
        self.steps.send(Box::new(step)).unwrap();
        within(SOON, "a step of a member", answer).await.unwrap()
    }

    pub async fn end(self) {
        drop(self.steps);
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}
