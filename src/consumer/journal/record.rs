//! Records of a segment: 48 bytes each, little-endian, with a checksum, so that a torn one is seen.
//!
//! ```text
//! byte 0     kind (8) | node or table (8) | zero (16) | checksum (32)
//! byte 8     segment                    magic (64) | member (128)
//!            holding, before, continued owner (128) | epoch (64) | reset epoch (64) | incarnation (64)
//!            ack                        producer (128) | sequence (64) | id (64) | index (32)
//! ```
//!
//! A partition is its table's number: a segment is of one node. The incarnation is in microseconds
//! since 1970, as exact as the server tells it.

use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISO_HDLC, Crc};
use uuid::Uuid;

use crate::id::{NodeId, Uid};
use crate::store::group::Fence;

/// Bytes of a record.
pub(super) const LEN: usize = 48;
/// Begins every segment; the digits are the version of the format.
const MAGIC: [u8; 8] = *b"smqack01";
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Record {
    /// The first of each segment: whose it is.
    Segment { node: NodeId, member: Uuid },
    /// The partition is held; what was acknowledged under another fence is void.
    Holding(Held),
    /// The partition was held under this fence before the next record's. Alone it means nothing: a kill
    /// may have cut off the next.
    Before(Held),
    /// The partition is held; what was acknowledged under the fences of the records before still counts.
    Continued(Held),
    /// A message is acknowledged, under the last fence of its partition in this segment.
    Ack { table: u8, id: i64, uid: Uid },
}

/// A partition under a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) table: u8,
    pub(super) fence: Fence,
    pub(super) incarnation: i64,
}

impl Record {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        (bytes[0], bytes[1]) = match self {
            Self::Segment { node, member } => {
                put(&mut bytes, 8, MAGIC);
                put(&mut bytes, 16, *member.as_bytes());
                (1, node.number())
            }
            Self::Holding(held) => (2, held.put(&mut bytes)),
            Self::Before(held) => (3, held.put(&mut bytes)),
            Self::Continued(held) => (4, held.put(&mut bytes)),
            Self::Ack { table, id, uid } => {
                put(&mut bytes, 8, *uid.producer.as_bytes());
                put(&mut bytes, 24, uid.sequence.to_le_bytes());
                put(&mut bytes, 32, id.to_le_bytes());
                put(&mut bytes, 40, uid.index.to_le_bytes());
                (5, *table)
            }
        };
        let checksum = CRC.checksum(&bytes);
        put(&mut bytes, 4, checksum.to_le_bytes());
        bytes
    }

    /// None where it is damaged.
    pub(super) fn decode(mut bytes: [u8; LEN]) -> Option<Self> {
        let checksum = u32::from_le_bytes(get(&bytes, 4));
        put(&mut bytes, 4, [0; 4]);
        if CRC.checksum(&bytes) != checksum {
            return None;
        }
        match bytes[0] {
            1 if get(&bytes, 8) == MAGIC => Some(Self::Segment {
                node: NodeId::new(bytes[1]).ok()?,
                member: Uuid::from_bytes(get(&bytes, 16)),
            }),
            2 => Some(Self::Holding(Held::get(&bytes))),
            3 => Some(Self::Before(Held::get(&bytes))),
            4 => Some(Self::Continued(Held::get(&bytes))),
            5 => Some(Self::Ack {
                table: bytes[1],
                id: i64::from_le_bytes(get(&bytes, 32)),
                uid: Uid {
                    producer: Uuid::from_bytes(get(&bytes, 8)),
                    sequence: i64::from_le_bytes(get(&bytes, 24)),
                    index: u32::from_le_bytes(get(&bytes, 40)),
                },
            }),
            _ => None,
        }
    }
}

impl Held {
    fn put(&self, bytes: &mut [u8; LEN]) -> u8 {
        put(bytes, 8, *self.fence.owner.as_bytes());
        put(bytes, 24, self.fence.epoch.to_le_bytes());
        put(bytes, 32, self.fence.reset_epoch.to_le_bytes());
        put(bytes, 40, self.incarnation.to_le_bytes());
        self.table
    }

    fn get(bytes: &[u8; LEN]) -> Self {
        Self {
            table: bytes[1],
            fence: Fence {
                owner: Uuid::from_bytes(get(bytes, 8)),
                epoch: i64::from_le_bytes(get(bytes, 24)),
                reset_epoch: i64::from_le_bytes(get(bytes, 32)),
            },
            incarnation: i64::from_le_bytes(get(bytes, 40)),
        }
    }
}

fn put<const N: usize>(bytes: &mut [u8; LEN], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

fn get<const N: usize>(bytes: &[u8; LEN], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&bytes[at..at + N]);
    value
}

/// Microseconds since 1970.
pub(super) fn micros(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |m| -m),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_record() -> impl Strategy<Value = Record> {
        let numbers = (any::<i64>(), any::<i64>(), any::<i64>());
        (0..5, any::<u128>(), 1_u8..100, numbers, any::<u32>()).prop_map(
            |(kind, uuid, table, (a, b, c), index)| {
                let uuid = Uuid::from_u128(uuid);
                let fence = Fence { owner: uuid, epoch: a, reset_epoch: b };
                let held = Held { table, fence, incarnation: c };
                match kind {
                    0 => Record::Segment { node: NodeId::new(table).unwrap(), member: uuid },
                    1 => Record::Holding(held),
                    2 => Record::Before(held),
                    3 => Record::Continued(held),
                    _ => {
                        let of = Uid { producer: uuid, sequence: a, index };
                        Record::Ack { table, id: b, uid: of }
                    }
                }
            },
        )
    }

    proptest! {
        #[test]
        fn records_round_trip_and_a_changed_bit_is_seen(
            record in any_record(), bit in 0..LEN * 8,
        ) {
            let mut bytes = record.encode();
            prop_assert_eq!(Record::decode(bytes), Some(record));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(bytes), None);
        }
    }

    #[test]
    fn nothing_but_zeros_is_no_record() {
        assert_eq!(Record::decode([0; LEN]), None);
    }
}
