//! Batches that a relay has frozen.

use tokio_postgres::Row;
use uuid::Uuid;

use crate::id::{Day, PartitionId};
use crate::message::Message;
use crate::name::TopicName;
use crate::store::append::{Append, Arrays};
use crate::store::packed::Packed;

/// The sequence of a batch is that of its first place; each place has room for parts of all lengths.
const ROOM: i64 = 1 << 20;

/// What happens to a frozen batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It is appended.
    Frozen,
    /// Its parts are, since some message of it was refused.
    Divided,
    /// It is put back into the outbox.
    Withdrawn,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Frozen => "frozen",
            Self::Divided => "divided",
            Self::Withdrawn => "withdrawn",
        }
    }
}

/// A batch on its way to its partition: always the same content under the same identity.
#[derive(Debug, Clone)]
pub(crate) struct Frozen {
    pub(crate) id: i64,
    pub(crate) partition: PartitionId,
    pub(crate) topic: TopicName,
    pub(crate) generation: i32,
    pub(crate) producer: Uuid,
    pub(crate) first_day: Day,
    /// The day that attempts name, and the latest that any may name.
    pub(crate) day: Day,
    pub(crate) named: Day,
    pub(crate) state: State,
    pub(crate) ids: Vec<i64>,
    pub(crate) arrays: Arrays,
}

impl Frozen {
    pub(super) fn read(row: &Row) -> Option<Self> {
        let topic = TopicName::new(row.get(2)).ok()?;
        let state = match row.get(7) {
            "divided" => State::Divided,
            "withdrawn" => State::Withdrawn,
            _ => State::Frozen,
        };
        Some(Self {
            id: row.get(0),
            partition: PartitionId::from_i32(row.get(1)).ok()?,
            topic,
            generation: row.get(3),
            producer: row.get(4),
            first_day: Day::from_i32(row.get(5)).ok()?,
            day: Day::from_i32(row.get(6)).ok()?,
            named: Day::from_i32(row.get(6)).ok()?,
            state,
            ids: row.get(10),
            arrays: Arrays {
                count: row.get(8),
                bytes: row.get(9),
                keys: row.get(11),
                headers: row.get(12),
                payloads: row.get(13),
                dedup_keys: None,
            },
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// What it takes in memory, nearly.
    pub(crate) fn size(&self) -> usize {
        usize::try_from(self.arrays.bytes).unwrap_or(0) + 64 * self.len()
    }

    pub(crate) fn is_keyed(&self) -> bool {
        self.arrays.keys.is_some()
    }

    /// The whole, to be appended.
    pub(crate) fn append(&self) -> Append<'_> {
        self.append_part(&self.arrays, 0)
    }

    /// Some of its places, beginning with one, to be appended. Sequences rise with the place, and for the
    /// same place as parts grow shorter: so whoever divides it anew finds every part that is there, and
    /// takes none for another.
    pub(crate) fn append_part<'a>(&'a self, arrays: &'a Arrays, first: usize) -> Append<'a> {
        let whole = i64::try_from(self.len()).unwrap_or(0);
        let first = i64::try_from(first).unwrap_or(0);
        Append {
            partition: self.partition,
            topic: &self.topic,
            generation: self.generation,
            day: self.day,
            first_day: self.first_day,
            latest_day: self.named,
            producer: self.producer,
            sequence: 1 + first * ROOM + (whole - i64::from(arrays.count)),
            arrays,
        }
    }

    /// The arrays of some places.
    pub(crate) fn part(&self, first: usize, count: usize) -> Arrays {
        let places = first..first + count;
        let share = self.arrays.bytes / self.arrays.count.max(1);
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let of = |all: &Option<Packed>| all.as_ref().map(|all| all.part(places.clone()));
        Arrays {
            count,
            bytes: share.saturating_mul(count),
            keys: of(&self.arrays.keys),
            headers: of(&self.arrays.headers),
            payloads: self.arrays.payloads.part(places.clone()),
            dedup_keys: None,
        }
    }
}

/// The arrays of messages that were checked.
pub(crate) fn arrays_of(messages: &[Message]) -> Arrays {
    let mut arrays = Arrays::default();
    let count = u32::try_from(messages.len()).unwrap_or(u32::MAX);
    let any_key = messages.iter().any(|message| message.key.is_some());
    let any_header = messages.iter().any(|message| !message.headers.is_empty());
    let (mut keys, mut headers) = (Packed::default(), Packed::default());
    for message in messages {
        arrays.payloads.push(&message.payload);
        match &message.key {
            Some(key) => keys.push(key.as_bytes()),
            None => keys.push_null(),
        }
        if message.headers.is_empty() {
            headers.push_null();
        } else {
            headers.push_json(&serde_json::to_vec(&message.headers).unwrap_or_default());
        }
    }
    arrays.count = i32::try_from(count).unwrap_or(i32::MAX);
    arrays.keys = any_key.then_some(keys);
    arrays.headers = any_header.then_some(headers);
    arrays
}
