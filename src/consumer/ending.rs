//! How a consumer ends that nobody shut down: its topic is gone, or its cluster or its runtime has
//! ended.
//!
//! ```text
//! end_with(error) ──┐                      ┌─> the stream hands out nothing more: the error, once, then its end
//! cluster shut down ├─> the stream closes ─┤
//! tasks dropped ────┘                      └─> the members give back what they can
//! ```
//!
//! The stream closes at once, whatever the members still wait for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use crate::consumer::{Shared, lock};
use crate::error::{Error, ErrorKind};

/// Lives in the task that waits for all members. A runtime that ends drops its tasks, and tells
/// nobody.
pub(super) struct Life {
    shared: Arc<Shared>,
}

impl Life {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared) }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let shared = &self.shared;
        if shared.left.is_cancelled() {
            return;
        }
        let what = format!(
            "consume topic {}: the runtime that the consumer was made in has ended",
            shared.topology.topic
        );
        shared.end_with(Error::new(ErrorKind::Closed, what));
        lock(&shared.commands).clear();
        drop(lock(&shared.failures).take());
        if let Some(journal) = &shared.journal {
            journal.close();
        }
        shared.left.cancel();
    }
}

impl Shared {
    /// Ends the stream with this error, once all is handed out that is there: the first counts. The
    /// members commit and give back what they can in the background.
    pub(super) fn end_with(&self, why: Error) {
        if self.stopped.load(Ordering::Acquire) {
            // A shutdown is under way: its caller knows why.
            self.close_stream();
            return;
        }
        let _ = self.ended_by.set(why);
        self.close_stream();
        drop(self.stop(Instant::now()));
    }

    /// The stream hands out nothing more, and ends.
    pub(super) fn close_stream(&self) {
        drop(lock(&self.events).take());
    }

    /// What a caller is told for whom this consumer can do nothing more.
    pub(super) fn closed(&self) -> Error {
        self.ended_by.get().cloned().unwrap_or_else(|| Error::closed("the consumer"))
    }

    /// A topic that was deleted ends its consumers, also where another one of its name was made.
    pub(super) async fn end_with_the_topic(&self) {
        tokio::select! {
            ended = self.cluster.inner.topology.ended(&self.topology) => {
                self.end_with(ended.error(&self.topology.topic));
            }
            () = self.left.cancelled() => {}
        }
    }

    /// A cluster that is shut down ends its streams at once, whatever its nodes still have to
    /// answer.
    pub(super) async fn close_with_the_cluster(&self) {
        tokio::select! {
            () = self.cluster.inner.shutdown.cancelled() => self.close_stream(),
            () = self.left.cancelled() => {}
        }
    }
}
