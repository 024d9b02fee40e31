//! The stream of deliveries, and what one can do with a delivery.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::mpsc;

use crate::consumer::again::Failed;
use crate::consumer::builder::Options;
use crate::consumer::delivery::Delivery;
use crate::consumer::holding::Hand;
use crate::consumer::lanes::{Lanes, Unread};
use crate::consumer::{ConsumerHandle, Event};
use crate::error::{Error, Result};
use crate::metrics as names;
use crate::name::TopicName;

/// The messages of a consumer: an endless [`Stream`] of deliveries, each partition in order.
///
/// It goes on through restarts and failures of servers, and ends after
/// [`shutdown`](ConsumerHandle::shutdown), or with its cluster. An error in it is news, of the kind
/// [`LeaseLost`](crate::ErrorKind::LeaseLost) where a partition went to another consumer. Two are its last
/// item: [`NotFound`](crate::ErrorKind::NotFound) where its topic is gone, and
/// [`Closed`](crate::ErrorKind::Closed) where the tokio runtime that it was made in has ended.
///
/// Dropping it gives its partitions back in the background, also where a handle is kept; what was
/// acknowledged is committed if the runtime still lives, else it is delivered again.
#[must_use = "a stream does nothing unless polled"]
pub struct Messages {
    pub(super) events: mpsc::UnboundedReceiver<Event>,
    /// The batch that is being handed out.
    current: Option<Unread>,
    /// Of that batch.
    handed: u64,
    /// What was handed out and failed.
    pub(super) failed: Failed,
    pub(super) lanes: Lanes,
    topic: TopicName,
    /// Why it ended was told.
    is_told: bool,
    pub(super) handle: ConsumerHandle,
}

impl Messages {
    pub(crate) fn new(
        events: mpsc::UnboundedReceiver<Event>,
        topic: TopicName,
        handle: ConsumerHandle,
    ) -> Self {
        let Options { order, prefetch_bytes, .. } = handle.shared.options;
        let failed = Failed::new(order, prefetch_bytes);
        let lanes = Lanes::default();
        Self { events, current: None, handed: 0, failed, lanes, topic, is_told: false, handle }
    }

    /// A handle to flush and to shut down with, from anywhere.
    pub fn handle(&self) -> ConsumerHandle {
        self.handle.clone()
    }

    /// The next delivery; `None` after a shutdown, and behind an error that is the last item. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Delivery>> {
        futures_util::StreamExt::next(self).await
    }

    /// The next deliveries, at least one and at most so many: waits for the first only. `None` after a
    /// shutdown. Cancel safe.
    pub async fn next_batch(&mut self, most: usize) -> Option<Result<Vec<Delivery>>> {
        let first = match self.next().await? {
            Ok(first) => first,
            Err(news) => return Some(Err(news)),
        };
        let mut batch = vec![first];
        while batch.len() < most
            && let Some(delivery) = self.hand_out()
        {
            batch.push(delivery);
        }
        Some(Ok(batch))
    }

    /// Commits what was acknowledged; see [`ConsumerHandle::flush`].
    pub async fn flush(&self) -> Result<()> {
        self.handle.flush().await
    }

    /// Ends consuming; see [`ConsumerHandle::shutdown`].
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        self.handle.shutdown(deadline).await
    }

    /// The next message: one that failed and is due, else of what was fetched.
    fn hand_out(&mut self) -> Option<Delivery> {
        if !self.failed.is_empty()
            && !self.handle.is_shutting_down()
            && let Some(again) = self.hand_out_again()
        {
            return Some(again);
        }
        loop {
            // In place: this is what happens for each message.
            let end = match &mut self.current {
                Some(_) if self.handle.is_shutting_down() => break,
                Some(batch) if self.failed.is_empty() => match batch.hand_out() {
                    Some(Ok(delivery)) => {
                        self.handed += 1;
                        return Some(delivery.handed());
                    }
                    other => other.and_then(Result::err),
                },
                Some(batch) => match self.failed.keep(batch) {
                    Some(true) => continue,
                    Some(false) => {
                        self.count();
                        if let Some(blocked) = self.current.take() {
                            self.failed.block(blocked.owner());
                            self.lanes.keep_busy(blocked);
                        }
                        continue;
                    }
                    None => match batch.hand_out() {
                        Some(Ok(delivery)) => {
                            self.handed += 1;
                            return Some(delivery.handed());
                        }
                        other => other.and_then(Result::err),
                    },
                },
                None => {
                    self.current = Some(self.lanes.next()?);
                    continue;
                }
            };
            self.count();
            match (self.current.take(), end) {
                (Some(batch), None) => self.lanes.finish(batch),
                (Some(batch), Some(Hand::Wait)) => self.lanes.park(batch),
                // With what is left of the partition.
                (Some(batch), Some(_)) => self.lanes.give_back(batch),
                (None, _) => {}
            }
        }
        self.clear();
        None
    }

    /// Nothing more is handed out.
    fn clear(&mut self) {
        self.count();
        self.current = None;
        self.lanes.clear();
        self.failed.clear();
    }

    /// One that failed and is due, or that waited for the key of one.
    fn hand_out_again(&mut self) -> Option<Delivery> {
        let delivery = self.failed.next();
        self.unblock();
        ::metrics::counter!(names::DELIVERED).increment(delivery.is_some().into());
        delivery.map(Delivery::handed)
    }

    /// Less is kept than before: what was blocked by that may try again.
    fn unblock(&mut self) {
        for owner in self.failed.unblocked() {
            self.lanes.free(owner);
        }
    }

    /// What is left of the batch that was being handed out waits for its turn again.
    pub(super) fn put_back(&mut self) {
        if let Some(batch) = self.current.take() {
            self.count();
            self.lanes.give_back(batch);
        }
    }

    fn count(&mut self) {
        ::metrics::counter!(names::DELIVERED).increment(std::mem::take(&mut self.handed));
    }

    /// It has ended: the reason, once, where nobody shut it down.
    pub(super) fn end(&mut self) -> Option<Error> {
        self.clear();
        let is_told = std::mem::replace(&mut self.is_told, true);
        self.handle.shared.ended_by.get().filter(|_| !is_told).cloned()
    }

    /// Takes in what has come; returns news for whoever consumes, or that all has ended.
    fn take_in(&mut self, context: &mut Context<'_>) -> Poll<Option<Error>> {
        loop {
            match self.events.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Event::Error(news))) => {
                    // The shutdown returns it.
                    if !self.handle.is_shutting_down() {
                        return Poll::Ready(Some(news));
                    }
                }
                Poll::Ready(Some(event)) => self.absorb(event),
            }
        }
    }

    pub(super) fn absorb(&mut self, event: Event) {
        match event {
            Event::Batch(read) => {
                let filter = self.handle.shared.options.filter.clone();
                self.lanes.push(Unread::new(read, &self.topic, filter));
            }
            Event::Parked { holding, row, again, room } => {
                self.lanes.push(Unread::parked((holding, row), again, &self.topic, room));
            }
            Event::Failed(failed) => self.failed.hold(&failed),
            Event::Due(resting) => {
                self.failed.absorb(resting);
                self.unblock();
            }
            Event::Turn(owner) => {
                self.failed.turn(owner);
                self.lanes.turn(owner);
            }
            Event::Pressure => {
                self.handle.shared.pressed.store(false, Ordering::Release);
                self.lanes.make_room();
            }
            Event::Error(_) => {}
        }
    }
}

impl Stream for Messages {
    type Item = Result<Delivery>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // What has come is looked at between any two messages: a handler may take long for each, and what is
        // due, resumed or lost by now must not wait for all that was fetched before.
        if self.current.is_some()
            && self.events.is_empty()
            && !self.events.is_closed()
            && let Some(delivery) = self.hand_out()
        {
            return Poll::Ready(Some(Ok(delivery)));
        }
        match self.take_in(context) {
            Poll::Ready(Some(news)) => Poll::Ready(Some(Err(news))),
            Poll::Ready(None) => Poll::Ready(self.end().map(Err)),
            Poll::Pending => match self.hand_out() {
                Some(delivery) => Poll::Ready(Some(Ok(delivery))),
                None => Poll::Pending,
            },
        }
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.handle.abandon();
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").field("topic", &self.topic).finish_non_exhaustive()
    }
}
