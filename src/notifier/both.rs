//! Two notifiers at once: while a cluster moves from one to the other, or so that one may fail.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};

use crate::id::{NodeId, PartitionId};
use crate::notifier::{Health, Hint, Hints, Notifier};

/// Publishes through two notifiers, and hears from both. Hints arrive as long as one of them is well; each is
/// usually heard twice, which costs a look at an empty table.
#[derive(Debug, Clone)]
pub struct Both {
    first: Arc<dyn Notifier>,
    second: Arc<dyn Notifier>,
}

impl Both {
    /// Of these two.
    pub fn new(first: impl Notifier, second: impl Notifier) -> Self {
        Self { first: Arc::new(first), second: Arc::new(second) }
    }

    /// How hints arrive by each of them.
    pub fn healths(&self, node: NodeId) -> [Health; 2] {
        [self.first.health(node), self.second.health(node)]
    }
}

impl Notifier for Both {
    fn publish(&self, partitions: &[PartitionId]) {
        self.first.publish(partitions);
        self.second.publish(partitions);
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let (first, second) = (self.first.subscribe(partitions), self.second.subscribe(partitions));
        let nodes: BTreeSet<NodeId> = partitions.iter().map(|partition| partition.node()).collect();
        let both = self.clone();
        // Where one of them is interrupted, hints arrive by the other.
        let stands = move |hint: &Hint| {
            let arrive = || nodes.iter().all(|node| both.health(*node).is_ok());
            std::future::ready(*hint != Hint::Interrupted || !arrive())
        };
        Box::pin(stream::select(first, second).filter(stands))
    }

    /// The better one's, with the errors of both: also where hints arrive by one of them only.
    fn health(&self, node: NodeId) -> Health {
        let healths = self.healths(node);
        let why = |health: &Health| match &health.error {
            Some(error) => Some(error.clone()),
            None => (!health.is_ok()).then(|| "no canary came back so far".to_owned()),
        };
        let errors: Vec<String> = healths.iter().filter_map(why).collect();
        let [first, second] = healths;
        let rank = |health: &Health| health.state.code();
        let mut better = if rank(&second) < rank(&first) { second } else { first };
        better.error = (!errors.is_empty()).then(|| errors.join("; "));
        better
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            futures_util::future::join(self.first.shutdown(), self.second.shutdown()).await;
        })
    }
}
