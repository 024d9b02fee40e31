//! The stream of deliveries, and what one can do with a delivery.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::Stream;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::codec::{Codec, Json};
use crate::consumer::holding::{Hand, Holding};
use crate::consumer::lanes::{Lanes, Unread};
use crate::consumer::{ConsumerHandle, Event};
use crate::error::{Error, Result};
use crate::id::{MessageId, PartitionId, Uid};
use crate::message::{DUPLICATE_HEADER, Headers, RESERVED_HEADER_PREFIX, UID_HEADER};
use crate::metrics as names;
use crate::name::{GroupName, TopicName};
use crate::store::fetch::Batch;

/// The messages of a consumer: an endless [`Stream`] of deliveries, each partition in order.
///
/// It goes on through restarts and failures of servers, and ends after
/// [`shutdown`](ConsumerHandle::shutdown) only. An error in it is news, not its end: of the kind
/// [`LeaseLost`](crate::ErrorKind::LeaseLost) where a partition went to another consumer.
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
    pub(super) lanes: Lanes,
    topic: TopicName,
    pub(super) handle: ConsumerHandle,
}

/// What all deliveries of a batch share, so that each has one count of references to keep.
pub(super) struct Origin {
    pub(super) holding: Arc<Holding>,
    pub(super) row: Arc<Batch>,
    pub(super) topic: TopicName,
}

impl Messages {
    pub(crate) fn new(
        events: mpsc::UnboundedReceiver<Event>,
        topic: TopicName,
        handle: ConsumerHandle,
    ) -> Self {
        Self { events, current: None, handed: 0, lanes: Lanes::default(), topic, handle }
    }

    /// A handle to flush and to shut down with, from anywhere.
    pub fn handle(&self) -> ConsumerHandle {
        self.handle.clone()
    }

    /// The next delivery; `None` after a shutdown. Cancel safe.
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

    /// The next message of what was fetched.
    fn hand_out(&mut self) -> Option<Delivery> {
        loop {
            // In place: this is what happens for each message.
            let end = match &mut self.current {
                Some(_) if self.handle.is_shutting_down() => break,
                Some(batch) => match batch.hand_out() {
                    Some(Ok(delivery)) => {
                        self.handed += 1;
                        return Some(delivery);
                    }
                    other => other.and_then(Result::err),
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
        self.count();
        self.current = None;
        self.lanes.clear();
        None
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
            Event::Turn(owner) => self.lanes.turn(owner),
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
        // A batch is handed out whole before it is looked what has come.
        if self.current.is_some()
            && let Some(delivery) = self.hand_out()
        {
            return Poll::Ready(Some(Ok(delivery)));
        }
        match self.take_in(context) {
            Poll::Ready(Some(news)) => Poll::Ready(Some(Err(news))),
            Poll::Ready(None) => Poll::Ready(None),
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

/// A message in your hands: owned, `Send`, free to go to another task.
///
/// Answer each with [`ack`](Self::ack). One that is dropped without is delivered again, by whoever has
/// the partition after this consumer; until then the group's position can't pass it.
pub struct Delivery {
    origin: Arc<Origin>,
    index: u32,
    attempt: u32,
    /// Answered, or never counted as handed out.
    answered: bool,
}

impl Delivery {
    /// Of a message that is counted as handed out.
    pub(super) fn new(origin: &Arc<Origin>, id: i64) -> Self {
        let index = u32::try_from(id - origin.row.base_id).unwrap_or(0);
        Self { origin: Arc::clone(origin), index, attempt: 1, answered: false }
    }

    /// The same message in other hands, which may acknowledge it; this one is what counts.
    pub(super) fn twin(&self, attempt: u32) -> Self {
        Self { origin: Arc::clone(&self.origin), index: self.index, attempt, answered: true }
    }

    /// Whether it was acknowledged.
    pub(super) fn is_acked(&self) -> bool {
        self.origin.holding.tracker().is_acked(self.number())
    }

    pub(super) fn holding(&self) -> &Holding {
        &self.origin.holding
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether the lease has run out, and it is not known whether the partition is another's.
    pub(super) fn is_lapsed(&self) -> bool {
        let holding = &self.origin.holding;
        holding.is_lapsed() && !holding.revoked.is_cancelled()
    }

    fn number(&self) -> i64 {
        self.origin.row.base_id + i64::from(self.index)
    }

    fn place(&self) -> usize {
        self.index as usize
    }

    /// Where the message is.
    pub fn id(&self) -> MessageId {
        MessageId::try_from(self.number())
            .unwrap_or_else(|_| unreachable!("the table's CHECKs see to it"))
    }

    /// The message's identity, the same however often it is stored.
    pub fn uid(&self) -> Uid {
        let first = self.reserved_header(UID_HEADER).and_then(|uid| uid.parse().ok());
        first.unwrap_or(Uid {
            producer: self.origin.row.producer,
            sequence: self.origin.row.sequence,
            index: self.index,
        })
    }

    /// Whether its producer sent it here because a node did not say whether it had stored it: then
    /// there may be another delivery with the same [`uid`](Self::uid).
    pub fn is_possible_duplicate(&self) -> bool {
        self.reserved_header(DUPLICATE_HEADER).is_some()
    }

    /// The topic's name.
    pub fn topic(&self) -> &TopicName {
        &self.origin.topic
    }

    /// The group that it was delivered to.
    pub fn group(&self) -> &GroupName {
        &self.origin.holding.group
    }

    /// The partition it is in.
    pub fn partition(&self) -> PartitionId {
        self.id().partition()
    }

    /// The key it was sent with.
    pub fn key(&self) -> Option<&str> {
        let key = self.origin.row.keys.as_ref()?.element(self.place())?;
        std::str::from_utf8(key).ok()
    }

    /// The headers it was sent with; a value that is not a string as its JSON text.
    pub fn headers(&self) -> Headers {
        let all = self.all_headers();
        all.into_iter().filter(|(name, _)| !name.starts_with(RESERVED_HEADER_PREFIX)).collect()
    }

    /// The value of one header.
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers().remove(name)
    }

    /// The payload, as it was sent.
    pub fn payload(&self) -> &[u8] {
        self.origin.row.payloads.element(self.place()).unwrap_or_default()
    }

    /// The payload without a copy. It keeps its whole batch in memory.
    pub fn payload_bytes(&self) -> Bytes {
        self.origin.row.payloads.bytes(self.place()).unwrap_or_default()
    }

    /// The payload read as JSON. A payload that is something else is an error of the kind
    /// [`Decode`](crate::ErrorKind::Decode); the delivery is still there to be acknowledged.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        self.decode(&Json)
    }

    /// The payload read by a codec.
    pub fn decode<T: DeserializeOwned>(&self, codec: &impl Codec) -> Result<T> {
        codec.decode(self.payload())
    }

    /// When it was appended, by the node's clock; never falls inside a partition.
    pub fn appended_at(&self) -> SystemTime {
        self.origin.row.appended_at
    }

    /// Which attempt this is, from 1: [`Messages::run`] repeats what its handler failed at.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Cancelled when the partition is not this consumer's any more: it went to another one, its position
    /// was moved, or it was waited for long enough when it was given back. What is acknowledged from then
    /// on is refused, and the message is delivered again: work that can be given up should be.
    ///
    /// Where the node is not heard, nobody knows. Nothing more is handed out then once the
    /// [lease](crate::ConsumerBuilder::lease) has run out, and this is told when the node is heard again.
    pub fn revoked(&self) -> CancellationToken {
        self.origin.holding.revoked.clone()
    }

    /// A number that stands for the acquisition under which it was handed out, for `shardmq verify`.
    #[doc(hidden)]
    pub fn fencing_token(&self) -> u64 {
        let fence = self.origin.holding.fence;
        let (high, low) = fence.owner.as_u64_pair();
        // The owner is random already.
        let epochs = fence.epoch.rotate_left(32) ^ fence.reset_epoch;
        high ^ low.rotate_left(1) ^ epochs.cast_unsigned()
    }

    /// Says that the message is done. It is recorded at once and committed within about a second, or by
    /// [`ConsumerHandle::flush`]; what was not committed may be delivered again.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) where the partition is known to be another consumer's
    /// already: the message is delivered there too. [`Reset`](crate::ErrorKind::Reset) where its position
    /// was moved by a seek.
    pub fn ack(mut self) -> Result<()> {
        self.settle()
    }

    /// The message is done.
    pub(super) fn settle(&mut self) -> Result<()> {
        let counted = !std::mem::replace(&mut self.answered, true);
        let result = self.origin.holding.ack(self.number(), &self.origin.row);
        if counted {
            self.origin.holding.take_back();
        }
        result
    }

    fn all_headers(&self) -> Headers {
        self.origin.row.headers_of(self.place())
    }

    fn reserved_header(&self, name: &str) -> Option<String> {
        self.origin.row.headers.as_ref()?;
        self.all_headers().remove(name)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.answered {
            ::metrics::counter!(names::UNANSWERED).increment(1);
            self.origin.holding.take_back();
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("id", &self.id())
            .field("key", &self.key())
            .field("bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}
