//! Numbers with a meaning: nodes, partitions, days, message ids and uids. Each is parsed once, at the
//! border, and is valid from then on.
//!
//! ```
//! use shardmq::{MessageId, PartitionId};
//!
//! let id: MessageId = "1010126112200000001".parse()?;
//! assert_eq!(id.partition(), PartitionId::new(1, 1)?);
//! assert_eq!(id.day().to_string(), "261122");
//! assert_eq!(id.sequence(), 1);
//! # Ok::<(), shardmq::Error>(())
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::error::{Error, Result};

mod scheduled;

pub use scheduled::ScheduledId;

/// The most messages that one partition holds in one day.
pub const MAX_SEQUENCE: u32 = 99_999_999;

/// The highest node number, and the highest partition number within a node.
pub const MAX_NUMBER: u8 = 99;

/// The number of a node: 01 to 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct NodeId(u8);

impl NodeId {
    /// A node number; refused outside of 1 to 99.
    pub fn new(number: u8) -> Result<Self> {
        if (1..=MAX_NUMBER).contains(&number) {
            Ok(Self(number))
        } else {
            Err(Error::invalid(format!("node number {number} is not between 1 and {MAX_NUMBER}")))
        }
    }

    /// The number, 1 to 99.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for NodeId {
    type Error = Error;

    fn try_from(number: u8) -> Result<Self> {
        Self::new(number)
    }
}

impl From<NodeId> for u8 {
    fn from(node: NodeId) -> Self {
        node.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = text.parse().map_err(|_| {
            Error::invalid(format!("node {text:?} is not a number from 1 to {MAX_NUMBER}"))
        })?;
        Self::new(number)
    }
}

/// The number of a partition: the five digits `1NNTT`, node and table within the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct PartitionId(u32);

impl PartitionId {
    /// The partition of this node (1 to 99) and table (1 to 99).
    pub fn new(node: u8, table: u8) -> Result<Self> {
        Self::try_from(10_000 + u32::from(node) * 100 + u32::from(table))
    }

    /// The five digit number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The node that stores this partition.
    pub fn node(self) -> NodeId {
        NodeId(u8::try_from(self.0 / 100 % 100).unwrap_or(MAX_NUMBER))
    }

    /// The number of this partition's tables within its node, 1 to 99.
    pub fn table(self) -> u8 {
        u8::try_from(self.0 % 100).unwrap_or(MAX_NUMBER)
    }

    /// As Postgres' `int`.
    pub(crate) fn as_i32(self) -> i32 {
        i32::try_from(self.0).unwrap_or(i32::MAX)
    }

    pub(crate) fn from_i32(number: i32) -> Result<Self> {
        Self::try_from(u32::try_from(number).unwrap_or(0))
    }
}

impl TryFrom<u32> for PartitionId {
    type Error = Error;

    fn try_from(number: u32) -> Result<Self> {
        let (node, table) = (number / 100 % 100, number % 100);
        if number / 10_000 == 1 && node > 0 && table > 0 {
            Ok(Self(number))
        } else {
            Err(Error::invalid(format!(
                "partition {number} is not of the form 1NNTT (node 01 to 99, table 01 to 99)"
            )))
        }
    }
}

impl From<PartitionId> for u32 {
    fn from(partition: PartitionId) -> Self {
        partition.0
    }
}

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for PartitionId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number: u32 = text.parse().map_err(|_| {
            Error::invalid(format!("partition {text:?} is not a number of the form 1NNTT"))
        })?;
        Self::try_from(number)
    }
}

/// A UTC day from 2000-01-01 to 2099-12-31, written `YYMMDD`. Days are ordered as time is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(u32);

impl Day {
    /// The day of the six digits `YYMMDD`; refused where the calendar has no such day.
    pub fn from_yymmdd(number: u32) -> Result<Self> {
        let (year, month, day) = (number / 10_000, number / 100 % 100, number % 100);
        if year < 100 && (1..=12).contains(&month) && day >= 1 && day <= days_in(year, month) {
            Ok(Self(number))
        } else {
            Err(Error::invalid(format!("{number:06} is not a day of the form YYMMDD")))
        }
    }

    /// The UTC day of a point in time; refused outside of the years 2000 to 2099.
    pub fn of(time: SystemTime) -> Result<Self> {
        let days = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 86_400;
        days.checked_sub(DAYS_TO_2000)
            .and_then(|days| u32::try_from(days).ok())
            .and_then(Self::from_days_since_2000)
            .ok_or_else(|| Error::invalid("the time is not between the years 2000 and 2099"))
    }

    /// The six digits as a number.
    pub fn yymmdd(self) -> u32 {
        self.0
    }

    /// The first moment of this day, in UTC.
    pub fn start(self) -> SystemTime {
        let days = DAYS_TO_2000 + u64::from(self.days_since_2000());
        UNIX_EPOCH + Duration::from_secs(days * 86_400)
    }

    /// The day after, unless this is the last of 2099.
    pub fn next(self) -> Option<Self> {
        Self::from_days_since_2000(self.days_since_2000() + 1)
    }

    pub(crate) fn as_i32(self) -> i32 {
        i32::try_from(self.0).unwrap_or(i32::MAX)
    }

    pub(crate) fn from_i32(number: i32) -> Result<Self> {
        Self::from_yymmdd(u32::try_from(number).unwrap_or(u32::MAX))
    }

    fn days_since_2000(self) -> u32 {
        let (year, month, day) = (self.0 / 10_000, self.0 / 100 % 100, self.0 % 100);
        let years = year * 365 + year.div_ceil(4);
        let months: u32 = (1..month).map(|m| days_in(year, m)).sum();
        years + months + day - 1
    }

    fn from_days_since_2000(days: u32) -> Option<Self> {
        let (mut year, mut month, mut rest) = (0, 1, days);
        while rest >= days_in_year(year) {
            rest -= days_in_year(year);
            year += 1;
        }
        while rest >= days_in(year, month) {
            rest -= days_in(year, month);
            month += 1;
        }
        (year < 100).then_some(Self(year * 10_000 + month * 100 + rest + 1))
    }
}

/// Days from 1970-01-01 to 2000-01-01.
const DAYS_TO_2000: u64 = 10_957;

/// Within 2000 to 2099 every fourth year is a leap year, 2000 among them.
fn days_in_year(year: u32) -> u32 {
    if year.is_multiple_of(4) { 366 } else { 365 }
}

fn days_in(year: u32, month: u32) -> u32 {
    match month {
        2 => days_in_year(year) - 337,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06}", self.0)
    }
}

/// Where a message is: the 19 digits `1NNTTYYMMDDSSSSSSSS`: partition, UTC day, and the sequence 1 to
/// 99,999,999 within them.
///
/// Ids of a partition rise in the order in which messages were committed, and are dense inside a day.
/// An id exceeds 2^53, so it is a string in every JSON. It is a *location*: after a failover that lost
/// the end of the log it can name another message. What must tell messages apart for ever is the
/// [`Uid`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(i64);

impl MessageId {
    /// The id of this partition, day and sequence; the sequence is refused outside of 1 to 99,999,999.
    pub fn new(partition: PartitionId, day: Day, sequence: u32) -> Result<Self> {
        if !(1..=MAX_SEQUENCE).contains(&sequence) {
            return Err(Error::invalid(format!(
                "sequence {sequence} is not between 1 and {MAX_SEQUENCE}"
            )));
        }
        Ok(Self(first_of(partition, day) - 1 + i64::from(sequence)))
    }

    /// The number, as stored.
    pub fn number(self) -> i64 {
        self.0
    }

    /// The partition it is in.
    pub fn partition(self) -> PartitionId {
        PartitionId(u32::try_from(self.0 / 100_000_000_000_000).unwrap_or(10_101))
    }

    /// The UTC day in whose table it is.
    pub fn day(self) -> Day {
        Day(u32::try_from(self.0 / 100_000_000 % 1_000_000).unwrap_or(101))
    }

    /// The sequence within partition and day.
    pub fn sequence(self) -> u32 {
        u32::try_from(self.0 % 100_000_000).unwrap_or(MAX_SEQUENCE)
    }

    /// The id `index` places on, in the same batch.
    pub(crate) fn offset(self, index: usize) -> Self {
        Self(self.0 + i64::try_from(index).unwrap_or(0))
    }
}

/// The first id of a partition and day.
pub(crate) fn first_of(partition: PartitionId, day: Day) -> i64 {
    (i64::from(partition.0) * 1_000_000 + i64::from(day.0)) * 100_000_000 + 1
}

/// The last id of a partition and day.
pub(crate) fn last_of(partition: PartitionId, day: Day) -> i64 {
    first_of(partition, day) + i64::from(MAX_SEQUENCE) - 1
}

impl TryFrom<i64> for MessageId {
    type Error = Error;

    fn try_from(number: i64) -> Result<Self> {
        let parse = || {
            let partition =
                PartitionId::from_i32(i32::try_from(number / 100_000_000_000_000).ok()?);
            let day = Day::from_i32(i32::try_from(number / 100_000_000 % 1_000_000).ok()?);
            let sequence = u32::try_from(number % 100_000_000).ok()?;
            Self::new(partition.ok()?, day.ok()?, sequence).ok()
        };
        parse().ok_or_else(|| {
            Error::invalid(format!(
                "message id {number} is not of the form 1NNTTYYMMDDSSSSSSSS (19 digits)"
            ))
        })
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageId({})", self.0)
    }
}

impl FromStr for MessageId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.len() == 19 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = if digits { text.parse::<i64>().ok() } else { None };
        number.and_then(|number| Self::try_from(number).ok()).ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            Error::invalid(format!(
                "message id {shown:?} is not of the form 1NNTTYYMMDDSSSSSSSS (19 digits)"
            ))
        })
    }
}

impl Serialize for MessageId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MessageId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The identity of a message, for ever and everywhere: the producer's uuid, the sequence of its batch
/// and the index in the batch. Written `uuid:sequence:index`.
///
/// It stays the same when a message is stored a second time. Deduplication, an outbox or a caller's
/// own table go by it, not by the [`MessageId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uid {
    /// Drawn by a producer for each partition that it writes to.
    pub producer: Uuid,
    /// Counts the batches of that producer, from 1.
    pub sequence: i64,
    /// The place in the batch, from 0.
    pub index: u32,
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.producer, self.sequence, self.index)
    }
}

impl FromStr for Uid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().unwrap_or_default();
        let parsed = (part().parse().ok(), part().parse().ok(), part().parse().ok());
        let (Some(producer), Some(sequence), Some(index)) = parsed else {
            return Err(Error::invalid("a uid is not of the form uuid:sequence:index"));
        };
        Ok(Self { producer, sequence, index })
    }
}

impl Serialize for Uid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_day() -> impl Strategy<Value = Day> {
        (0_u32..36_525).prop_map(|days| Day::from_days_since_2000(days).unwrap())
    }

    fn any_id() -> impl Strategy<Value = MessageId> {
        (1_u8..=99, 1_u8..=99, any_day(), 1_u32..=MAX_SEQUENCE).prop_map(
            |(node, table, day, seq)| {
                MessageId::new(PartitionId::new(node, table).unwrap(), day, seq).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn ids_round_trip_as_text_number_and_json(id in any_id()) {
            prop_assert_eq!(id.to_string().parse::<MessageId>().unwrap(), id);
            prop_assert_eq!(MessageId::try_from(id.number()).unwrap(), id);
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(&json, &format!("\"{id}\""));
            prop_assert_eq!(serde_json::from_str::<MessageId>(&json).unwrap(), id);
            prop_assert_eq!(MessageId::new(id.partition(), id.day(), id.sequence()).unwrap(), id);
            prop_assert_eq!(id.to_string().len(), 19);
        }

        #[test]
        fn order_of_ids_in_a_partition_is_order_of_day_and_sequence(a in any_id(), b in any_id()) {
            let same = |id: MessageId| MessageId::new(a.partition(), id.day(), id.sequence()).unwrap();
            let by_time = (a.day().start(), a.sequence()).cmp(&(b.day().start(), b.sequence()));
            prop_assert_eq!(same(a).cmp(&same(b)), by_time);
        }

        #[test]
        fn days_round_trip_as_time(day in any_day(), secs in 0_u64..86_400) {
            prop_assert_eq!(Day::of(day.start() + Duration::from_secs(secs)).unwrap(), day);
            prop_assert_eq!(Day::from_yymmdd(day.yymmdd()).unwrap(), day);
            if let Some(next) = day.next() {
                prop_assert!(next > day);
                prop_assert_eq!(next.start(), day.start() + Duration::from_hours(24));
            }
        }

        #[test]
        fn what_is_not_an_id_is_refused_and_never_panics(text in ".{0,40}", number: i64) {
            if let Ok(id) = text.parse::<MessageId>() {
                prop_assert_eq!(id.to_string(), text);
            }
            if let Ok(id) = MessageId::try_from(number) {
                prop_assert_eq!(id.number(), number);
            }
        }

        #[test]
        fn uids_round_trip(bytes: u128, sequence in 1_i64.., index: u32) {
            let uid = Uid { producer: Uuid::from_u128(bytes), sequence, index };
            prop_assert_eq!(uid.to_string().parse::<Uid>().unwrap(), uid);
        }
    }

    #[test]
    fn the_first_and_last_ids_of_a_day_are_what_the_format_says() {
        let partition = PartitionId::new(1, 1).unwrap();
        let day = Day::from_yymmdd(261_122).unwrap();
        assert_eq!(first_of(partition, day), 1_010_126_112_200_000_001);
        assert_eq!(last_of(partition, day), 1_010_126_112_299_999_999);
    }

    #[test]
    fn numbers_out_of_bounds_are_refused_with_the_bound() {
        assert!(NodeId::new(0).unwrap_err().to_string().contains("between 1 and 99"));
        assert!(NodeId::new(100).is_err());
        assert!(PartitionId::try_from(10_100).is_err());
        assert!(PartitionId::try_from(20_101).is_err());
        assert!(Day::from_yymmdd(260_229).is_err());
        assert!(Day::from_yymmdd(280_229).is_ok());
        let partition = PartitionId::new(99, 99).unwrap();
        assert_eq!((partition.node().number(), partition.table()), (99, 99));
        assert!(
            MessageId::new(partition, Day::from_yymmdd(991_231).unwrap(), 100_000_000).is_err()
        );
    }
}
