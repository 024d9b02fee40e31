//! Senders that never rest, and what was acknowledged to them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::{Message, MessageId, Producer};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{eventually, within};

const SOON: Duration = Duration::from_secs(20);

/// Eight of them on one producer.
pub struct Senders {
    acknowledged: Arc<Mutex<Vec<(MessageId, String)>>>,
    phase: Arc<AtomicU32>,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Senders {
    /// Starts them. Each text begins with a name, and the phase in which its send began: 0 at
    /// first.
    pub fn start(producer: &Producer, name: &str) -> Self {
        let mut this = Self {
            acknowledged: Arc::default(),
            phase: Arc::default(),
            stop: CancellationToken::new(),
            tasks: Vec::new(),
        };
        for sender in 0..8 {
            let (producer, stop, phase) =
                (producer.clone(), this.stop.clone(), Arc::clone(&this.phase));
            let (acknowledged, name) = (Arc::clone(&this.acknowledged), name.to_owned());
            this.tasks.push(tokio::spawn(async move {
                for number in 0.. {
                    let phase = phase.load(Ordering::Acquire);
                    let text = format!("{name} {phase} {sender}-{number}");
                    if let Ok(id) = producer.send(Message::new(text.clone())).await {
                        acknowledged.lock().unwrap().push((id, text));
                    }
                    if stop.is_cancelled() {
                        return;
                    }
                }
            }));
        }
        this
    }

    /// Sends that begin from now on are of this phase.
    pub fn enter(&self, phase: u32) {
        self.phase.store(phase, Ordering::Release);
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until so many more are acknowledged.
    pub async fn go_on(&self, more: usize) {
        let before = self.count();
        eventually("messages are acknowledged", 2 * SOON, async || self.count() >= before + more)
            .await;
    }

    /// Ends them. All that was acknowledged.
    pub async fn end(self) -> Vec<(MessageId, String)> {
        self.stop.cancel();
        for task in self.tasks {
            within(SOON, "the end of a sender", task).await.unwrap();
        }
        self.acknowledged.lock().unwrap().clone()
    }
}
