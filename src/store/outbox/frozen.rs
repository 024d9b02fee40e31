//! Batches that a relay has frozen.

use tokio_postgres::Row;
use uuid::Uuid;

use crate::id::{Day, PartitionId, Uid};
use crate::message::{Message, UID_HEADER};
use crate::name::TopicName;
use crate::store::append::{Append, Arrays};
use crate::store::packed::{Packed, Unpacked};

/// The sequence of a batch is that of its first place; each place has room for parts of all
/// lengths.
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
    pub(crate) topic_id: Uuid,
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
    /// Whether its messages came with it.
    pub(super) fn is_whole(row: &Row) -> bool {
        row.get::<_, Option<Vec<i64>>>(10).is_some()
    }

    pub(super) fn read(row: &Row) -> Option<Self> {
        let topic = TopicName::new(row.get(2)).ok()?;
        let state = match row.get(7) {
            "divided" => State::Divided,
            "withdrawn" => State::Withdrawn,
            _ => State::Frozen,
        };
        let uids: Vec<Uuid> = row.get(14);
        let (headers, more) = with_uids(row.get::<_, Option<Unpacked>>(12).as_ref(), &uids);
        Some(Self {
            id: row.get(0),
            partition: PartitionId::from_i32(row.get(1)).ok()?,
            topic,
            topic_id: row.get(15),
            generation: row.get(3),
            producer: row.get(4),
            first_day: Day::from_i32(row.get(5)).ok()?,
            day: Day::from_i32(row.get(6)).ok()?,
            named: Day::from_i32(row.get(6)).ok()?,
            state,
            ids: row.get(10),
            arrays: Arrays {
                count: row.get(8),
                bytes: row.get::<_, i32>(9).saturating_add(more),
                keys: row.get(11),
                headers: Some(headers),
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

    /// Some of its places, beginning with one, to be appended. Sequences rise with the place, and
    /// for the same place as parts grow shorter: so whoever divides it anew finds every part that
    /// is there, and takes none for another.
    pub(crate) fn append_part<'a>(&'a self, arrays: &'a Arrays, first: usize) -> Append<'a> {
        let whole = i64::try_from(self.len()).unwrap_or(0);
        let first = i64::try_from(first).unwrap_or(0);
        Append {
            partition: self.partition,
            topic_id: self.topic_id,
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

/// The headers of published messages with the identities that were drawn when they were published,
/// and how many bytes these add.
fn with_uids(headers: Option<&Unpacked>, uids: &[Uuid]) -> (Packed, i32) {
    let (mut all, mut text, mut more) = (Packed::default(), Vec::new(), 0);
    for (index, producer) in uids.iter().enumerate() {
        let uid = Uid { producer: *producer, sequence: 1, index: 0 };
        // Behind the format's version.
        let given = headers.and_then(|all| all.element(index)).and_then(|json| json.get(1..));
        let Some(rest) = given.unwrap_or(b"{}").strip_prefix(b"{") else {
            // No object, in a table without its checks: the partition refuses it.
            all.push_json(given.unwrap_or_default());
            continue;
        };
        text.clear();
        text.extend_from_slice(format!("{{\"{UID_HEADER}\":\"{uid}\"").as_bytes());
        if rest != b"}" {
            text.push(b',');
        }
        more += text.len();
        text.extend_from_slice(rest);
        all.push_json(&text);
    }
    (all, i32::try_from(more).unwrap_or(i32::MAX))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_put_before_the_headers_that_a_message_has() {
        let mut packed = Packed::default();
        packed.push_json(b"{\"n\": 1e400}");
        packed.push_json(b"{}");
        packed.push_null();
        let uids = [1, 2, 3].map(Uuid::from_u128);
        let cases = [(Some(packed.unpack()), [",\"n\": 1e400}", "}", "}"]), (None, ["}"; 3])];
        for (given, rest) in cases {
            let (all, more) = with_uids(given.as_ref(), &uids);
            let all = all.unpack();
            for (index, rest) in rest.iter().enumerate() {
                let uid = uids[index];
                let expected = format!("{{\"shardmq.uid\":\"{uid}:1:0\"{rest}");
                let found = all.element(index).unwrap();
                assert_eq!(
                    (found[0], std::str::from_utf8(&found[1..]).unwrap()),
                    (1, &expected[..])
                );
            }
            assert!(all.len() == 3 && (150..200).contains(&more));
        }
    }
}
