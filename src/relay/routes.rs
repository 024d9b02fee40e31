//! Where messages of an outbox go, as `send` would have it: pure. A topic that is not known has to
//! be asked for (see [`unknown`]), and what can't go now waits in the outbox; neither holds up
//! anything else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::seen::Range;
use crate::id::{Day, NodeId, PartitionId};
use crate::name::TopicName;
use crate::producer::batch::{MAX_BYTES, MAX_MESSAGES};
use crate::store::outbox::{Step, Target, Waiting};
use crate::topology::{Topology, key_slot};

mod unknown;

pub(super) use unknown::{Learned, Unknown};

/// When it is tried again whether a topic or partition takes messages.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How long nothing goes to a partition that has refused its messages.
const CLOSED: Duration = Duration::from_secs(5);
/// When a message is looked at again that somebody is about to take back.
const LOCKED: Duration = Duration::from_millis(200);
/// The most bytes of a step.
const STEP_BYTES: usize = 8 << 20;

/// What messages wait for, in the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum For {
    /// A topic that is known, and takes nothing now.
    Topic(String),
    Partition(PartitionId),
    /// Whoever is about to take them back.
    Locked,
}

/// Why a partition takes nothing.
#[derive(Debug, Clone, Copy)]
enum Closed {
    /// Messages without a key go elsewhere, for the rest of a day.
    Full(Day),
    /// It has refused what it was sent.
    Until(Instant),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Routes {
    topics: HashMap<String, Topology>,
    unknown: Unknown,
    waiting: HashMap<For, Waits>,
    retries: HashMap<For, Instant>,
    closed: HashMap<PartitionId, Closed>,
    /// Partitions whose refused batches are being put back: their topics wait, for the sake of
    /// order.
    unsettled: HashMap<String, HashSet<PartitionId>>,
    days: HashMap<PartitionId, Day>,
    /// Where the next batch without keys goes.
    turn: usize,
}

/// How nodes fare, and what is under way.
pub(super) trait Fares {
    /// Whether messages without a key should rather go elsewhere.
    fn is_away(&self, node: NodeId) -> bool;
    /// Whether something waits for the partition already.
    fn is_busy(&self, partition: PartitionId) -> bool;
}

/// What became of the messages of a look.
#[derive(Debug, Default)]
pub(super) struct Routed {
    pub(super) step: Step,
    /// Whether something that is due waits in its table.
    pub(super) due_waits: bool,
}

/// Messages that wait for the same.
#[derive(Debug)]
struct Waits {
    range: Range,
    /// The first of all, which is looked at alone: if it does not have to wait again, neither have
    /// they.
    probe: Option<i64>,
}

enum Way {
    To(PartitionId),
    Wait(For),
    /// Kept until its topic has an answer, or left to be read later.
    Unknown {
        is_kept: bool,
    },
    Dead(String),
}

/// The batches of a step, as they fill.
#[derive(Default)]
struct Filling {
    targets: Vec<Target>,
    /// The last one for each partition, for messages with a key and for those without.
    open: BTreeMap<(PartitionId, bool), usize>,
    /// The partition that a topic's messages without a key fill.
    current: HashMap<String, PartitionId>,
}

/// How many of these messages, from the first, a step takes.
pub(super) fn fitting(messages: &[Waiting]) -> usize {
    let mut bytes = 0;
    let fits = |message: &&Waiting| {
        bytes += message.bytes;
        bytes <= STEP_BYTES
    };
    messages.iter().take_while(fits).count().max(1).min(messages.len())
}

impl Routes {
    /// The topics that are not known.
    pub(super) fn unknown(&mut self) -> &mut Unknown {
        &mut self.unknown
    }

    /// A topic as it is now. Returns what waited for that.
    pub(super) fn learn(&mut self, topology: Topology) -> Learned {
        let name = topology.topic.to_string();
        let learned = self.unknown.learn(&name);
        self.happened(&For::Topic(name.clone()));
        self.topics.insert(name, topology);
        learned
    }

    /// There is no such topic.
    pub(super) fn is_missing(&mut self, topic: String, why: &str) {
        self.topics.remove(&topic);
        self.happened(&For::Topic(topic.clone()));
        self.unknown.is_missing(topic, why);
    }

    /// The topology has changed: everything is looked up anew.
    pub(super) fn forget_topics(&mut self) {
        self.topics.clear();
        self.release_partitions();
    }

    /// What was stored last tells the day of a partition.
    pub(super) fn set_day(&mut self, partition: PartitionId, day: Day) {
        self.days.insert(partition, day);
    }

    /// A partition has no room on this day.
    pub(super) fn is_full(&mut self, partition: PartitionId, day: Day) {
        self.closed.insert(partition, Closed::Full(day));
    }

    /// A partition has refused a batch for good, which is in the outbox again: until nothing else
    /// waits for the partition, the topic waits, and then what is known of it is found out anew.
    pub(super) fn has_refused(&mut self, topic: &TopicName, partition: PartitionId, now: Instant) {
        self.closed.insert(partition, Closed::Until(now + CLOSED));
        self.unsettled.entry(topic.to_string()).or_default().insert(partition);
    }

    /// Nothing waits any more for these partitions.
    pub(super) fn settle(&mut self, is_idle: impl Fn(PartitionId) -> bool) {
        let mut settled = Vec::new();
        self.unsettled.retain(|topic, partitions| {
            partitions.retain(|partition| !is_idle(*partition));
            if partitions.is_empty() {
                self.topics.remove(topic);
                settled.push(For::Topic(topic.clone()));
            }
            !partitions.is_empty()
        });
        for topic in &settled {
            self.happened(topic);
        }
        if !settled.is_empty() {
            self.release_partitions();
        }
    }

    /// A key may belong to another partition by now: what waits for one is looked at again together
    /// with what comes after it.
    fn release_partitions(&mut self) {
        let of_partitions = |what: &For| matches!(what, For::Partition(_));
        self.retries.retain(|what, _| !of_partitions(what));
        let waiting = self.waiting.iter_mut().filter(|(what, _)| of_partitions(what));
        waiting.for_each(|(_, waits)| waits.probe = None);
    }

    /// What is waited for has happened: no time is, and none is tried alone.
    fn happened(&mut self, what: &For) {
        self.retries.remove(what);
        if let Some(waits) = self.waiting.get_mut(what) {
            waits.probe = None;
        }
    }

    /// These wait for somebody who may take them back.
    pub(super) fn wait_for_lock(&mut self, id: i64, now: Instant) {
        self.wait(For::Locked, id, now);
    }

    /// What waits for something which may be there now, to be looked at again: all of it where that
    /// has happened, the first where only time has passed, and not while there is something to look
    /// at anyhow (`is_looking`). So what waits in large numbers is not read again and again.
    pub(super) fn released(&mut self, now: Instant, is_looking: bool) -> Vec<Range> {
        let is_due = |what: &For| {
            self.is_released(what, now) && !(is_looking && self.is_tried_by_time(what))
        };
        let due: Vec<For> = self.waiting.keys().filter(|what| is_due(what)).cloned().collect();
        let mut ranges: Vec<Range> = due.iter().filter_map(|what| self.release(what)).collect();
        if !is_looking {
            ranges.extend(self.unknown.read_on());
        }
        ranges
    }

    fn release(&mut self, what: &For) -> Option<Range> {
        let by_time = self.retries.remove(what).is_some();
        let waits = self.waiting.get_mut(what)?;
        let (first, last) = waits.range;
        if by_time && first < last && *what != For::Locked {
            (waits.range, waits.probe) = ((first + 1, last), Some(first));
            return Some((first, first));
        }
        self.waiting.remove(what).map(|waits| waits.range)
    }

    /// Whether nothing is known to have happened; or the first is under way, and is to be heard of
    /// before.
    fn is_tried_by_time(&self, what: &For) -> bool {
        self.retries.contains_key(what)
            || self.waiting.get(what).is_some_and(|waits| waits.probe.is_some())
    }

    fn is_released(&self, what: &For, now: Instant) -> bool {
        match what {
            For::Topic(topic) if self.is_unsettled(topic) || self.unknown.has(topic) => false,
            // It was forgotten: to be asked for anew.
            For::Topic(topic) if !self.topics.contains_key(topic) => true,
            _ => self.retries.get(what).is_none_or(|at| *at <= now),
        }
    }

    /// When something that waits may be looked at again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        let at = |what: &For| match what {
            For::Topic(topic) if self.is_unsettled(topic) => None,
            _ => self.retries.get(what).copied(),
        };
        self.waiting.keys().filter_map(at).chain(self.unknown.retry_at()).min()
    }

    /// Sorts messages into batches, in their order: those that were published, then those that are
    /// due.
    pub(super) fn route(
        &mut self,
        messages: &[Waiting],
        fares: &impl Fares,
        now: (Instant, SystemTime),
    ) -> Routed {
        let (mut routed, mut filling) = (Routed::default(), Filling::default());
        let Ok(today) = Day::of(now.1) else { return routed };
        self.closed.retain(|_, closed| match closed {
            Closed::Full(day) => *day >= today,
            Closed::Until(until) => *until > now.0,
        });
        routed.step.dead = self.unknown.take_dead();
        for message in messages {
            let later = message.due_at.is_some();
            match self.way(message, &mut filling, fares) {
                Way::To(partition) => self.fill(&mut filling, message, partition, today),
                Way::Unknown { is_kept } => routed.due_waits |= later && !is_kept,
                Way::Wait(_) if later => routed.due_waits = true,
                Way::Wait(what) => self.wait(what, message.id, now.0),
                Way::Dead(why) => routed.step.dead.push((message.id, later, why)),
            }
        }
        routed.step.targets = filling.targets;
        routed
    }

    fn way(&mut self, message: &Waiting, filling: &mut Filling, fares: &impl Fares) -> Way {
        let name = message.topic.as_deref().unwrap_or_default();
        if let Err(error) = TopicName::new(name) {
            return Way::Dead(error.to_string());
        }
        if self.is_unsettled(name) {
            return Way::Wait(For::Topic(name.to_owned()));
        }
        match self.topics.get(name) {
            Some(_) if self.unknown.is_behind(name, message) => Way::Unknown { is_kept: false },
            Some(topology) => self.place(topology, message, filling, fares),
            None => Way::Unknown { is_kept: self.unknown.wait(name, message) },
        }
    }

    fn place(
        &self,
        topology: &Topology,
        message: &Waiting,
        filling: &mut Filling,
        fares: &impl Fares,
    ) -> Way {
        if let Some(key) = message.key.as_deref() {
            let partition = partition_of(topology, key_slot(key));
            return match partition {
                Some(partition) if self.keyed_wait_for(partition, message) => {
                    Way::Wait(For::Partition(partition))
                }
                Some(partition) => Way::To(partition),
                None => Way::Dead(format!("topic {} has no partitions", topology.topic)),
            };
        }
        let name = topology.topic.as_str();
        if let Some(partition) = filling.current.get(name)
            && filling.has_room(*partition)
        {
            return Way::To(*partition);
        }
        let all = &topology.partitions;
        let start = self.turn;
        let in_turn = || (0..all.len()).map(|step| all[(start.wrapping_add(step)) % all.len()]);
        let is_open = |p: &PartitionId| !self.closed.contains_key(p);
        let is_up = |p: &PartitionId| is_open(p) && !fares.is_away(p.node());
        let idle = in_turn()
            .find(|p| is_up(p) && !fares.is_busy(*p) && !filling.open.contains_key(&(*p, false)));
        let chosen = idle.or_else(|| in_turn().find(is_up)).or_else(|| in_turn().find(is_open));
        match chosen {
            Some(partition) => {
                filling.current.insert(name.to_owned(), partition);
                Way::To(partition)
            }
            None if all.is_empty() => Way::Dead(format!("topic {name} has no partitions")),
            None => Way::Wait(For::Topic(name.to_owned())),
        }
    }

    /// Whether a message with a key has to wait for a partition: also while earlier ones do, for
    /// the sake of order.
    fn keyed_wait_for(&self, partition: PartitionId, message: &Waiting) -> bool {
        let waits = || self.waiting.get(&For::Partition(partition));
        let is_first = |waits: &Waits| message.due_at.is_none() && message.id < waits.range.0;
        matches!(self.closed.get(&partition), Some(Closed::Until(_)))
            || waits().is_some_and(|waits| !is_first(waits))
    }

    /// Adds a message to the batch for its partition.
    fn fill(
        &mut self,
        filling: &mut Filling,
        message: &Waiting,
        partition: PartitionId,
        today: Day,
    ) {
        let topology = message.topic.as_ref().and_then(|topic| self.topics.get(topic));
        let Some(topology) = topology else { return };
        let keyed = message.key.is_some();
        let last = filling.open.get(&(partition, keyed)).copied();
        let last = last.filter(|last| takes(&filling.targets[*last], message.bytes));
        let place = last.unwrap_or_else(|| {
            self.turn = self.turn.wrapping_add(1);
            filling.targets.push(Target {
                partition,
                topic: topology.topic.clone(),
                topic_id: topology.id,
                generation: topology.generation,
                day: self.days.get(&partition).copied().unwrap_or(today),
                messages: Vec::new(),
                bytes: 0,
            });
            filling.targets.len() - 1
        });
        filling.open.insert((partition, keyed), place);
        let target = &mut filling.targets[place];
        target.messages.push((message.id, message.due_at.is_some()));
        target.bytes += message.bytes;
    }

    fn is_unsettled(&self, topic: &str) -> bool {
        self.unsettled.contains_key(topic)
    }

    fn wait(&mut self, what: For, id: i64, now: Instant) {
        let pause = match what {
            For::Locked => LOCKED,
            For::Topic(_) | For::Partition(_) => TRY_AGAIN,
        };
        let new = Waits { range: (id, id), probe: None };
        let waits = self.waiting.entry(what.clone()).or_insert(new);
        waits.range = (waits.range.0.min(id), waits.range.1.max(id));
        waits.probe = waits.probe.filter(|probe| *probe != id);
        if waits.probe.is_none() {
            self.retries.entry(what).or_insert(now + pause);
        }
    }
}

impl Filling {
    fn has_room(&self, partition: PartitionId) -> bool {
        self.open.get(&(partition, false)).is_some_and(|last| takes(&self.targets[*last], 0))
    }
}

fn takes(target: &Target, bytes: usize) -> bool {
    let count = target.messages.len();
    count == 0 || (count < MAX_MESSAGES as usize && target.bytes + bytes <= MAX_BYTES)
}

fn partition_of(topology: &Topology, slot: u16) -> Option<PartitionId> {
    let at = topology.slots.partition_point(|(_, last, _)| *last < slot);
    topology.slots.get(at).map(|(_, _, partition)| *partition)
}

#[cfg(test)]
mod tests;
