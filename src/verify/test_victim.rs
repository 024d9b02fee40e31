//! A good history that is about to be damaged, and what can be chosen in it.

use std::time::Duration;

use crate::id::MessageId;
use crate::verify::record::nanos;
use crate::verify::test_kit::Stamped;
use crate::verify::test_model::{Liberties, Model};
use crate::verify::{Event, Holding, Value};

/// A history to be damaged, and the number that chooses where.
pub(super) struct Victim {
    pub(super) events: Vec<Stamped>,
    pick: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Commit {
    pub(super) index: usize,
    pub(super) holding: Holding,
    pub(super) upto: MessageId,
    pub(super) asked: u64,
    pub(super) at: u64,
}

impl Victim {
    pub(super) fn new(seed: u64, steps: usize, pick: usize) -> Self {
        let liberties = Liberties { seeks: false, lost_tails: false };
        let events = Model::run(seed, steps, liberties).events;
        Self { events, pick }
    }

    pub(super) fn choose<T: Copy>(&self, all: &[T]) -> Option<T> {
        all.get(self.pick % all.len().max(1)).copied()
    }

    /// What a function finds in the events, with their places.
    pub(super) fn find<T>(&self, of: impl Fn(usize, Event) -> Option<T>) -> Vec<T> {
        let events = self.events.iter().enumerate();
        events.filter_map(|(at, stamped)| of(at, stamped.event)).collect()
    }

    /// The place, id and value of what is stored once and unmarked.
    pub(super) fn stored(&self) -> Vec<(usize, MessageId, Value)> {
        let all = self.find(|at, event| match event {
            Event::Stored { id, value, .. } => Some((at, id, value?)),
            _ => None,
        });
        let copies = |value| all.iter().filter(|(.., other)| *other == value).count();
        let marked = |at: usize| {
            matches!(self.events[at].event, Event::Stored { marked_duplicate: true, .. })
        };
        let single = all.iter().filter(|(at, _, value)| copies(*value) == 1 && !marked(*at));
        single.copied().collect()
    }

    pub(super) fn receipt(&self, value: Value) -> Option<(usize, MessageId)> {
        let all = self.find(|at, event| match event {
            Event::Acknowledged { value: of, id } => (of == value).then_some((at, id)),
            _ => None,
        });
        all.first().copied()
    }

    /// A receipt of what is stored once: place of receipt, id, value, place of what is stored.
    pub(super) fn any_receipt(&self) -> Option<(usize, MessageId, Value, usize)> {
        let stored = self.stored().into_iter();
        let receipts: Vec<_> = stored
            .filter_map(|(at, id, value)| Some((self.receipt(value)?.0, id, value, at)))
            .collect();
        self.choose(&receipts)
    }

    pub(super) fn deliveries(&self) -> Vec<(usize, Holding, MessageId)> {
        self.find(|at, event| match event {
            Event::Delivered { holding, id, .. } => Some((at, holding, id)),
            _ => None,
        })
    }

    pub(super) fn commits(&self) -> Vec<Commit> {
        self.find(|index, event| match event {
            Event::CursorCommitted { holding, upto, asked } => Some(Commit {
                index,
                holding,
                upto,
                asked: nanos(asked),
                at: self.events[index].at,
            }),
            _ => None,
        })
    }

    /// The last commit of the highest cursor of some group and partition.
    pub(super) fn last_commit(&self) -> Option<Commit> {
        let commits = self.commits();
        let chosen = self.choose(&commits)?;
        let same = commits.iter().filter(|commit| same_place(commit, &chosen));
        same.max_by_key(|commit| (commit.upto, commit.at)).copied()
    }

    pub(super) fn remove(&mut self, gone: impl Fn(Event) -> bool) {
        self.events.retain(|stamped| !gone(stamped.event));
    }

    /// Something that happens after everything else.
    pub(super) fn append(&mut self, event: Event) {
        let at = self.end() + 10;
        let recorder = 99;
        self.events.push(Stamped { at, recorder, event });
    }

    pub(super) fn end(&self) -> u64 {
        let ends = self.events.iter().map(|stamped| stamped.at);
        ends.max().unwrap_or(0)
    }

    pub(super) fn append_commit(&mut self, holding: Holding, upto: MessageId) {
        let asked = Duration::from_nanos(self.end() + 1);
        self.append(Event::CursorCommitted { holding, upto, asked });
    }
}

pub(super) fn same_place(a: &Commit, b: &Commit) -> bool {
    a.holding.group == b.holding.group && a.upto.partition() == b.upto.partition()
}
