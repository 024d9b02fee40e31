//! Topics that are not known, and the messages that wait for them: pure.
//!
//! ```text
//!            ┌─────────────── asked for again: more messages came meanwhile ──┐
//!            v                                                                │
//! message ─> queue ─> asked, many names at once ─┬─> there is none: set aside ┤
//!                                                └─> found ─> its map is read ┴─> its messages are looked at
//! ```
//!
//! Anybody who may publish can name topics that do not exist. So a name costs the same however many there
//! are: names wait in one queue, each message is kept by its id and is looked at no more until its own topic
//! has an answer, and nothing walks over all names. What is kept is bounded. Messages beyond that stay unread
//! in a range of the table, which is read on from its beginning when there is room.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::relay::seen::Range;
use crate::store::outbox::Waiting;

/// The most messages that are kept.
const MAX_KEPT: usize = 50_000;
/// The most names that are asked for in one statement.
const MAX_ASKED: usize = 10_000;
/// The most topics whose maps are read at once.
const MAX_READ: usize = 8;
/// When the control database is asked again that did not answer.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// The most messages, and their bytes, that one step sets aside.
const DEAD: (usize, usize) = (4_000, 8 << 20);

/// A message that is kept by its id, which is that of no other, be it published or for later.
#[derive(Debug, Clone, Copy)]
struct Kept {
    for_later: bool,
    bytes: usize,
}

type Messages = HashMap<i64, Kept>;

/// Where a topic stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    Asked,
    Found,
}

/// A topic, with the messages that wait for it.
#[derive(Debug)]
struct Topic {
    stage: Stage,
    /// Those that were there when it was asked for, or are there before.
    asked: Messages,
    /// Those that came since: the topic may be made at any moment, for them.
    more: Messages,
}

/// A message that no topic takes.
#[derive(Debug)]
struct Dead {
    id: i64,
    kept: Kept,
    why: String,
}

/// What waited for a topic that is known now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::relay) struct Learned {
    /// Published messages, in no order.
    pub(in crate::relay) ids: Vec<i64>,
    /// Whether some were for later.
    pub(in crate::relay) for_later: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::relay) struct Unknown {
    topics: HashMap<String, Topic>,
    queue: VecDeque<String>,
    is_asking: bool,
    found: VecDeque<String>,
    /// How many maps are being read.
    reading: usize,
    /// No question before this time.
    not_before: Option<Instant>,
    /// All messages in memory, those that are dead too.
    kept: usize,
    dead: VecDeque<Dead>,
    doomed: HashSet<i64>,
    /// Published messages that are not kept, and whatever lies between them.
    rest: Option<Range>,
    /// Topics that became known while there is a rest: it may have messages of theirs, which come first.
    late: HashSet<String>,
    /// How much was done, for tests: what is done for a name must not depend on how many there are.
    pub(super) steps: u64,
}

impl Unknown {
    /// Whether something is found out about this topic.
    pub(super) fn has(&self, topic: &str) -> bool {
        self.topics.contains_key(topic)
    }

    /// Keeps a message until its topic has an answer. False: there is no room. A published message is read
    /// again later then; one for later is to be looked at again by the caller.
    pub(super) fn wait(&mut self, topic: &str, message: &Waiting) -> bool {
        self.steps += 1;
        let for_later = message.due_at.is_some();
        if self.is_kept(topic, message.id) {
            return true;
        }
        let is_in_rest = !for_later && self.rest.is_some_and(|rest| message.id >= rest.0);
        if is_in_rest || self.kept >= MAX_KEPT {
            if !for_later {
                self.leave(message.id);
            }
            return false;
        }
        self.kept += 1;
        let kept = Kept { for_later, bytes: message.bytes };
        if !self.topics.contains_key(topic) {
            self.queue.push_back(topic.to_owned());
        }
        let new = || Topic { stage: Stage::Queued, asked: HashMap::new(), more: HashMap::new() };
        let known = self.topics.entry(topic.to_owned()).or_insert_with(new);
        let messages =
            if known.stage == Stage::Queued { &mut known.asked } else { &mut known.more };
        messages.insert(message.id, kept);
        true
    }

    fn is_kept(&self, topic: &str, id: i64) -> bool {
        let has = |known: &Topic| known.asked.contains_key(&id) || known.more.contains_key(&id);
        self.doomed.contains(&id) || self.topics.get(topic).is_some_and(has)
    }

    /// Leaves a published message to be read later.
    fn leave(&mut self, id: i64) {
        let rest = self.rest.get_or_insert((id, id));
        *rest = (rest.0.min(id), rest.1.max(id));
    }

    /// Whether a published message of a known topic has to wait, since earlier ones of that topic may not
    /// have been read yet. It is read after them then.
    pub(super) fn is_behind(&mut self, topic: &str, message: &Waiting) -> bool {
        let is_behind = message.due_at.is_none()
            && self.rest.is_some_and(|rest| message.id >= rest.0)
            && self.late.contains(topic);
        if is_behind {
            self.leave(message.id);
        }
        is_behind
    }

    fn may_ask(&mut self, now: Instant) -> bool {
        self.not_before = self.not_before.filter(|at| *at > now);
        self.not_before.is_none()
    }

    /// The names to be asked for now. None while an answer is under way.
    pub(in crate::relay) fn ask(&mut self, now: Instant) -> Vec<String> {
        if !self.may_ask(now) || self.is_asking || self.queue.is_empty() {
            return Vec::new();
        }
        self.is_asking = true;
        let names: Vec<String> = self.queue.drain(..self.queue.len().min(MAX_ASKED)).collect();
        for name in &names {
            self.steps += 1;
            if let Some(topic) = self.topics.get_mut(name) {
                topic.stage = Stage::Asked;
            }
        }
        names
    }

    /// The control database has answered: these names were asked for, and topics of those exist.
    pub(in crate::relay) fn answered(&mut self, names: Vec<String>, existing: &HashSet<String>) {
        self.is_asking = false;
        for name in names {
            self.steps += 1;
            if existing.contains(&name) {
                if let Some(topic) = self.topics.get_mut(&name) {
                    topic.stage = Stage::Found;
                    self.found.push_back(name);
                }
            } else {
                let why = format!("topic {name} does not exist");
                self.is_missing(name, &why);
            }
        }
    }

    /// The control database did not answer: these are asked for again, before all others.
    pub(in crate::relay) fn not_answered(&mut self, names: Vec<String>, now: Instant) {
        self.is_asking = false;
        self.not_before = Some(now + ASK_AGAIN);
        for name in names.into_iter().rev() {
            if self.queue_again(&name) {
                self.queue.push_front(name);
            }
        }
    }

    /// What came meanwhile waits with the others. False: nothing waits for the topic any more.
    fn queue_again(&mut self, name: &str) -> bool {
        let Some(topic) = self.topics.get_mut(name) else { return false };
        topic.stage = Stage::Queued;
        let more = std::mem::take(&mut topic.more);
        topic.asked.extend(more);
        true
    }

    /// Topics that exist, and whose maps are to be read now.
    pub(in crate::relay) fn read(&mut self, now: Instant) -> Vec<String> {
        if !self.may_ask(now) {
            return Vec::new();
        }
        let free = MAX_READ.saturating_sub(self.reading).min(self.found.len());
        self.reading += free;
        self.found.drain(..free).collect()
    }

    /// An answer has come to what [`read`](Self::read) returned, whichever it is.
    pub(in crate::relay) fn has_read(&mut self) {
        self.reading = self.reading.saturating_sub(1);
    }

    /// The map of a topic could not be read.
    pub(in crate::relay) fn is_away(&mut self, topic: String, now: Instant) {
        self.not_before = Some(now + ASK_AGAIN);
        if self.queue_again(&topic) {
            self.queue.push_front(topic);
        }
    }

    /// There is no such topic: those that were there when it was asked for are set aside.
    pub(super) fn is_missing(&mut self, name: String, why: &str) {
        let Some(topic) = self.topics.get_mut(&name) else { return };
        let asked = std::mem::take(&mut topic.asked);
        if topic.more.is_empty() {
            self.topics.remove(&name);
        } else if self.queue_again(&name) {
            self.queue.push_back(name);
        }
        for (id, kept) in asked {
            self.steps += 1;
            self.doomed.insert(id);
            self.dead.push_back(Dead { id, kept, why: why.to_owned() });
        }
    }

    /// A topic is known: returns what waited for it.
    pub(super) fn learn(&mut self, name: &str) -> Learned {
        if self.rest.is_some() {
            self.late.insert(name.to_owned());
        }
        let Some(topic) = self.topics.remove(name) else { return Learned::default() };
        let mut learned = Learned::default();
        for (id, kept) in topic.asked.into_iter().chain(topic.more) {
            self.steps += 1;
            self.kept -= 1;
            if kept.for_later {
                learned.for_later = true;
            } else {
                learned.ids.push(id);
            }
        }
        learned
    }

    /// Messages to be set aside in the next step, whether they are for later, and why.
    pub(super) fn take_dead(&mut self) -> Vec<(i64, bool, String)> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(dead) = self.dead.front() {
            bytes += dead.kept.bytes;
            if taken.len() >= DEAD.0 || (bytes > DEAD.1 && !taken.is_empty()) {
                break;
            }
            let Some(Dead { id, kept, why }) = self.dead.pop_front() else { break };
            self.steps += 1;
            self.kept -= 1;
            self.doomed.remove(&id);
            taken.push((id, kept.for_later, why));
        }
        taken
    }

    /// Whether something is to be set aside.
    pub(in crate::relay) fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// How many messages are in memory.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.kept
    }

    /// A part of what was left unread, to be read now that there is room: so much that all of it is kept.
    pub(super) fn read_on(&mut self) -> Option<Range> {
        let part = i64::try_from(MAX_KEPT / 2).unwrap_or(i64::MAX);
        let (first, last) = self.rest.filter(|_| self.kept <= MAX_KEPT / 2)?;
        let end = last.min(first.saturating_add(part - 1));
        self.rest = (end < last).then_some((end + 1, last));
        if self.rest.is_none() {
            self.late.clear();
        }
        Some((first, end))
    }

    /// When the control database may be asked again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.not_before.filter(|_| !self.queue.is_empty() || !self.found.is_empty())
    }
}
