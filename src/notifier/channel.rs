//! What notifiers over a server have in common: those who listen to a node, and hints that wait to be sent.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::{Notify, broadcast, broadcast::error::RecvError};

use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::notifier::{HealthCell, Hint, Hints};

/// Why hints do not arrive once a task of the notifier has ended.
pub(super) const ENDED: &str = "the notifier was shut down, or its runtime ended";
/// Hints that a slow subscriber may be behind.
const CAPACITY: usize = 1024;
/// For how long a node is listened to that nobody is subscribed to any more.
const LINGER: Duration = Duration::from_secs(1);

/// Those who listen to a node.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) node: NodeId,
    hints: broadcast::Sender<Hint>,
    pub(super) health: HealthCell,
}

impl Channel {
    pub(super) fn new(node: NodeId) -> Self {
        Self { node, hints: broadcast::channel(CAPACITY).0, health: HealthCell::new() }
    }

    /// Hears of these partitions from now on: the stream first says how things are.
    pub(super) fn subscribe(&self, wanted: Arc<HashSet<PartitionId>>) -> Hints {
        // First this: what changes meanwhile is heard.
        let receiver = self.hints.subscribe();
        let now = if self.health.is_ok() { Hint::Look } else { Hint::Interrupted };
        let later = stream::unfold((receiver, wanted), |(mut receiver, wanted)| async move {
            let hint = loop {
                match receiver.recv().await {
                    Ok(Hint::Partitions(mut partitions)) => {
                        partitions.retain(|partition| wanted.contains(partition));
                        if !partitions.is_empty() {
                            break Hint::Partitions(partitions);
                        }
                    }
                    Ok(hint) => break hint,
                    Err(RecvError::Lagged(_)) => break Hint::Look,
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            };
            Some((hint, (receiver, wanted)))
        });
        Box::pin(stream::iter([now]).chain(later))
    }

    /// Whether somebody is subscribed.
    pub(super) fn is_heard(&self) -> bool {
        self.hints.receiver_count() > 0
    }

    /// Returns when nobody has been subscribed for a while: who comes next may be close behind.
    pub(super) async fn unheard(&self) {
        while self.is_heard() {
            self.hints.closed().await;
            tokio::time::sleep(LINGER).await;
        }
    }

    /// Begins to listen: hints do not arrive yet, which is no fault.
    pub(super) fn begin(&self) {
        self.health.begin();
    }

    /// Hints were heard.
    pub(super) fn hear(&self, partitions: Vec<PartitionId>) {
        if !partitions.is_empty() {
            let _ = self.hints.send(Hint::Partitions(partitions));
        }
    }

    /// Hints arrive from now on.
    pub(super) fn arrive(&self) {
        let after = self.health.arrive();
        let _ = self.hints.send(Hint::Look);
        if let Some(after) = after {
            let after_ms = after.as_millis();
            tracing::debug!(node = %self.node, after_ms, "hints arrive");
        }
    }

    /// A canary was heard after so long.
    pub(super) fn measured(&self, round_trip: Duration) {
        self.health.measured(round_trip);
        ::metrics::histogram!(names::NOTIFIER_ROUND_TRIP).record(round_trip.as_secs_f64());
    }

    /// Hints do not arrive.
    pub(super) fn interrupt(&self, error: &str) {
        if self.health.interrupt(error) {
            let _ = self.hints.send(Hint::Interrupted);
        }
    }

    /// Nobody listens any more.
    pub(super) fn rest(&self) {
        let arrived = self.health.is_ok();
        self.health.rest();
        if arrived {
            let _ = self.hints.send(Hint::Interrupted);
        }
    }

    /// Hints can't arrive as things are set.
    pub(super) fn give_up(&self, error: &str) {
        let arrived = self.health.is_ok();
        self.health.give_up(error);
        if arrived {
            let _ = self.hints.send(Hint::Interrupted);
        }
    }
}

/// Hints that wait to be sent: no more than there are partitions.
#[derive(Debug, Default)]
pub(super) struct Pending {
    partitions: Mutex<BTreeSet<PartitionId>>,
    added: Notify,
}

impl Pending {
    pub(super) fn add(&self, partitions: &[PartitionId]) {
        lock(&self.partitions).extend(partitions);
        self.added.notify_one();
    }

    /// Returns when something was added since it returned last. Cancel safe.
    pub(super) async fn added(&self) {
        self.added.notified().await;
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.partitions).is_empty()
    }

    /// Takes at most so many.
    pub(super) fn take(&self, most: usize) -> Vec<PartitionId> {
        let mut pending = lock(&self.partitions);
        let rest = pending.iter().nth(most).copied();
        let rest = rest.map(|from| pending.split_off(&from)).unwrap_or_default();
        std::mem::replace(&mut *pending, rest).into_iter().collect()
    }
}

/// Partitions as text, and back. Anybody who may log in may notify: what is no partition is ignored.
pub(super) fn payload(partitions: &[PartitionId]) -> String {
    let names: Vec<String> = partitions.iter().map(ToString::to_string).collect();
    names.join(",")
}

pub(super) fn parse(payload: &str) -> Vec<PartitionId> {
    payload.split(',').filter_map(|name| name.parse().ok()).collect()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The hints of several channels as one; without any there is nothing to hear, and it does not end either.
pub(super) fn merged(streams: Vec<Hints>) -> Hints {
    Box::pin(stream::select_all(streams).chain(stream::pending()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_parsed_strictly() {
        let partitions = parse("10101,20101,x,,10199,-10101");
        assert_eq!(partitions.len(), 2);
        assert_eq!(partitions[1], PartitionId::new(1, 99).unwrap());
        assert_eq!(parse(&payload(&partitions)), partitions);
        assert!(parse("beat").is_empty());
    }

    #[test]
    fn what_waits_is_merged_and_taken_in_parts() {
        let pending = Pending::default();
        let all: Vec<_> = (1..=5).map(|table| PartitionId::new(1, table).unwrap()).collect();
        for _ in 0..100 {
            pending.add(&all);
        }
        assert_eq!(pending.take(3), all[..3]);
        assert_eq!(pending.take(3), all[3..]);
        assert!(pending.take(3).is_empty());
    }

    #[tokio::test]
    async fn a_subscription_first_says_how_things_are() {
        let channel = Channel::new(NodeId::new(1).unwrap());
        let partition = PartitionId::new(1, 1).unwrap();
        let wanted = Arc::new(HashSet::from([partition]));
        let mut before = channel.subscribe(Arc::clone(&wanted));
        assert_eq!(before.next().await, Some(Hint::Interrupted));
        channel.arrive();
        assert_eq!(before.next().await, Some(Hint::Look));
        let mut after = channel.subscribe(wanted);
        assert_eq!(after.next().await, Some(Hint::Look));
        channel.interrupt("gone");
        channel.interrupt("still gone");
        channel.arrive();
        channel.hear(vec![partition]);
        for hints in [&mut before, &mut after] {
            assert_eq!(hints.next().await, Some(Hint::Interrupted));
            assert_eq!(hints.next().await, Some(Hint::Look));
            assert_eq!(hints.next().await, Some(Hint::Partitions(vec![partition])));
        }
        channel.give_up("a pooler");
        assert_eq!(after.next().await, Some(Hint::Interrupted));
    }
}
