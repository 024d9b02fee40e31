//! Batches that fill, and the receipts of their messages.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::deadline::after;
use crate::error::{Error, Result};
use crate::id::{Day, MessageId, Uid};
use crate::message::{DUPLICATE_HEADER, Message, UID_HEADER};
use crate::store::append::Arrays;
use crate::store::packed::{Packed, Unpacked};

#[cfg(test)]
mod tests;

/// The most messages of a batch.
pub(crate) const MAX_MESSAGES: u32 = 1_000;
/// The bytes at which a batch takes no more messages. A larger message is a batch of its own.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// What a message counts for in the buffer beside its own bytes.
const OVERHEAD: usize = 64;

/// What a message counts for in the producer's buffer.
pub(crate) fn cost(message: &Message) -> usize {
    message.size() + message.dedup_key.as_ref().map_or(0, |key| key.len()) + OVERHEAD
}

/// What all messages of a batch have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Without keys: they may go to another partition.
    Free,
    /// With keys, and so a partition of their own.
    Keyed,
    /// With dedup keys, and perhaps keys: they never leave their partition, are known there when they
    /// come again, and have ids that need not follow each other.
    Once,
}

impl Kind {
    pub(crate) fn of(message: &Message) -> Self {
        match (&message.dedup_key, &message.key) {
            (Some(_), _) => Self::Once,
            (None, Some(_)) => Self::Keyed,
            (None, None) => Self::Free,
        }
    }
}

/// Messages on their way to one partition.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) arrays: Arrays,
    pub(crate) tickets: Tickets,
    pub(crate) kind: Kind,
    /// What it counts for in the producer's buffer.
    pub(crate) cost: usize,
    /// Until when it is tried.
    pub(crate) deadline: Instant,
    /// Drawn when it is sent for the first time to its partition.
    pub(crate) sequence: Option<i64>,
    /// The earliest and the latest day that an attempt has named: where a repeat looks from, and until
    /// when a fence is needed.
    pub(crate) named: Option<(Day, Day)>,
    /// Whether an attempt had no answer: it may have been stored, or may be yet.
    pub(crate) unknown: bool,
}

impl Batch {
    pub(crate) fn new(timeout: Duration, kind: Kind) -> Self {
        Self {
            kind,
            arrays: Arrays::default(),
            tickets: Tickets::default(),
            cost: 0,
            deadline: after(Instant::now(), timeout),
            sequence: None,
            named: None,
            unknown: false,
        }
    }

    /// Whether a message of this size still goes in. What was divided takes no more: its tickets are
    /// some of those of a batch that others have a part in.
    pub(crate) fn has_room(&self, size: usize) -> bool {
        let count = self.len();
        let fits = count == 0 || (count < MAX_MESSAGES && self.bytes() + size <= MAX_BYTES);
        fits && !self.tickets.is_part
    }

    /// Notes that an attempt names this day.
    pub(crate) fn attempted_on(&mut self, day: Day) {
        let (first, latest) = self.named.unwrap_or((day, day));
        self.named = Some((first.min(day), latest.max(day)));
    }

    pub(crate) fn len(&self) -> u32 {
        self.arrays.count.unsigned_abs()
    }

    fn bytes(&self) -> usize {
        usize::try_from(self.arrays.bytes).unwrap_or(0)
    }

    /// Adds a message that has been checked.
    pub(crate) fn push(&mut self, message: &Message) -> Receipt {
        let headers = (!message.headers.is_empty())
            .then(|| serde_json::to_vec(&message.headers).unwrap_or_default());
        self.push_parts(
            message.key.as_deref().map(str::as_bytes),
            headers.as_deref(),
            &message.payload,
            message.size(),
        );
        if let Some(key) = &message.dedup_key {
            self.push_dedup_key(key.as_bytes());
        }
        self.cost += cost(message);
        self.tickets.draw()
    }

    fn push_parts(
        &mut self,
        key: Option<&[u8]>,
        headers: Option<&[u8]>,
        payload: &[u8],
        size: usize,
    ) {
        let arrays = &mut self.arrays;
        let before = arrays.count.unsigned_abs();
        match (key, &mut arrays.keys) {
            (Some(key), keys) => keys.get_or_insert_with(|| Packed::of_nulls(before)).push(key),
            (None, Some(keys)) => keys.push_null(),
            (None, None) => {}
        }
        match (headers, &mut arrays.headers) {
            (Some(text), all) => {
                all.get_or_insert_with(|| Packed::of_nulls(before)).push_json(text);
            }
            (None, Some(all)) => all.push_null(),
            (None, None) => {}
        }
        arrays.payloads.push(payload);
        arrays.count += 1;
        arrays.bytes = arrays.bytes.saturating_add(i32::try_from(size).unwrap_or(i32::MAX));
    }

    fn push_dedup_key(&mut self, key: &[u8]) {
        self.arrays.dedup_keys.get_or_insert_default().push(key);
    }

    /// Two batches of the same messages, in the same order: the first `count`, and the others. Neither
    /// has been sent yet.
    pub(crate) fn divide(self, count: u32) -> (Self, Self) {
        let whole = Whole::of(&self.arrays);
        let count = count.min(self.len());
        let [ours, mut others] =
            [0..count, count..self.len()].map(|places| self.part(places, &whole));
        others.cost = self.cost - ours.cost;
        (ours, others)
    }

    fn part(&self, places: Range<u32>, whole: &Whole) -> Self {
        let mut batch = Self {
            arrays: Arrays::default(),
            tickets: self.tickets.part(&places),
            kind: self.kind,
            cost: self.cost * places.len() / (self.len() as usize).max(1),
            deadline: self.deadline,
            sequence: None,
            named: None,
            // Other batches were fenced. What has dedup keys is known by them.
            unknown: self.unknown && self.kind == Kind::Once,
        };
        for index in places {
            let index = index as usize;
            let key = whole.keys.element(index);
            // The version byte of jsonb is put before it again.
            let text = whole.headers.element(index).and_then(|json| json.get(1..));
            let payload = whole.payloads.element(index).unwrap_or_default();
            let size = payload.len() + key.map_or(0, <[u8]>::len) + text.map_or(0, <[u8]>::len);
            batch.push_parts(key, text, payload, size);
            if let Some(key) = whole.dedup_keys.element(index) {
                batch.push_dedup_key(key);
            }
        }
        batch
    }

    /// The same messages, to be sent elsewhere: no attempt has stored them.
    pub(crate) fn fresh(mut self) -> Self {
        (self.sequence, self.named, self.unknown) = (None, None, false);
        self
    }

    /// The same messages, to be sent elsewhere although an attempt of this producer's may have stored
    /// them: each says so, and keeps its identity.
    pub(crate) fn marked(self, producer: Uuid) -> Self {
        let whole = Whole::of(&self.arrays);
        let sequence = self.sequence.unwrap_or_default();
        let mut marked = Self { arrays: Arrays::default(), ..self };
        for index in 0..whole.payloads.len() {
            let key = whole.keys.element(index);
            let text = whole.headers.element(index).and_then(|json| json.get(1..));
            let uid = Uid { producer, sequence, index: u32::try_from(index).unwrap_or(u32::MAX) };
            let text = mark(text, uid);
            let payload = whole.payloads.element(index).unwrap_or_default();
            let size = payload.len() + key.map_or(0, <[u8]>::len) + text.len();
            marked.push_parts(key, Some(&text), payload, size);
        }
        marked.fresh()
    }
}

/// The arrays of a batch, to be read.
struct Whole {
    keys: Unpacked,
    headers: Unpacked,
    payloads: Unpacked,
    dedup_keys: Unpacked,
}

impl Whole {
    fn of(arrays: &Arrays) -> Self {
        // One that is not there has no elements.
        let unpack =
            |array: &Option<Packed>| array.as_ref().map(Packed::unpack).unwrap_or_default();
        Self {
            keys: unpack(&arrays.keys),
            headers: unpack(&arrays.headers),
            payloads: arrays.payloads.unpack(),
            dedup_keys: unpack(&arrays.dedup_keys),
        }
    }
}

/// The text of headers with the mark of a possible duplicate. Who was marked before keeps the identity
/// that it has.
fn mark(text: Option<&[u8]>, uid: Uid) -> Vec<u8> {
    // Its own text for each value: that of a relayed message may be a number that no machine number holds.
    let mut headers: BTreeMap<String, Box<RawValue>> =
        text.and_then(|text| serde_json::from_slice(text).ok()).unwrap_or_default();
    let text = |text: &str| serde_json::value::to_raw_value(text).unwrap_or_default();
    headers.entry(UID_HEADER.to_owned()).or_insert_with(|| text(&uid.to_string()));
    headers.insert(DUPLICATE_HEADER.to_owned(), text("possible"));
    serde_json::to_vec(&headers).unwrap_or_default()
}

/// The messages of a batch in terms of the completion that their receipts wait for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tickets {
    pub(crate) completion: Arc<Completion>,
    run: Range<u32>,
    /// A part of a batch that was divided: it takes no more messages.
    is_part: bool,
}

impl Tickets {
    fn draw(&mut self) -> Receipt {
        let index = self.completion.lock().draw();
        self.run.end = index + 1;
        Receipt { completion: Arc::clone(&self.completion), index }
    }

    fn part(&self, places: &Range<u32>) -> Self {
        let run = self.run.start + places.start..self.run.start + places.end;
        Self { completion: Arc::clone(&self.completion), run, is_part: true }
    }

    /// Answers the receipts: the first message has this id, the others follow; or all failed.
    pub(crate) fn complete(&self, result: Result<MessageId>) {
        self.answer([(self.run.clone(), result)]);
    }

    /// Answers the receipts, each with an id of its own.
    pub(crate) fn complete_each(&self, ids: &[MessageId]) {
        let mut at = self.run.start;
        self.answer(ids.chunk_by(|id, next| id.offset(1) == *next).map(|follow| {
            let run = at..at + u32::try_from(follow.len()).unwrap_or(u32::MAX);
            at = run.end;
            (run, Ok(follow[0]))
        }));
    }

    fn answer(&self, outcomes: impl IntoIterator<Item = (Range<u32>, Result<MessageId>)>) {
        let mut state = self.completion.lock();
        state.answered += self.run.len();
        state.outcomes.extend(outcomes);
        let woken: Vec<Waker> =
            self.run.clone().filter_map(|index| state.take_waker(index)).collect();
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        self.completion.changed.notify_waiters();
    }
}

/// What became of the messages of a batch, and who waits to hear of it.
#[derive(Debug, Default)]
pub(crate) struct Completion {
    state: Mutex<State>,
    /// Tells those who wait for all messages. Each receipt has a waker of its own.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    drawn: u32,
    answered: usize,
    /// One outcome for nearly all batches; more where a batch had to be divided, or ids do not follow each
    /// other.
    outcomes: Vec<(Range<u32>, Result<MessageId>)>,
    wakers: Vec<Option<Waker>>,
    /// Why those that are not answered never will be.
    given_up: Option<Error>,
}

impl Completion {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody is left to answer what is not answered yet: this is the answer.
    pub(crate) fn give_up(&self, error: &Error) {
        let mut state = self.lock();
        state.given_up.get_or_insert_with(|| error.clone());
        let woken = std::mem::take(&mut state.wakers);
        drop(state);
        woken.into_iter().flatten().for_each(Waker::wake);
        self.changed.notify_waiters();
    }

    /// Waits until all messages are answered; the first failure. Cancel safe.
    pub(crate) async fn all(&self) -> Result<()> {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.lock();
                if state.answered >= state.drawn as usize {
                    let failure = state.outcomes.iter().find_map(|(_, r)| r.as_ref().err());
                    return failure.map_or(Ok(()), |error| Err(error.clone()));
                }
                if let Some(error) = &state.given_up {
                    return Err(error.clone());
                }
            }
            changed.await;
        }
    }
}

impl State {
    fn draw(&mut self) -> u32 {
        self.drawn += 1;
        self.drawn - 1
    }

    fn outcome(&self, index: u32) -> Option<Result<MessageId>> {
        let answered = self.outcomes.iter().find(|(run, _)| run.contains(&index));
        let Some((run, result)) = answered else {
            return self.given_up.clone().map(Err);
        };
        Some(result.clone().map(|first| first.offset((index - run.start) as usize)))
    }

    fn take_waker(&mut self, index: u32) -> Option<Waker> {
        self.wakers.get_mut(index as usize).and_then(Option::take)
    }

    fn wait(&mut self, index: u32, waker: &Waker) {
        let index = index as usize;
        if self.wakers.len() <= index {
            self.wakers.resize(index + 1, None);
        }
        match &mut self.wakers[index] {
            Some(known) if known.will_wake(waker) => {}
            slot => *slot = Some(waker.clone()),
        }
    }
}

/// The answer to one message, to come: its id once it is on disk, or why it is not.
///
/// Dropping it changes nothing: the message is sent all the same.
#[derive(Debug)]
#[must_use = "the message is sent all the same, but only the receipt tells whether it is on disk"]
pub struct Receipt {
    completion: Arc<Completion>,
    index: u32,
}

impl Future for Receipt {
    type Output = Result<MessageId>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.completion.lock();
        if let Some(result) = state.outcome(self.index) {
            return Poll::Ready(result);
        }
        state.wait(self.index, context.waker());
        Poll::Pending
    }
}
