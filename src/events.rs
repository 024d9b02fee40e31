//! What producers and consumers tell about themselves, as it happens.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::broadcast::{self, error::RecvError};

/// How many events wait for who is slow.
const KEPT: usize = 256;

/// Tells events to whoever listens.
#[derive(Debug)]
pub(crate) struct Teller<T>(broadcast::Sender<T>);

impl<T: Clone + Send + 'static> Teller<T> {
    pub(crate) fn new() -> Self {
        Self(broadcast::channel(KEPT).0)
    }

    pub(crate) fn tell(&self, event: T) {
        // An error says that nobody listens.
        let _ = self.0.send(event);
    }

    /// What is told from now on, until the teller is dropped.
    pub(crate) fn listen(&self) -> Events<T> {
        self.listen_after(Vec::new)
    }

    /// The same, after what is so now, which may be told once more.
    pub(crate) fn listen_after(&self, now: impl FnOnce() -> Vec<T>) -> Events<T> {
        let receiver = self.0.subscribe();
        Events(stream::iter(now()).chain(Events::new(receiver)).boxed())
    }
}

/// The events of a producer or a consumer, as they happen. Who is slow misses those beyond 256.
#[must_use = "a stream does nothing unless polled"]
pub struct Events<T>(BoxStream<'static, T>);

impl<T: Clone + Send + 'static> Events<T> {
    fn new(receiver: broadcast::Receiver<T>) -> Self {
        let events = stream::unfold(receiver, |mut receiver| async {
            loop {
                match receiver.recv().await {
                    Ok(event) => return Some((event, receiver)),
                    // Some are missed.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        });
        Self(events.boxed())
    }

    /// The next event; `None` when whoever tells them has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<T> {
        self.0.next().await
    }
}

impl<T> Stream for Events<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        self.0.poll_next_unpin(context)
    }
}
