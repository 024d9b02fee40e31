//! The topic that a producer writes to may be deleted, and another one of its name be made: the
//! producer goes on with that. What was sent to the one before is answered by its own lanes, which
//! end then.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use tokio_util::sync::CancellationToken;

use crate::cluster::{Cache, Ended};
use crate::name::TopicName;
use crate::producer::desertion::spawn;
use crate::producer::{Shared, failover, writer};
use crate::topology::Topology;

/// A producer's lanes, and those of topics of its name that were before, while something is left in
/// them.
pub(super) struct Lines {
    pub(super) topic: TopicName,
    lines: RwLock<(Arc<Shared>, Vec<Arc<Shared>>)>,
}

impl Lines {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        begin(&shared);
        Self { topic: shared.topology.topic.clone(), lines: RwLock::new((shared, Vec::new())) }
    }

    /// Those of the topic as it is now.
    pub(super) fn current(&self) -> Arc<Shared> {
        Arc::clone(&self.lines.read().unwrap_or_else(PoisonError::into_inner).0)
    }

    /// All in that something may be left.
    pub(super) fn all(&self) -> Vec<Arc<Shared>> {
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        lines.1.iter().chain([&lines.0]).map(Arc::clone).collect()
    }

    /// Goes on with another topic of the same name, unless the producer is shut down.
    fn go_on(&self, next: Topology) {
        let mut lines = self.lines.write().unwrap_or_else(PoisonError::into_inner);
        let before = Arc::clone(&lines.0);
        if before.closed.load(Ordering::Acquire) {
            return;
        }
        tracing::warn!(topic = %self.topic, "another topic of this name was made: messages go there");
        let why = Ended::Another(next.clone()).error(&self.topic);
        let next = Arc::new(before.for_another(next));
        begin(&next);
        lines.0 = next;
        lines.1.retain(|line| !line.ended.is_cancelled());
        lines.1.push(Arc::clone(&before));
        drop(lines);
        before.end_with(why);
    }
}

/// Starts the tasks of a topic's lanes.
fn begin(shared: &Arc<Shared>) {
    for line_writer in shared.writers.values() {
        spawn(shared, writer::run(Arc::clone(shared), Arc::clone(line_writer)));
    }
    spawn(shared, failover::watch(Arc::clone(shared)));
}

/// Watches over the topic until the producer ends.
pub(super) async fn watch(lines: Weak<Lines>) {
    loop {
        let Some(current) = lines.upgrade().map(|lines| lines.current()) else { return };
        let (cache, topology) =
            (Arc::clone(&current.cluster.inner.topology), current.topology.clone());
        let ended: CancellationToken = current.ended.clone();
        drop(current);
        let next = tokio::select! {
            next = next(&cache, &topology) => next,
            () = ended.cancelled() => return,
        };
        let Some(lines) = lines.upgrade() else { return };
        lines.go_on(next);
    }
}

/// Returns the topic that has this one's name next.
async fn next(cache: &Arc<Cache>, topology: &Topology) -> Topology {
    let mut news = cache.news();
    if let Ended::Another(next) = cache.ended(topology).await {
        return next;
    }
    tracing::warn!(topic = %topology.topic, "the topic was deleted: nothing can be sent to it");
    loop {
        match cache.topic(&topology.topic).await {
            Ok(next) if next.id != topology.id => return next,
            // Where the control database is away: looked up again with its next news.
            _ => drop(news.changed().await),
        }
    }
}
