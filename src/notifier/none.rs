//! No hints at all.

use futures_util::{StreamExt, stream};

use crate::id::{NodeId, PartitionId};
use crate::notifier::{Health, HealthCell, Hint, Hints, Notifier};

/// Carries nothing: consumers find messages by looking, every 50 ms where some came lately, and less often
/// up to their poll interval. For databases where nothing may listen.
#[derive(Debug)]
pub struct NoNotifier(HealthCell);

impl NoNotifier {
    /// One that carries nothing.
    pub fn new() -> Self {
        let health = HealthCell::new();
        health.give_up("there is no notifier: consumers look by themselves");
        Self(health)
    }
}

impl Default for NoNotifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Notifier for NoNotifier {
    fn publish(&self, _: &[PartitionId]) {}

    fn subscribe(&self, _: &[PartitionId]) -> Hints {
        Box::pin(stream::iter([Hint::Interrupted]).chain(stream::pending()))
    }

    fn health(&self, _: NodeId) -> Health {
        self.0.get()
    }
}
