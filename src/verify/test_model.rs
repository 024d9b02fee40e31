//! A queue in small that keeps every promise, and takes every liberty that it has: takeovers, stale
//! owners, commits confirmed late or never, sends in doubt, marked duplicates, seeks, lost tails.

// Small numbers all.
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{MessageId, Uid};
use crate::verify::record::mix;
use crate::verify::test_kit::{Stamped, id_in, partition, uid};
use crate::verify::test_members::Member;
use crate::verify::{Event, Value};

/// What a model run may do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Liberties {
    pub(super) seeks: bool,
    pub(super) lost_tails: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Message {
    pub(super) value: Value,
    pub(super) uid: Uid,
    marked: bool,
}

/// What the server knows of a group in a partition. Positions count messages.
#[derive(Debug, Clone, Default)]
pub(super) struct Cursor {
    pub(super) done: usize,
    pub(super) ahead: BTreeSet<usize>,
    pub(super) token: Option<u64>,
}

pub(super) struct Model {
    seed: u64,
    pub(super) now: u64,
    pub(super) partitions: u8,
    liberties: Liberties,
    pub(super) counters: [u64; 3],
    sent: i64,
    pub(super) tokens: u64,
    pub(super) logs: BTreeMap<u8, Vec<Message>>,
    pub(super) cursors: BTreeMap<(u16, u8), Cursor>,
    pub(super) members: Vec<Member>,
    pub(super) events: Vec<Stamped>,
}

const PRODUCER: u32 = 0;
pub(super) const CONSUMER: u32 = 10;
const READER: u32 = 90;

impl Model {
    /// Runs a workload of some steps to its end.
    pub(super) fn run(seed: u64, steps: usize, liberties: Liberties) -> Self {
        let mut model = Self {
            seed,
            now: 1_000,
            partitions: 1,
            liberties,
            counters: [0; 3],
            sent: 0,
            tokens: 0,
            logs: BTreeMap::new(),
            cursors: BTreeMap::new(),
            members: Vec::new(),
            events: Vec::new(),
        };
        model.partitions = 1 + model.below(3) as u8;
        for part in 1..=model.partitions {
            model.logs.insert(part, Vec::new());
            for group in 1..=2 {
                model.cursors.insert((group, part), Cursor::default());
            }
        }
        for _ in 0..steps {
            model.step();
        }
        model.drain();
        model.read();
        model.events.sort_by_key(|stamped| stamped.at);
        model
    }

    pub(super) fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(1);
        mix(self.seed)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.random() % bound as u64) as usize
    }

    pub(super) fn tell(&mut self, recorder: u32, event: Event) {
        self.now += 10;
        self.tell_later(recorder, 0, event);
    }

    /// Something that its worker hears of with a delay.
    pub(super) fn tell_later(&mut self, recorder: u32, delay: u64, event: Event) {
        let at = self.now + delay;
        self.events.push(Stamped { at, recorder, event });
    }

    fn step(&mut self) {
        match self.below(40) {
            0..12 => self.send(),
            12..14 => self.take_over(),
            14..19 => self.with_member(Self::fetch),
            19..29 => self.with_member(Self::deliver),
            29..36 => self.with_member(Self::ack),
            36..39 => self.with_member(Self::commit),
            _ => self.disturb(),
        }
    }

    fn disturb(&mut self) {
        match self.below(4) {
            0 if self.liberties.seeks => self.seek(),
            1 if self.liberties.lost_tails => self.lose_tail(),
            2 if self.members.len() > 4 => drop(self.members.remove(0)),
            _ => {}
        }
    }

    fn append(&mut self, part: u8, message: Message) -> MessageId {
        let log = self.logs.get_mut(&part).unwrap();
        log.push(message);
        id_in(part, log.len() as u32)
    }

    fn send(&mut self) {
        let writer = self.below(3);
        self.counters[writer] += 1;
        self.sent += 1;
        let value = Value::new(writer as u16, self.counters[writer]).unwrap();
        let lane = Some(self.below(4) as u64).filter(|lane| *lane > 0);
        let recorder = PRODUCER + writer as u32;
        self.tell(recorder, Event::Sending { value, lane });
        let anywhere = self.random();
        let part = 1 + (lane.unwrap_or(anywhere) % u64::from(self.partitions)) as u8;
        let message = Message { value, uid: uid(self.sent), marked: false };
        let outcome = match self.below(20) {
            0 => Some(Event::Refused { value }),
            1 => Some(Event::Unknown { value }),
            2 => None,
            3 => {
                self.append(part, message);
                Some(Event::Unknown { value })
            }
            4 => {
                // In doubt, so sent elsewhere too.
                if self.below(2) == 0 {
                    self.append(part, message);
                }
                let elsewhere = 1 + self.below(self.partitions.into()) as u8;
                let marked = Message { marked: true, ..message };
                let id = self.append(elsewhere, marked);
                Some(Event::Acknowledged { value, id })
            }
            _ => {
                let id = self.append(part, message);
                Some(Event::Acknowledged { value, id })
            }
        };
        let delay = 1 + self.random() % 100;
        if let Some(outcome) = outcome {
            self.tell_later(recorder + 3, delay, outcome);
        }
    }

    fn seek(&mut self) {
        let place = self.any_place();
        let to = self.below(self.logs[&place.1].len() + 1);
        let known = self.below(4) > 0;
        let (group, partition) = (place.0, partition(place.1));
        let to_id = known.then(|| id_in(place.1, to as u32 + 1));
        let recorder = CONSUMER + 30;
        self.tell(recorder, Event::SeekStarted { group, partition, to: to_id });
        self.now += 3;
        let cursor = self.cursors.get_mut(&place).unwrap();
        *cursor = Cursor { done: to, ..Cursor::default() };
        if self.below(4) > 0 {
            let delay = 1 + self.random() % 50;
            let recorder = recorder + self.random() as u32 % 8;
            self.tell_later(recorder, delay, Event::SeekDone { group, partition });
        }
    }

    fn lose_tail(&mut self) {
        let part = 1 + self.below(self.partitions.into()) as u8;
        let len = self.logs[&part].len();
        let kept = len - self.below(len.min(8) + 1);
        let after = (kept > 0).then(|| id_in(part, kept as u32));
        let partition = partition(part);
        self.tell(CONSUMER + 40, Event::TailLost { partition, after });
        self.logs.get_mut(&part).unwrap().truncate(kept);
        for member in self.members.iter_mut().filter(|m| m.place.1 == part) {
            member.ended = true;
        }
        for group in 1..=2 {
            let most = self.cursors[&(group, part)].done.min(kept);
            let done = most - self.below(most.min(3) + 1);
            let cursor = Cursor { done, ..Cursor::default() };
            self.cursors.insert((group, part), cursor);
        }
    }

    pub(super) fn read(&mut self) {
        for (part, log) in self.logs.clone() {
            for (position, message) in log.iter().enumerate() {
                let event = Event::Stored {
                    id: id_in(part, position as u32 + 1),
                    uid: message.uid,
                    value: Some(message.value),
                    marked_duplicate: message.marked,
                };
                self.tell(READER, event);
            }
        }
    }
}
