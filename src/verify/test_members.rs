//! The consumers of the model: owners, and those that have not noticed yet that they are none.

// Small numbers all.
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::verify::test_kit::{id_in, partition};
use crate::verify::test_model::{CONSUMER, Message, Model};
use crate::verify::{Event, Holding};

#[derive(Debug)]
pub(super) struct Member {
    pub(super) place: (u16, u8),
    holding: Holding,
    /// What it knew to be finished, and has acknowledged since.
    done: usize,
    acked: BTreeSet<usize>,
    next: usize,
    fetched: VecDeque<(usize, Message)>,
    in_hand: Vec<usize>,
    /// The server that it read from is no more, and the next read would show that.
    pub(super) ended: bool,
}

impl Model {
    pub(super) fn any_place(&mut self) -> (u16, u8) {
        let group = 1 + self.below(2) as u16;
        (group, 1 + self.below(self.partitions.into()) as u8)
    }

    pub(super) fn take_over(&mut self) {
        let place = self.any_place();
        self.take_over_at(place);
    }

    fn take_over_at(&mut self, place: (u16, u8)) {
        self.tokens += 1;
        let holding = Holding { group: place.0, member: self.below(3) as u32, token: self.tokens };
        let cursor = self.cursors.get_mut(&place).unwrap();
        cursor.token = Some(holding.token);
        let member = Member {
            place,
            holding,
            done: cursor.done,
            acked: cursor.ahead.clone(),
            next: cursor.done,
            fetched: VecDeque::new(),
            in_hand: Vec::new(),
            ended: false,
        };
        if self.below(2) == 0 {
            let partition = partition(place.1);
            let delay = self.random() % 50;
            let recorder = CONSUMER + 20 + holding.member;
            self.tell_later(recorder, delay, Event::Owned { holding, partition });
        }
        self.members.push(member);
    }

    pub(super) fn with_member(&mut self, act: impl Fn(&mut Self, &mut Member)) {
        if self.members.is_empty() {
            return;
        }
        let index = self.below(self.members.len());
        let mut member = self.members.remove(index);
        act(self, &mut member);
        self.members.push(member);
    }

    /// Fetches ahead; an owner that was followed may do so until it knows.
    pub(super) fn fetch(&mut self, member: &mut Member) {
        if member.ended {
            return;
        }
        let most = 1 + self.below(5);
        let log = &self.logs[&member.place.1];
        let start = member.next;
        for (position, message) in log.iter().enumerate().skip(start).take(most) {
            if !member.acked.contains(&position) {
                member.fetched.push_back((position, *message));
            }
            member.next = position + 1;
        }
    }

    pub(super) fn deliver(&mut self, member: &mut Member) {
        if let Some((position, message)) = member.fetched.pop_front() {
            member.in_hand.push(position);
            let event = Event::Delivered {
                holding: member.holding,
                id: id_in(member.place.1, position as u32 + 1),
                uid: message.uid,
                value: Some(message.value),
            };
            self.tell(CONSUMER + member.holding.member, event);
        }
    }

    pub(super) fn ack(&mut self, member: &mut Member) {
        if member.in_hand.is_empty() {
            return;
        }
        // Mostly in order.
        let index = if self.below(4) == 0 { self.below(member.in_hand.len()) } else { 0 };
        let position = member.in_hand.remove(index);
        member.acked.insert(position);
        let id = id_in(member.place.1, position as u32 + 1);
        let holding = member.holding;
        self.tell(CONSUMER + holding.member, Event::Acked { holding, id });
    }

    pub(super) fn commit(&mut self, member: &mut Member) {
        let asked = Duration::from_nanos(self.now);
        self.now += 5;
        let cursor = self.cursors.get_mut(&member.place).unwrap();
        if cursor.token != Some(member.holding.token) {
            return;
        }
        while member.acked.remove(&member.done) {
            member.done += 1;
        }
        cursor.done = cursor.done.max(member.done);
        cursor.ahead.clone_from(&member.acked);
        let done = cursor.done as u32;
        let (delay, heard) = (1 + self.random() % 200, self.below(3) > 0);
        if done > 0 && heard {
            let event = Event::CursorCommitted {
                holding: member.holding,
                upto: id_in(member.place.1, done),
                asked,
            };
            self.tell_later(CONSUMER + 10 + member.holding.member, delay, event);
        }
    }

    /// Every group reads to the end.
    pub(super) fn drain(&mut self) {
        self.now += 1_000;
        let places: Vec<_> = self.cursors.keys().copied().collect();
        for place in places {
            self.take_over_at(place);
            let mut member = self.members.pop().unwrap();
            while member.next < self.logs[&place.1].len() {
                self.fetch(&mut member);
            }
            while !member.fetched.is_empty() {
                self.deliver(&mut member);
            }
            while !member.in_hand.is_empty() {
                self.ack(&mut member);
            }
            self.commit(&mut member);
            self.now += 1_000;
            let (group, partition) = (place.0, partition(place.1));
            self.tell(CONSUMER + 40, Event::Drained { group, partition });
        }
    }
}
