//! Batches that fill, and the receipts of their messages.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::error::Result;
use crate::id::{Day, MessageId, Uid};
use crate::message::{DUPLICATE_HEADER, Message, UID_HEADER};
use crate::store::append::Arrays;
use crate::store::packed::{Packed, Unpacked};

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
    /// The earliest day that an attempt has named: where a repeat looks from.
    pub(crate) first_day: Option<Day>,
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
            deadline: Instant::now() + timeout,
            sequence: None,
            first_day: None,
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
        self.first_day = Some(self.first_day.map_or(day, |first| first.min(day)));
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
            first_day: None,
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
        (self.sequence, self.first_day, self.unknown) = (None, None, false);
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
    let mut headers: serde_json::Map<String, serde_json::Value> =
        text.and_then(|text| serde_json::from_slice(text).ok()).unwrap_or_default();
    headers.entry(UID_HEADER).or_insert_with(|| uid.to_string().into());
    headers.insert(DUPLICATE_HEADER.to_owned(), "possible".into());
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
}

impl Completion {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (run, result) = self.outcomes.iter().find(|(run, _)| run.contains(&index))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use proptest::prelude::*;

    fn id(sequence: u32) -> MessageId {
        let day = Day::from_yymmdd(261_122).unwrap();
        MessageId::new("10101".parse().unwrap(), day, sequence).unwrap()
    }

    async fn answers(receipts: Vec<Receipt>) -> Vec<Option<u32>> {
        let mut answers = Vec::new();
        for receipt in receipts {
            answers.push(receipt.await.ok().map(MessageId::sequence));
        }
        answers
    }

    #[tokio::test]
    async fn receipts_are_answered_in_the_order_of_the_batch() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let receipts: Vec<_> = (0..3).map(|_| batch.push(&Message::new("x"))).collect();
        batch.tickets.complete(Ok(id(7)));
        assert_eq!(answers(receipts).await, [Some(7), Some(8), Some(9)]);
    }

    #[tokio::test]
    async fn a_divided_batch_answers_each_message_once() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let receipts: Vec<_> = (0..4).map(|_| batch.push(&Message::new("x"))).collect();
        let (refused, rest) = batch.divide(1);
        refused.tickets.complete(Err(Error::invalid("no")));
        let (first, second) = rest.divide(2);
        second.tickets.complete(Ok(id(20)));
        first.tickets.complete(Ok(id(10)));
        assert_eq!(answers(receipts).await, [None, Some(10), Some(11), Some(20)]);
    }

    #[tokio::test]
    async fn receipts_of_messages_with_ids_of_their_own_get_each_its_own() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Once);
        let message = Message::new("x").dedup_key("d");
        let receipts: Vec<_> = (0..7).map(|_| batch.push(&message)).collect();
        let (first, second) = batch.divide(4);
        second.tickets.complete_each(&[3, 4, 9].map(id));
        first.tickets.complete_each(&[7, 8, 3, 8].map(id));
        let expected = [7, 8, 3, 8, 3, 4, 9].map(Some);
        assert_eq!(answers(receipts).await, expected);
        assert!(first.tickets.completion.all().await.is_ok());
    }

    #[test]
    fn parts_of_what_has_dedup_keys_stay_unknown_and_others_were_fenced() {
        for (kind, unknown) in [(Kind::Once, true), (Kind::Keyed, false)] {
            let mut batch = Batch::new(Duration::from_secs(1), kind);
            let _receipts =
                [(); 2].map(|()| batch.push(&Message::new("x").key("k").dedup_key("d")));
            batch.unknown = true;
            let (first, second) = batch.divide(1);
            assert_eq!((first.unknown, second.unknown), (unknown, unknown));
        }
    }

    #[test]
    fn a_marked_message_keeps_its_headers_and_the_identity_it_had_first() {
        let uid = |text: &[u8]| {
            let headers: crate::message::Headers = serde_json::from_slice(text).unwrap();
            assert_eq!(headers[DUPLICATE_HEADER], "possible");
            headers[UID_HEADER].clone()
        };
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        drop(batch.push(&Message::new("x").header("h", "v")));
        drop(batch.push(&Message::new("y")));
        batch.sequence = Some(7);
        let marked = batch.marked(Uuid::from_u128(1));
        let texts = marked.arrays.headers.as_ref().map(Packed::unpack).unwrap();
        let text = |index| texts.element(index).unwrap().get(1..).unwrap();
        assert!(String::from_utf8_lossy(text(0)).contains(r#""h":"v""#));
        assert_eq!(uid(text(1)), format!("{}:7:1", Uuid::from_u128(1)));
        assert_eq!((marked.len(), marked.sequence), (2, None));
        let again = marked.marked(Uuid::from_u128(2));
        let texts = again.arrays.headers.as_ref().map(Packed::unpack).unwrap();
        let text = |index| texts.element(index).unwrap().get(1..).unwrap();
        assert_eq!(uid(text(1)), format!("{}:7:1", Uuid::from_u128(1)));
    }

    #[tokio::test]
    async fn a_divided_batch_takes_no_more_messages() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let _receipts = [(); 2].map(|()| batch.push(&Message::new("x")));
        assert!(batch.has_room(1));
        let (first, second) = batch.divide(1);
        assert!(!first.has_room(1) && !second.has_room(1));
    }

    #[tokio::test]
    async fn whoever_waits_for_all_and_whoever_waits_for_one_are_both_woken() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let one = tokio::spawn(batch.push(&Message::new("x")));
        tokio::task::yield_now().await;
        let completion = Arc::clone(&batch.tickets.completion);
        let all = tokio::spawn(async move { completion.all().await });
        tokio::task::yield_now().await;
        batch.tickets.complete(Ok(id(1)));
        assert_eq!(one.await.unwrap().unwrap(), id(1));
        all.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn whoever_waits_for_all_hears_of_the_first_failure_when_all_are_answered() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let _receipts = [(); 3].map(|()| batch.push(&Message::new("x")));
        let completion = Arc::clone(&batch.tickets.completion);
        let (first, second) = batch.divide(1);
        first.tickets.complete(Err(Error::invalid("no")));
        let soon = tokio::time::timeout(Duration::ZERO, completion.all());
        assert!(soon.await.is_err());
        second.tickets.complete(Ok(id(1)));
        assert!(completion.all().await.is_err());
    }

    #[tokio::test]
    async fn a_waiting_receipt_is_woken() {
        let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
        let receipt = tokio::spawn(batch.push(&Message::new("x")));
        tokio::task::yield_now().await;
        batch.tickets.complete(Ok(id(1)));
        assert_eq!(receipt.await.unwrap().unwrap(), id(1));
    }

    proptest! {
        #[test]
        fn dividing_keeps_every_message_key_dedup_key_and_header(
            messages in proptest::collection::vec((".{0,5}", proptest::option::of("[a-z]{1,3}"), any::<bool>()), 1..20),
            cut in 0_u32..20,
            once in any::<bool>(),
        ) {
            let mut batch = Batch::new(Duration::from_secs(1), Kind::Free);
            for (text, key, header) in &messages {
                let mut message = Message::new(text.clone());
                message.key.clone_from(key);
                message.dedup_key = once.then(|| format!("d{text}").into());
                drop(batch.push(&if *header { message.header("h", text) } else { message }));
            }
            let cost = batch.cost;
            let (a, b) = batch.divide(cut);
            prop_assert_eq!(a.cost + b.cost, cost);
            let mut seen = Vec::new();
            for half in [a, b] {
                let keys = half.arrays.keys.as_ref().map(Packed::unpack).unwrap_or_default();
                let headers = half.arrays.headers.as_ref().map(Packed::unpack).unwrap_or_default();
                let payloads = half.arrays.payloads.unpack();
                let dedup_keys = half.arrays.dedup_keys.as_ref().map(Packed::unpack).unwrap_or_default();
                prop_assert_eq!(dedup_keys.len(), if once { payloads.len() } else { 0 });
                for index in 0..payloads.len() {
                    let text = |bytes: Option<&[u8]>| bytes.map(|b| String::from_utf8(b.to_vec()).unwrap());
                    let payload = text(payloads.element(index)).unwrap();
                    if once {
                        prop_assert_eq!(text(dedup_keys.element(index)), Some(format!("d{payload}")));
                    }
                    seen.push((
                        payload,
                        text(keys.element(index)),
                        headers.element(index).is_some(),
                    ));
                }
            }
            prop_assert_eq!(seen, messages);
        }
    }
}
