//! What the last pass goes through, in order of time: events, with where their ids are in the final
//! read.

use crate::verify::record::{Kind, Record, partition_of};

/// Words of a step; time and recorder's order come first, so that they sort by them.
pub(super) const STEP_WORDS: usize = 7;

/// Makes the least number of a partition's ids, of a partition's number.
const IDS_OF_PARTITION: i64 = 100_000_000_000_000;

const STORED: u8 = 1;
const GHOST: u8 = 2;

/// One event in the light of the final read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) time: u64,
    /// The place of the event in the history, recorder by recorder.
    pub(super) sequence: u64,
    pub(super) kind: Kind,
    pub(super) group: u16,
    pub(super) member: u32,
    pub(super) token: u64,
    /// The id, or one that is below all of the partition.
    pub(super) id: i64,
    /// How many messages of the partition are stored below the id.
    pub(super) place: u64,
    /// Whether a message is stored under the id.
    pub(super) stored: bool,
    /// Whether the event is about a message that went with a lost tail.
    pub(super) ghost: bool,
    /// When a commit was asked for.
    pub(super) asked: u64,
}

impl Step {
    /// Of an event whose id, if it has one, has no place yet.
    pub(super) fn of(record: &Record, sequence: u64) -> Self {
        let id = if record.id == 0 {
            i64::from(record.partition()) * IDS_OF_PARTITION
        } else {
            record.id
        };
        Self {
            time: record.time,
            sequence,
            kind: record.kind,
            group: record.group,
            member: record.member,
            token: record.token,
            id,
            place: 0,
            stored: false,
            ghost: false,
            asked: record.asked(),
        }
    }

    pub(super) fn partition(&self) -> u32 {
        partition_of(self.id)
    }

    /// Whether the id is one.
    pub(super) fn has_id(&self) -> bool {
        self.id % IDS_OF_PARTITION != 0
    }

    /// The place after this message.
    pub(super) fn place_after(&self) -> u64 {
        self.place + u64::from(self.stored)
    }

    pub(super) fn words(&self) -> [u64; STEP_WORDS] {
        let stored = if self.stored { STORED } else { 0 };
        let ghost = if self.ghost { GHOST } else { 0 };
        let head = self.kind as u64
            | u64::from(stored | ghost) << 8
            | u64::from(self.group) << 16
            | u64::from(self.member) << 32;
        let id = self.id.cast_unsigned();
        let (time, sequence) = (self.time, self.sequence);
        [time, sequence, head, self.token, id, self.place, self.asked]
    }

    /// None where the words are not those of a step.
    pub(super) fn from_words(words: [u64; STEP_WORDS]) -> Option<Self> {
        let [time, sequence, head, token, id, place, asked] = words;
        let bytes = head.to_le_bytes();
        Some(Self {
            time,
            sequence,
            kind: Kind::of(u64::from(bytes[0]))?,
            group: u16::from_le_bytes([bytes[2], bytes[3]]),
            member: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            token,
            id: id.cast_signed(),
            place,
            stored: bytes[1] & STORED != 0,
            ghost: bytes[1] & GHOST != 0,
            asked,
        })
    }
}
