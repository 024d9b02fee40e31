//! Events as records of a fixed size, six words of 64 bits each.
//!
//! ```text
//! word 0   kind (8) | flags (8) | group (16) | member (32)
//! word 1   time, nanoseconds since the history began
//! word 2   value, or partition
//! word 3   id, or 0
//! word 4   token, or lane
//! word 5   fingerprint of the uid, or when a commit was asked for
//! ```

use std::time::Duration;

use crate::id::{MessageId, PartitionId, Uid};
use crate::verify::event::{Event, Holding, Value};

/// Words of a record.
pub(super) const WORDS: usize = 6;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Sending,
    Acknowledged,
    Refused,
    Unknown,
    Owned,
    Lost,
    Delivered,
    Acked,
    Committed,
    SeekStarted,
    SeekDone,
    Drained,
    Stored,
    TailLost,
    TailNoticed,
}

const KINDS: [Kind; 15] = [
    Kind::Sending,
    Kind::Acknowledged,
    Kind::Refused,
    Kind::Unknown,
    Kind::Owned,
    Kind::Lost,
    Kind::Delivered,
    Kind::Acked,
    Kind::Committed,
    Kind::SeekStarted,
    Kind::SeekDone,
    Kind::Drained,
    Kind::Stored,
    Kind::TailLost,
    Kind::TailNoticed,
];

impl Kind {
    /// The kind of a number, if there is one.
    pub(super) fn of(number: u64) -> Option<Self> {
        KINDS.get(usize::try_from(number).ok()?).copied()
    }
}

/// The sending has a lane.
const LANE: u8 = 1;
/// The payload was damaged: there is no value.
const DAMAGED: u8 = 2;
/// The message was marked as a possible duplicate.
const MARKED: u8 = 4;

/// One event, flat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: Kind,
    flags: u8,
    pub(super) group: u16,
    pub(super) member: u32,
    pub(super) time: u64,
    subject: u64,
    pub(super) id: i64,
    pub(super) token: u64,
    extra: u64,
}

impl Record {
    /// The record of an event at a time.
    pub(super) fn of(at: Duration, event: &Event) -> Self {
        let mut record = Self {
            kind: Kind::Sending,
            flags: 0,
            group: 0,
            member: 0,
            time: nanos(at),
            subject: 0,
            id: 0,
            token: 0,
            extra: 0,
        };
        record.fill(event);
        record
    }

    fn fill(&mut self, event: &Event) {
        match *event {
            Event::Sending { value, lane } => {
                self.of_value(Kind::Sending, Some(value));
                self.flags |= if lane.is_some() { LANE } else { 0 };
                self.token = lane.unwrap_or(0);
            }
            Event::Acknowledged { value, id } => {
                self.of_value(Kind::Acknowledged, Some(value));
                self.id = id.number();
            }
            Event::Refused { value } => self.of_value(Kind::Refused, Some(value)),
            Event::Unknown { value } => self.of_value(Kind::Unknown, Some(value)),
            Event::Stored { id, uid, value, marked_duplicate } => {
                self.of_value(Kind::Stored, value);
                self.flags |= if marked_duplicate { MARKED } else { 0 };
                (self.id, self.extra) = (id.number(), fingerprint(uid));
            }
            _ => self.fill_of_group(event),
        }
    }

    fn fill_of_group(&mut self, event: &Event) {
        match *event {
            Event::Owned { holding, partition } => {
                self.of_partition(Kind::Owned, partition, None);
                self.of_holding(holding);
            }
            Event::Lost { holding, partition } => {
                self.of_partition(Kind::Lost, partition, None);
                self.of_holding(holding);
            }
            Event::Delivered { holding, id, uid, value } => {
                self.of_value(Kind::Delivered, value);
                self.of_holding(holding);
                (self.id, self.extra) = (id.number(), fingerprint(uid));
            }
            Event::Acked { holding, id } => {
                self.kind = Kind::Acked;
                self.of_holding(holding);
                self.id = id.number();
            }
            Event::CursorCommitted { holding, upto, asked } => {
                self.kind = Kind::Committed;
                self.of_holding(holding);
                (self.id, self.extra) = (upto.number(), nanos(asked));
            }
            _ => self.fill_of_partition(event),
        }
    }

    fn fill_of_partition(&mut self, event: &Event) {
        match *event {
            Event::SeekStarted { group, partition, to } => {
                self.of_partition(Kind::SeekStarted, partition, to);
                self.group = group;
            }
            Event::SeekDone { group, partition } => {
                self.of_partition(Kind::SeekDone, partition, None);
                self.group = group;
            }
            Event::Drained { group, partition } => {
                self.of_partition(Kind::Drained, partition, None);
                self.group = group;
            }
            Event::TailLost { partition, after } => {
                self.of_partition(Kind::TailLost, partition, after);
            }
            Event::TailNoticed { partition } => {
                self.of_partition(Kind::TailNoticed, partition, None);
            }
            _ => {}
        }
    }

    fn of_value(&mut self, kind: Kind, value: Option<Value>) {
        self.kind = kind;
        self.flags |= if value.is_none() { DAMAGED } else { 0 };
        self.subject = value.map_or(0, Value::number);
    }

    fn of_partition(&mut self, kind: Kind, partition: PartitionId, id: Option<MessageId>) {
        self.kind = kind;
        self.subject = u64::from(partition.number());
        self.id = id.map_or(0, MessageId::number);
    }

    fn of_holding(&mut self, holding: Holding) {
        (self.group, self.member, self.token) = (holding.group, holding.member, holding.token);
    }

    /// The value; none where the payload was damaged.
    pub(super) fn value(&self) -> Option<u64> {
        (self.flags & DAMAGED == 0).then_some(self.subject)
    }

    pub(super) fn lane(&self) -> Option<u64> {
        (self.flags & LANE != 0).then_some(self.token)
    }

    pub(super) fn is_marked(&self) -> bool {
        self.flags & MARKED != 0
    }

    /// The partition, of the id where there is one.
    pub(super) fn partition(&self) -> u32 {
        match self.kind {
            Kind::Acknowledged | Kind::Delivered | Kind::Acked | Kind::Committed | Kind::Stored => {
                partition_of(self.id)
            }
            _ => u32::try_from(self.subject).unwrap_or(0),
        }
    }

    /// The fingerprint of the uid.
    pub(super) fn uid(&self) -> u64 {
        self.extra
    }

    /// When the commit was asked for.
    pub(super) fn asked(&self) -> u64 {
        self.extra
    }

    pub(super) fn words(&self) -> [u64; WORDS] {
        let head = self.kind as u64
            | u64::from(self.flags) << 8
            | u64::from(self.group) << 16
            | u64::from(self.member) << 32;
        let id = self.id.cast_unsigned();
        [head, self.time, self.subject, id, self.token, self.extra]
    }

    /// None where the words are not those of a record.
    pub(super) fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let [head, time, subject, id, token, extra] = words;
        let bytes = head.to_le_bytes();
        Some(Self {
            kind: Kind::of(u64::from(bytes[0]))?,
            flags: bytes[1],
            group: u16::from_le_bytes([bytes[2], bytes[3]]),
            member: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            time,
            subject,
            id: id.cast_signed(),
            token,
            extra,
        })
    }
}

/// The number of the partition that an id is in.
pub(super) fn partition_of(id: i64) -> u32 {
    u32::try_from(id / 100_000_000_000_000).unwrap_or(0)
}

/// Nanoseconds; 584 years fit.
pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// 64 bits that tell uids apart: only equality is ever asked for.
fn fingerprint(uid: Uid) -> u64 {
    let (high, low) = uid.producer.as_u64_pair();
    let words = [high, low, uid.sequence.cast_unsigned(), uid.index.into()];
    words.into_iter().fold(0, |state, word| mix(state ^ word))
}

/// A bijection that spreads every bit (the finalizer of `SplitMix64`).
pub(super) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
