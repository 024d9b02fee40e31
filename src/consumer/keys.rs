//! Keys that are in hand, and messages that wait for theirs.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use uuid::Uuid;

use crate::consumer::delivery::{Delivery, Origin};
use crate::consumer::holding::Hand;
use crate::consumer::lanes::Unread;
use crate::consumer::pinned::Pinned;

/// A key within an acquisition.
type Place = (Uuid, Arc<str>);

/// The keys in hand of all partitions. What is kept is bounded in bytes: of the rows that it keeps in
/// memory, not of the messages alone.
pub(super) struct Keys {
    busy: HashMap<Place, VecDeque<Kept>>,
    /// Keys that nobody has in hand, with messages that wait.
    freed: VecDeque<Place>,
    /// The same, where the partition waits.
    stalled: HashSet<Place>,
    pinned: Pinned,
    most_bytes: usize,
}

/// A message that waits for its key. It is not counted as handed out yet.
struct Kept {
    origin: Arc<Origin>,
    id: i64,
}

/// Messages whose key is in hand from now on.
pub(super) struct Freed {
    pub(super) owner: Uuid,
    pub(super) key: Arc<str>,
    /// Empty where the partition is another's by now.
    pub(super) deliveries: Vec<Delivery>,
}

impl Keys {
    pub(super) fn new(most_bytes: usize) -> Self {
        Self {
            busy: HashMap::new(),
            freed: VecDeque::new(),
            stalled: HashSet::new(),
            pinned: Pinned::default(),
            most_bytes,
        }
    }

    pub(super) fn is_busy(&self, owner: Uuid, key: &Arc<str>) -> bool {
        self.busy.contains_key(&(owner, Arc::clone(key)))
    }

    /// A key is in hand from now on.
    pub(super) fn begin(&mut self, owner: Uuid, key: Arc<str>) -> Arc<str> {
        self.busy.insert((owner, Arc::clone(&key)), VecDeque::new());
        key
    }

    /// Nothing of a key is handed out from now on until it [ends](Self::end), also what waits for it.
    pub(super) fn hold(&mut self, owner: Uuid, key: &Arc<str>) {
        let place = (owner, Arc::clone(key));
        self.freed.retain(|freed| *freed != place);
        self.stalled.remove(&place);
        self.busy.entry(place).or_default();
    }

    /// Whether no key is in hand, and nothing waits for one.
    pub(super) fn is_empty(&self) -> bool {
        self.busy.is_empty()
    }

    /// Keeps a message until its key is free. False where too much is kept.
    pub(super) fn keep(&mut self, batch: &Unread, id: i64, key: &Arc<str>) -> bool {
        let (owner, origin) = (batch.owner(), &batch.origin);
        let bytes = self.pinned.bytes();
        if bytes > 0 && bytes + self.pinned.more(origin) > self.most_bytes {
            return false;
        }
        let Some(queue) = self.busy.get_mut(&(owner, Arc::clone(key))) else { return false };
        queue.push_back(Kept { origin: Arc::clone(origin), id });
        self.pinned.pin(origin);
        true
    }

    /// A key is not in hand any more.
    pub(super) fn end(&mut self, owner: Uuid, key: &Arc<str>) {
        let place = (owner, Arc::clone(key));
        match self.busy.get(&place) {
            Some(queue) if !queue.is_empty() => self.freed.push_back(place),
            _ => _ = self.busy.remove(&place),
        }
    }

    /// Up to so many messages of a key that was freed.
    pub(super) fn next(&mut self, most: usize) -> Option<Freed> {
        let place = self.freed.pop_front()?;
        let mut deliveries = Vec::new();
        while deliveries.len() < most
            && let Some(kept) = self.busy.get_mut(&place).and_then(VecDeque::pop_front)
        {
            match kept.origin.holding.hand_out_kept() {
                Hand::Out => {
                    deliveries.push(Delivery::kept(&kept.origin, kept.id));
                    self.pinned.unpin(&kept.origin);
                }
                Hand::Wait => {
                    if let Some(queue) = self.busy.get_mut(&place) {
                        queue.push_front(kept);
                    }
                    if deliveries.is_empty() {
                        self.stalled.insert(place.clone());
                    }
                    break;
                }
                Hand::Gone => self.pinned.unpin(&kept.origin),
            }
        }
        if deliveries.is_empty() && self.busy.get(&place).is_some_and(VecDeque::is_empty) {
            self.busy.remove(&place);
        }
        Some(Freed { owner: place.0, key: place.1, deliveries })
    }

    /// Whether messages of an acquisition may be handed out has changed.
    pub(super) fn turn(&mut self, owner: Uuid) {
        let freed = self.stalled.extract_if(|(stalled, _)| *stalled == owner);
        self.freed.extend(freed);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.most_bytes);
    }
}
