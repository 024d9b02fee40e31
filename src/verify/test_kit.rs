//! Small histories, told in few words: value `n` of writer 1 is stored as id `n` of partition 1, unless
//! said otherwise. Each event happens a millisecond after the one before.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use crate::id::{Day, MessageId, PartitionId, Uid};
use crate::verify::{AnomalyKind, CheckOptions, Event, History, Holding, Report, Value, check};

/// An event with its time in nanoseconds and its recorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamped {
    pub(super) at: u64,
    pub(super) recorder: u32,
    pub(super) event: Event,
}

pub(super) const MILLI: u64 = 1_000_000;

pub(super) fn partition(number: u8) -> PartitionId {
    PartitionId::new(1, number).unwrap()
}

pub(super) fn id_in(part: u8, sequence: u32) -> MessageId {
    let day = Day::from_yymmdd(261_122).unwrap();
    MessageId::new(partition(part), day, sequence).unwrap()
}

pub(super) fn id(sequence: u32) -> MessageId {
    id_in(1, sequence)
}

pub(super) fn value(number: u32) -> Value {
    Value::new(1, number.into()).unwrap()
}

pub(super) fn uid(number: i64) -> Uid {
    Uid { producer: Uuid::from_u128(7), sequence: number, index: 0 }
}

/// Member and token alike, in group 1.
pub(super) fn held(by: u32) -> Holding {
    Holding { group: 1, member: by, token: by.into() }
}

/// Records events, each recorder's in order of time, and checks them.
pub(super) fn check_events(events: &[Stamped], options: &CheckOptions) -> Report {
    let history = History::new(&std::env::temp_dir()).unwrap();
    let mut by_recorder: BTreeMap<u32, Vec<Stamped>> = BTreeMap::new();
    for stamped in events {
        by_recorder.entry(stamped.recorder).or_default().push(*stamped);
    }
    for events in by_recorder.values_mut() {
        events.sort_by_key(|stamped| stamped.at);
        let mut recorder = history.recorder().unwrap();
        for stamped in events {
            let at = Duration::from_nanos(stamped.at);
            recorder.record(at, &stamped.event).unwrap();
        }
    }
    check(&history, options).unwrap()
}

/// What was found, without what is zero.
pub(super) fn kinds(report: &Report) -> BTreeMap<AnomalyKind, u64> {
    let all = AnomalyKind::ALL.into_iter();
    all.map(|kind| (kind, report.count(kind))).filter(|(_, count)| *count > 0).collect()
}

/// A history being told.
#[derive(Default)]
pub(super) struct Story {
    pub(super) events: Vec<Stamped>,
    pub(super) now: u64,
    /// The final read: value, uid, whether marked.
    pub(super) log: BTreeMap<MessageId, (Option<Value>, Uid, bool)>,
}

impl Story {
    /// Values 1 to `count`, sent and acknowledged in one lane.
    pub(super) fn sent(count: u32) -> Self {
        let mut story = Self::default();
        for number in 1..=count {
            story.send(number, Some(1));
            story.acknowledge(number, id(number));
            story.store(number, id(number));
        }
        story
    }

    /// The same, and delivered to the first member, acknowledged and committed.
    pub(super) fn consumed(count: u32) -> Self {
        let mut story = Self::sent(count);
        story.consume(1, 1..=count);
        story.commit(1, count);
        story
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.now += MILLI;
        let (at, recorder) = (self.now, 0);
        self.events.push(Stamped { at, recorder, event });
    }

    pub(super) fn send(&mut self, number: u32, lane: Option<u64>) {
        let value = value(number);
        self.tell(Event::Sending { value, lane });
    }

    pub(super) fn acknowledge(&mut self, number: u32, id: MessageId) {
        let value = value(number);
        self.tell(Event::Acknowledged { value, id });
    }

    pub(super) fn store(&mut self, number: u32, id: MessageId) {
        self.log.insert(id, (Some(value(number)), uid(number.into()), false));
    }

    pub(super) fn deliver(&mut self, by: u32, number: u32) {
        self.tell(Event::Delivered {
            holding: held(by),
            id: id(number),
            uid: uid(number.into()),
            value: Some(value(number)),
        });
    }

    pub(super) fn ack(&mut self, by: u32, number: u32) {
        let (holding, id) = (held(by), id(number));
        self.tell(Event::Acked { holding, id });
    }

    /// Delivered and acknowledged.
    pub(super) fn consume(&mut self, by: u32, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            self.deliver(by, number);
            self.ack(by, number);
        }
    }

    /// A commit that was asked for just now.
    pub(super) fn commit(&mut self, by: u32, upto: u32) {
        self.commit_asked(by, upto, self.now);
    }

    pub(super) fn commit_asked(&mut self, by: u32, upto: u32, asked: u64) {
        let asked = Duration::from_nanos(asked);
        let (holding, upto) = (held(by), id(upto));
        self.tell(Event::CursorCommitted { holding, upto, asked });
    }

    pub(super) fn drained(&mut self) {
        let partition = partition(1);
        self.tell(Event::Drained { group: 1, partition });
    }

    /// The report, after the final read.
    pub(super) fn report(&self) -> Report {
        let stored = self.log.iter().map(|(id, (value, uid, marked))| Stamped {
            at: self.now + MILLI,
            recorder: 1,
            event: Event::Stored { id: *id, uid: *uid, value: *value, marked_duplicate: *marked },
        });
        let events: Vec<_> = self.events.iter().copied().chain(stored).collect();
        check_events(&events, &CheckOptions::default())
    }

    /// Exactly these findings, and no other.
    pub(super) fn finds(&self, expected: &[(AnomalyKind, u64)]) -> Report {
        let report = self.report();
        let expected: BTreeMap<_, _> = expected.iter().copied().collect();
        assert_eq!(kinds(&report), expected, "{:#?}", report.anomalies);
        let sum = |found: &BTreeMap<AnomalyKind, u64>| {
            let violations = found.iter().filter(|(kind, _)| kind.is_violation());
            violations.map(|(_, count)| count).sum::<u64>()
        };
        assert_eq!(report.violations, sum(&expected));
        report
    }
}
