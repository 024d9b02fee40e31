//! The end of the runtime that a producer was made in, while the producer lives on in a static or in another
//! runtime: nobody would answer any more. A task that is dropped before its end shows it, so that all that
//! waits is answered at once, and what comes later too.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind};
use crate::producer::shared::Shared;

const WHY: &str = "the runtime in which the producer was made has ended, or a task of the producer has \
                   panicked: make cluster and producer in a runtime that lives as long as they do";

/// Runs a task of a producer's.
pub(super) fn spawn(shared: &Arc<Shared>, task: impl Future<Output = ()> + Send + 'static) {
    let watch = Watch(Some(Arc::clone(shared)));
    shared.cluster.inner.tasks.spawn(async move {
        task.await;
        watch.finished();
    });
}

/// A task that has not ended.
struct Watch(Option<Arc<Shared>>);

impl Watch {
    fn finished(mut self) {
        self.0 = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.desert();
        }
    }
}

impl Shared {
    /// Answers all that waits: nobody else does any more.
    fn desert(&self) {
        self.deserted.store(true, Ordering::Release);
        self.budget.close();
        self.ended.cancel();
        let unknown = Error::with_source(
            ErrorKind::Unknown,
            "the message was under way when its producer ended: it may be stored, or not",
            WHY,
        );
        let _moving = self.moving();
        let mut dropped = 0;
        for lane in &self.lanes {
            dropped += self.abandon(lane);
            if let Some(completion) = lane.in_flight() {
                completion.give_up(&unknown);
            }
        }
        if dropped > 0 {
            let topic = &self.topology.topic;
            tracing::error!(%topic, dropped, "a producer has ended with its runtime: messages were not sent");
        }
    }

    /// Why the producer takes nothing.
    pub(super) fn why_closed(&self) -> Error {
        if self.deserted.load(Ordering::Acquire) {
            let what = "the producer has ended";
            return Error::with_source(ErrorKind::Closed, what, WHY);
        }
        let closed = self.closed.load(Ordering::Acquire);
        Error::closed(if closed { "the producer" } else { "the producer or its cluster" })
    }
}
