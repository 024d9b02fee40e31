//! Partitions whose day table could not be read: somebody has locked it, or it is broken.
//!
//! Looks leave such a partition out, and its readers try one after the other, however many groups
//! of this process have it: of a node's few connections one at most waits for a table.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::id::{NodeId, PartitionId};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Stuck {
    all: Mutex<HashSet<PartitionId>>,
    /// Held by the reader that tries.
    turns: Mutex<HashMap<NodeId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Stuck {
    pub(crate) fn has(&self, partition: PartitionId) -> bool {
        lock(&self.all).contains(&partition)
    }

    /// Its table could not be read. True where that is news.
    pub(crate) fn add(&self, partition: PartitionId) -> bool {
        lock(&self.all).insert(partition)
    }

    /// Its table was read.
    pub(crate) fn remove(&self, partition: PartitionId) {
        lock(&self.all).remove(&partition);
    }

    /// A turn to try, where the partition is among these. Waits for others; cancel safe.
    pub(crate) async fn turn(&self, partition: PartitionId) -> Option<OwnedMutexGuard<()>> {
        if !self.has(partition) {
            return None;
        }
        let turn = Arc::clone(lock(&self.turns).entry(partition.node()).or_default());
        Some(turn.lock_owned().await)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
