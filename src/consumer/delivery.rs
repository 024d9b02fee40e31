//! What one can do with a message in hand.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::codec::{Codec, Json};
use crate::consumer::holding::Holding;
use crate::consumer::parked::Again;
#[cfg(doc)]
use crate::consumer::{ConsumerHandle, Messages};
use crate::error::Result;
use crate::failure::{FailedAttempt, Past};
use crate::id::{MessageId, PartitionId, Uid};
use crate::message::{DUPLICATE_HEADER, Headers, RESERVED_HEADER_PREFIX, UID_HEADER};
use crate::metrics as names;
use crate::name::{GroupName, TopicName};
use crate::store::fetch::Batch;

/// What all deliveries of a batch share, so that each has one count of references to keep.
pub(super) struct Origin {
    pub(super) holding: Arc<Holding>,
    pub(super) row: Arc<Batch>,
    pub(super) topic: TopicName,
    /// When this consumer got it.
    pub(super) read_at: SystemTime,
    /// It comes from those that were parked.
    pub(super) parked: Option<Again>,
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Origin").field(&self.row.base_id).finish()
    }
}

/// A message in your hands: owned, `Send`, free to go to another task.
///
/// Answer each: with [`ack`](Self::ack), with [`retry`](Self::retry), or with [`reject`](Self::reject); or
/// [give it back](Self::give_back). One that is dropped without an answer counts as failed, and comes again.
pub struct Delivery {
    origin: Arc<Origin>,
    index: u32,
    standing: Standing,
    /// What only some have: most are moved often, and should be small.
    more: Option<Box<More>>,
}

/// How a delivery counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Handed out by the stream, which is told if it fails.
    Handed,
    /// Counted as handed out, and in the library's own hands.
    Kept,
    /// What a handler has of one that is kept.
    Twin,
    /// Not counted any more.
    Answered,
}

#[derive(Default)]
struct More {
    /// What was tried before, where that is not what the origin says.
    past: Option<Arc<Past>>,
    /// What the handler has said: of one that is kept, and of its twin.
    answer: Option<Arc<OnceLock<Verdict>>>,
}

/// What is to become of a message that was not handled.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(super) error: String,
    /// It is not to be tried again.
    pub(super) dead: bool,
    /// When it is to be tried again, instead of what the policy says.
    pub(super) after: Option<Duration>,
    /// Nobody has said so: it was dropped.
    pub(super) dropped: bool,
    /// It has not failed.
    pub(super) given_back: bool,
}

impl Verdict {
    pub(super) fn failed(error: impl Into<String>) -> Self {
        let error = error.into();
        Self { error, dead: false, after: None, dropped: false, given_back: false }
    }
}

impl Delivery {
    /// Of a message that is counted as handed out.
    #[inline]
    pub(super) fn kept(origin: &Arc<Origin>, id: i64) -> Self {
        let index = u32::try_from(id - origin.row.base_id).unwrap_or(0);
        Self { origin: Arc::clone(origin), index, standing: Standing::Kept, more: None }
    }

    /// The same, in a user's hands.
    #[inline]
    pub(super) fn handed(mut self) -> Self {
        self.standing = Standing::Handed;
        self
    }

    /// The same message in other hands, which may answer it; this one is what counts.
    pub(super) fn twin(&mut self) -> Self {
        let answer = Arc::new(OnceLock::new());
        let more = self.more.get_or_insert_default();
        more.answer = Some(Arc::clone(&answer));
        let more = More { past: more.past.clone(), answer: Some(answer) };
        let (origin, index) = (Arc::clone(&self.origin), self.index);
        Self { origin, index, standing: Standing::Twin, more: Some(Box::new(more)) }
    }

    /// What its twin has said of it.
    pub(super) fn verdict(&self) -> Option<Verdict> {
        self.more.as_ref()?.answer.as_ref()?.get().cloned()
    }

    fn known_past(&self) -> Option<&Arc<Past>> {
        let own = self.more.as_ref().and_then(|more| more.past.as_ref());
        own.or(self.origin.parked.as_ref().map(|parked| &parked.past))
    }

    /// What was tried with it up to now.
    pub(super) fn past(&self) -> Arc<Past> {
        self.known_past().map_or_else(
            || {
                let first_seen = self.origin.read_at;
                Arc::new(Past { attempts: 0, first_seen, failures: Vec::new() })
            },
            Arc::clone,
        )
    }

    pub(super) fn set_past(&mut self, past: Arc<Past>) {
        self.more.get_or_insert_default().past = Some(past);
    }

    /// Not in hand for a while: it is not counted until it is handed out again.
    pub(super) fn lay_down(&mut self) {
        self.leave();
    }

    /// Counted again.
    pub(super) fn take_up(&mut self) {
        self.standing = Standing::Kept;
    }

    /// Whether it was acknowledged.
    pub(super) fn is_acked(&self) -> bool {
        match &self.origin.parked {
            Some(parked) => parked.claim.is_done(),
            None => self.origin.holding.tracker().is_acked(self.number()),
        }
    }

    pub(super) fn holding(&self) -> &Arc<Holding> {
        &self.origin.holding
    }

    pub(super) fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    pub(super) fn is_parked(&self) -> bool {
        self.origin.parked.is_some()
    }

    /// Its place in the row that it is of.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Whether the lease has run out, and it is not known whether the partition is another's.
    pub(super) fn is_lapsed(&self) -> bool {
        let holding = &self.origin.holding;
        holding.is_lapsed() && !holding.revoked.is_cancelled()
    }

    /// Whether the partition is known to be another's by now.
    pub(super) fn is_revoked(&self) -> bool {
        self.origin.holding.revoked.is_cancelled()
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
        first.unwrap_or_else(|| self.origin.row.uid_of(self.number()))
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

    /// The headers it was sent with. A value that is not a string, which only SQL can send, is its JSON
    /// text in the server's own form, such as `1.10` or `[1, 2]`.
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

    /// Which attempt this is, from 1. Counted by the consumer that has the partition: where another takes it
    /// over, it begins anew with what was tried in place, and goes on with what was parked.
    pub fn attempt(&self) -> u32 {
        self.known_past().map_or(1, |past| past.attempts.saturating_add(1))
    }

    /// When the group got it for the first time, counted like [`attempt`](Self::attempt).
    pub fn first_seen(&self) -> SystemTime {
        self.past().first_seen
    }

    /// The attempts that failed before this one, oldest first: of more than 16 the first and last eight.
    pub fn failures(&self) -> Vec<FailedAttempt> {
        self.past().failures.clone()
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

    /// Says that the message could not be handled, and why: it comes again when the
    /// [policy](crate::ConsumerBuilder::retry_policy) says, or goes to the dead letters. Ordered, nothing of its
    /// partition or key that is not handed out yet comes before it; [unordered](crate::Order::Unordered), it is
    /// parked, and delays nothing.
    ///
    /// Where the partition is another's by now, it is delivered there.
    pub fn retry(mut self, why: impl fmt::Display) {
        self.fail(Verdict::failed(why.to_string()));
    }

    /// The same, but after this time, up to a year, whatever delay the policy has. It counts as an attempt:
    /// after the last one that the policy grants the message goes to the dead letters.
    pub fn retry_after(mut self, delay: Duration, why: impl fmt::Display) {
        let after = Some(delay.min(Duration::from_hours(24 * 365)));
        self.fail(Verdict { after, ..Verdict::failed(why.to_string()) });
    }

    /// Says that the message will never be handled, and why: it goes to the
    /// [dead letters](crate::Cluster::dead_letters), and its partition or key goes on once it is there.
    pub fn reject(mut self, why: impl fmt::Display) {
        self.fail(Verdict { dead: true, ..Verdict::failed(why.to_string()) });
    }

    /// Gives the message back, which is not handled and has not failed: it comes again, and counts as if it had
    /// not come. For a consumer that ends, say.
    pub fn give_back(mut self) {
        self.fail(Verdict { given_back: true, ..Verdict::failed("") });
    }

    fn fail(&mut self, verdict: Verdict) {
        match std::mem::replace(&mut self.standing, Standing::Answered) {
            Standing::Handed => {
                // It stays counted until its fate is known.
                let (origin, more) = (Arc::clone(&self.origin), self.more.take());
                let failed = Self { origin, index: self.index, standing: Standing::Kept, more };
                self.origin.holding.fail(failed, verdict);
            }
            Standing::Twin => {
                if let Some(answer) = self.more.as_ref().and_then(|more| more.answer.as_ref()) {
                    // The first word counts.
                    let _ = answer.set(verdict);
                }
            }
            kept => self.standing = kept,
        }
    }

    /// The message is done.
    pub(super) fn settle(&mut self) -> Result<()> {
        let result = match &self.origin.parked {
            Some(parked) => self.origin.holding.end_parked(&parked.claim),
            None => self.origin.holding.ack(self.number(), &self.origin.row),
        };
        self.leave();
        result
    }

    /// A copy was put aside: the group has done with this one; for good, or it will be due again.
    pub(super) fn put_aside(&mut self, is_again: bool) {
        self.entrust();
        match &self.origin.parked {
            Some(_) if is_again => {}
            Some(parked) => parked.claim.is_settled(),
            None => self.origin.holding.skip(self.number()),
        }
        self.leave();
    }

    /// A transaction of the user's has acknowledged it, and is committed.
    pub(super) fn committed(&mut self) -> Result<()> {
        if let Some(parked) = &self.origin.parked {
            // Its row has gone with that.
            parked.claim.is_settled();
            self.leave();
            return Ok(());
        }
        self.entrust();
        self.settle()
    }

    /// The node has it in a row of its own: to be looked for if it loses the end of its log.
    fn entrust(&self) {
        if !self.is_parked() {
            self.origin.holding.entrust(self.number());
        }
    }

    fn leave(&mut self) {
        match std::mem::replace(&mut self.standing, Standing::Answered) {
            Standing::Handed | Standing::Kept => self.origin.holding.take_back(),
            Standing::Twin | Standing::Answered => {}
        }
    }

    fn all_headers(&self) -> Headers {
        // The reader has made sure that they are an object, and the server that it is JSON.
        self.origin.row.headers_of(self.place()).unwrap_or_default()
    }

    fn reserved_header(&self, name: &str) -> Option<String> {
        self.origin.row.headers.as_ref()?;
        self.all_headers().remove(name)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        match self.standing {
            Standing::Answered | Standing::Twin => {}
            Standing::Kept => self.leave(),
            Standing::Handed => {
                ::metrics::counter!(names::UNANSWERED).increment(1);
                let verdict = Verdict::failed("dropped without an answer");
                self.fail(Verdict { dropped: true, ..verdict });
            }
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
