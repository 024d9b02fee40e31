//! Where messages of an outbox go, as `send` would have it: pure. What is not known has to be asked, and
//! what can't go now waits in the outbox; neither holds up anything else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::seen::Range;
use crate::id::{Day, NodeId, PartitionId};
use crate::name::TopicName;
use crate::producer::batch::{MAX_BYTES, MAX_MESSAGES};
use crate::store::outbox::{Step, Target, Waiting};
use crate::topology::{Topology, key_slot};

/// When the control database is asked again that did not answer.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// So many topics are asked for at once, and when the next are looked at again.
const MAX_ASKED: usize = 8;
const ASK_NEXT: Duration = Duration::from_millis(100);
/// Where more topics are known, those are forgotten that there are not.
const MAX_TOPICS: usize = 10_000;
/// How long nothing goes to a partition that has refused its messages.
const CLOSED: Duration = Duration::from_secs(5);
/// When a message is looked at again that somebody is about to take back.
const LOCKED: Duration = Duration::from_millis(200);
/// The most bytes of a step.
const STEP_BYTES: usize = 8 << 20;

/// What is known of a topic.
#[derive(Debug)]
enum Known {
    There(Topology),
    /// There was none of that name when it was asked, for these.
    Missing(String, Upto),
    /// It is being asked, for these.
    Asked(Upto),
    /// It could not be asked.
    Away(Instant),
}

/// The last messages, published and due, that were there when a topic was asked for: it may be made any
/// moment, for those that come after.
#[derive(Debug, Clone, Copy, Default)]
struct Upto {
    published: i64,
    due: Option<(SystemTime, i64)>,
}

impl Upto {
    fn has(&self, message: &Waiting) -> bool {
        match message.due_at {
            Some(due_at) => self.due.is_some_and(|upto| (due_at, message.id) <= upto),
            None => message.id <= self.published,
        }
    }

    fn add(&mut self, message: &Waiting) {
        match message.due_at {
            Some(due_at) => self.due = self.due.max(Some((due_at, message.id))),
            None => self.published = self.published.max(message.id),
        }
    }
}

/// What messages wait for, in the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum For {
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
    topics: HashMap<String, Known>,
    waiting: HashMap<For, Waits>,
    retries: HashMap<For, Instant>,
    closed: HashMap<PartitionId, Closed>,
    /// Partitions whose refused batches are being put back: their topics wait, for the sake of order.
    unsettled: HashMap<TopicName, HashSet<PartitionId>>,
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
    /// Topics of which the control database is to be asked.
    pub(super) ask: Vec<String>,
    /// Whether something that is due waits in its table.
    pub(super) due_waits: bool,
}

/// Messages that wait for the same.
#[derive(Debug)]
struct Waits {
    range: Range,
    /// The first of all, which is looked at alone: if it does not have to wait again, neither have they.
    probe: Option<i64>,
}

enum Way {
    To(PartitionId),
    Wait(For),
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
    /// A topic as it is now.
    pub(super) fn learn(&mut self, topology: Topology) {
        let name = topology.topic.to_string();
        self.happened(&For::Topic(name.clone()));
        self.topics.insert(name, Known::There(topology));
    }

    /// There is no such topic.
    pub(super) fn is_missing(&mut self, topic: String, why: String) {
        self.happened(&For::Topic(topic.clone()));
        let upto = match self.topics.get(&topic) {
            Some(Known::Asked(upto)) => *upto,
            _ => Upto::default(),
        };
        self.topics.insert(topic, Known::Missing(why, upto));
    }

    /// The control database did not answer.
    pub(super) fn is_away(&mut self, topic: String, now: Instant) {
        self.topics.insert(topic, Known::Away(now + ASK_AGAIN));
    }

    /// The topology has changed: everything is looked up anew.
    pub(super) fn forget_topics(&mut self) {
        self.topics.retain(|_, known| matches!(known, Known::Asked(_)));
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

    /// A partition has refused a batch for good, which is in the outbox again: until nothing else waits
    /// for the partition, the topic waits, and then what is known of it is found out anew.
    pub(super) fn has_refused(&mut self, topic: &TopicName, partition: PartitionId, now: Instant) {
        self.closed.insert(partition, Closed::Until(now + CLOSED));
        self.unsettled.entry(topic.clone()).or_default().insert(partition);
    }

    /// Nothing waits any more for these partitions.
    pub(super) fn settle(&mut self, is_idle: impl Fn(PartitionId) -> bool) {
        let mut settled = Vec::new();
        self.unsettled.retain(|topic, partitions| {
            partitions.retain(|partition| !is_idle(*partition));
            if partitions.is_empty() {
                self.topics.remove(topic.as_str());
                settled.push(For::Topic(topic.to_string()));
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

    /// A key may belong to another partition by now: what waits for one is looked at again together with
    /// what comes after it.
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

    /// What waits for something which may be there now, to be looked at again: all of it where that has
    /// happened, the first where only time has passed, and not while there is something to look at anyhow
    /// (`is_looking`). So what waits in large numbers is not read again and again.
    pub(super) fn released(&mut self, now: Instant, is_looking: bool) -> Vec<Range> {
        let is_due = |what: &For| {
            self.is_released(what, now) && !(is_looking && self.is_tried_by_time(what))
        };
        let due: Vec<For> = self.waiting.keys().filter(|what| is_due(what)).cloned().collect();
        due.iter().filter_map(|what| self.release(what)).collect()
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

    /// Whether nothing is known to have happened; or the first is under way, and is to be heard of before.
    fn is_tried_by_time(&self, what: &For) -> bool {
        self.retries.contains_key(what)
            || self.waiting.get(what).is_some_and(|waits| waits.probe.is_some())
    }

    fn is_released(&self, what: &For, now: Instant) -> bool {
        match what {
            For::Topic(topic) if self.is_unsettled(topic) => false,
            For::Topic(topic) => match self.topics.get(topic) {
                Some(Known::Asked(_)) => false,
                Some(Known::Away(until)) => *until <= now,
                // Something was closed.
                Some(Known::There(_)) => self.retries.get(what).is_none_or(|at| *at <= now),
                Some(Known::Missing(..)) | None => true,
            },
            For::Partition(_) | For::Locked => self.retries.get(what).is_none_or(|at| *at <= now),
        }
    }

    /// When something that waits may be looked at again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        let at = |what: &For| match what {
            For::Topic(topic) if self.is_unsettled(topic) => None,
            For::Topic(topic) => match self.topics.get(topic) {
                Some(Known::Away(until)) => Some(*until),
                Some(Known::There(_)) => self.retries.get(what).copied(),
                _ => None,
            },
            For::Partition(_) | For::Locked => self.retries.get(what).copied(),
        };
        self.waiting.keys().filter_map(at).min()
    }

    /// Sorts messages into batches, in their order: those that were published, then those that are due.
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
        if self.topics.len() > MAX_TOPICS {
            self.topics.retain(|_, known| !matches!(known, Known::Missing(..)));
        }
        let mut asked: HashSet<String> = HashSet::new();
        for message in messages {
            let later = message.due_at.is_some();
            let before = routed.ask.len();
            let way = self.way(message, &mut filling, fares, now.0, &mut routed.ask);
            asked.extend(routed.ask.iter().skip(before).cloned());
            if let (Way::Wait(For::Topic(topic)), Some(Known::Asked(upto))) =
                (&way, message.topic.as_ref().and_then(|topic| self.topics.get_mut(topic)))
                && asked.contains(topic)
            {
                upto.add(message);
            }
            match way {
                Way::To(partition) => self.fill(&mut filling, message, partition, today),
                Way::Wait(_) if later => routed.due_waits = true,
                Way::Wait(what) => self.wait(what, message.id, now.0),
                Way::Dead(why) => routed.step.dead.push((message.id, later, why)),
            }
        }
        routed.step.targets = filling.targets;
        routed
    }

    fn way(
        &mut self,
        message: &Waiting,
        filling: &mut Filling,
        fares: &impl Fares,
        now: Instant,
        ask: &mut Vec<String>,
    ) -> Way {
        let name = message.topic.as_deref().unwrap_or_default();
        if let Err(error) = TopicName::new(name) {
            return Way::Dead(error.to_string());
        }
        if self.is_unsettled(name) {
            return Way::Wait(For::Topic(name.to_owned()));
        }
        match self.topics.get(name) {
            Some(Known::There(topology)) => self.place(topology, message, filling, fares),
            Some(Known::Missing(why, upto)) if upto.has(message) => Way::Dead(why.clone()),
            Some(Known::Away(until)) if *until > now => Way::Wait(For::Topic(name.to_owned())),
            // What is under way may be an answer of before it was published.
            Some(Known::Asked(_)) => Way::Wait(For::Topic(name.to_owned())),
            Some(Known::Away(_) | Known::Missing(..)) | None => {
                let asked = |known: &&Known| matches!(known, Known::Asked(_));
                let known = if self.topics.values().filter(asked).count() < MAX_ASKED {
                    ask.push(name.to_owned());
                    Known::Asked(Upto::default())
                } else {
                    Known::Away(now + ASK_NEXT)
                };
                self.topics.insert(name.to_owned(), known);
                Way::Wait(For::Topic(name.to_owned()))
            }
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

    /// Whether a message with a key has to wait for a partition: also while earlier ones do, for the sake of
    /// order.
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
        let Some(Known::There(topology)) =
            message.topic.as_ref().and_then(|topic| self.topics.get(topic))
        else {
            return;
        };
        let keyed = message.key.is_some();
        let last = filling.open.get(&(partition, keyed)).copied();
        let last = last.filter(|last| takes(&filling.targets[*last], message.bytes));
        let place = last.unwrap_or_else(|| {
            self.turn = self.turn.wrapping_add(1);
            filling.targets.push(Target {
                partition,
                topic: topology.topic.clone(),
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
        !self.unsettled.is_empty() && self.unsettled.keys().any(|known| known.as_str() == topic)
    }

    fn wait(&mut self, what: For, id: i64, now: Instant) {
        let pause = match what {
            For::Locked => LOCKED,
            For::Topic(_) | For::Partition(_) => ASK_AGAIN,
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
