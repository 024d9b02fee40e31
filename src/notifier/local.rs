//! Hints within one process, without any server.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::id::{NodeId, PartitionId};
use crate::notifier::{Health, HealthCell, Hint, Hints, Notifier};

/// How many hints a slow subscriber may be behind before it is told to look at everything.
const CAPACITY: usize = 1024;

/// Carries hints between producers and consumers that share this value: for programs that have both in
/// one process, and for tests.
#[derive(Debug, Clone)]
pub struct LocalNotifier {
    hints: broadcast::Sender<Vec<PartitionId>>,
    health: Arc<HealthCell>,
}

impl LocalNotifier {
    /// A notifier that nobody has subscribed to yet.
    pub fn new() -> Self {
        let health = HealthCell::new();
        health.arrive();
        Self { hints: broadcast::channel(CAPACITY).0, health: Arc::new(health) }
    }
}

impl Default for LocalNotifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifier for LocalNotifier {
    fn publish(&self, partitions: &[PartitionId]) {
        // An error says that nobody listens.
        let _ = self.hints.send(partitions.to_vec());
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let wanted: HashSet<PartitionId> = partitions.iter().copied().collect();
        let receiver = self.hints.subscribe();
        let later = stream::unfold((receiver, wanted), |(mut receiver, wanted)| async move {
            let hint = loop {
                match receiver.recv().await {
                    Ok(mut partitions) => {
                        partitions.retain(|partition| wanted.contains(partition));
                        if !partitions.is_empty() {
                            break Hint::Partitions(partitions);
                        }
                    }
                    Err(RecvError::Lagged(_)) => break Hint::Look,
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            };
            Some((hint, (receiver, wanted)))
        });
        Box::pin(stream::once(async { Hint::Look }).chain(later))
    }

    fn health(&self, _: NodeId) -> Health {
        self.health.get()
    }
}
