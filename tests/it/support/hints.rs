//! What subscriptions hear.

use std::time::Duration;

use futures_util::StreamExt;
use shardmq::PartitionId;
use shardmq::notifier::{Hint, Hints};

use super::within;

const SOON: Duration = Duration::from_secs(15);

/// Waits until hints arrive.
pub async fn arrive(hints: &mut Hints) {
    within(SOON, "hints arrive", async { while hints.next().await != Some(Hint::Look) {} }).await;
}

/// Waits until they do not arrive.
pub async fn interrupted(hints: &mut Hints) {
    let interrupted = async { while hints.next().await != Some(Hint::Interrupted) {} };
    within(SOON, "hints are interrupted", interrupted).await;
}

/// Waits for a hint of this partition.
pub async fn hears(hints: &mut Hints, partition: PartitionId) {
    let hint = async {
        while !matches!(hints.next().await, Some(Hint::Partitions(p)) if p.contains(&partition)) {}
    };
    within(SOON, "a hint", hint).await;
}
