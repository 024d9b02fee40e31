//! Reading day tables.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, Type};
use uuid::Uuid;

use crate::id::{Day, PartitionId, Uid, last_of};
use crate::message::Headers;
use crate::store::failed::Failed;
use crate::store::node::{Connection, query};
use crate::store::packed::Unpacked;
use crate::store::sql;

/// The most tables that one look covers: all of a node.
pub(crate) const MAX_LOOK: usize = 99;

/// A row of a day table: a batch. The arrays are empty in the overlap, the row that ends at the
/// position that was read from.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) base_id: i64,
    pub(crate) count: u32,
    /// The place of its first message in the batch that was sent: not 0 in a copy of one message.
    pub(crate) first_index: u32,
    pub(crate) bytes: usize,
    pub(crate) producer: Uuid,
    pub(crate) sequence: i64,
    pub(crate) appended_at: SystemTime,
    /// Which server it was read from: when that was started.
    pub(crate) incarnation: SystemTime,
    pub(crate) keys: Option<Unpacked>,
    pub(crate) headers: Option<Unpacked>,
    pub(crate) payloads: Unpacked,
}

/// What tells a row from another that took its place after a failover that lost the end of the log: all
/// of this, since a retry can bring the same batch to the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) base_id: i64,
    pub(crate) count: u32,
    pub(crate) producer: Uuid,
    pub(crate) sequence: i64,
    pub(crate) appended_at: SystemTime,
}

impl Batch {
    /// The headers of a message of it, those that the library sets too; a value that is not a string as
    /// its JSON text.
    pub(crate) fn headers_of(&self, index: usize) -> Headers {
        let json = self.headers.as_ref().and_then(|all| all.element(index));
        // Behind the format's version.
        let text = json.and_then(|json| json.get(1..)).unwrap_or(b"{}");
        let values: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(text).unwrap_or_default();
        let text = |value| match value {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        };
        values.into_iter().map(|(name, value)| (name, text(value))).collect()
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity {
            base_id: self.base_id,
            count: self.count,
            producer: self.producer,
            sequence: self.sequence,
            appended_at: self.appended_at,
        }
    }

    /// The identity of a message in it, as it was stored here: a copy's own, and not that of its original.
    pub(crate) fn uid_of(&self, id: i64) -> Uid {
        let index = u32::try_from(id - self.base_id).unwrap_or(u32::MAX);
        let index = self.first_index.saturating_add(index);
        Uid { producer: self.producer, sequence: self.sequence, index }
    }

    /// Its day and identity, to be found again.
    pub(crate) fn place(&self) -> Option<(Day, Identity)> {
        Some((day_of(self.base_id)?, self.identity()))
    }

    pub(crate) fn last_id(&self) -> i64 {
        self.base_id + i64::from(self.count) - 1
    }

    fn read(row: &Row) -> Self {
        Self {
            base_id: row.get(0),
            count: u32::try_from(row.get::<_, i32>(1)).unwrap_or(0),
            first_index: 0,
            bytes: usize::try_from(row.get::<_, i32>(2)).unwrap_or(0),
            producer: row.get(3),
            sequence: row.get(4),
            appended_at: row.get::<_, Micros>(5).time(),
            keys: row.get(6),
            headers: row.get(7),
            payloads: row.get::<_, Option<Unpacked>>(8).unwrap_or_default(),
            incarnation: row.get(9),
        }
    }
}

/// A `timestamptz` to the microsecond, before 2000 too.
struct Micros(i64);

impl Micros {
    fn time(&self) -> SystemTime {
        const TO_2000: Duration = Duration::from_hours(262_968);
        let distance = Duration::from_micros(self.0.unsigned_abs());
        let base = UNIX_EPOCH + TO_2000;
        if self.0 < 0 { base - distance } else { base + distance }
    }
}

impl<'a> FromSql<'a> for Micros {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

/// Reads on from a position, at most so many bytes and rows over those, at least one new row where
/// there is one. `None`: the table does not exist.
pub(crate) async fn fetch(
    connection: &Connection,
    partition: PartitionId,
    day: Day,
    position: i64,
    (bytes, rows): (i64, i32),
) -> Result<Option<Vec<Batch>>, Failed> {
    let text = sql::for_day(sql::FETCH, partition, day);
    match query(connection, &text, &[&position, &bytes, &rows]).await {
        Ok(rows) => Ok(Some(rows.iter().map(Batch::read).collect())),
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is there now of a row that was read last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overlap {
    /// The same row, on a server of this incarnation.
    Same(SystemTime),
    /// It is gone, or another.
    Changed,
    /// The whole table is gone.
    NoTable,
}

/// Looks whether a row that was read is still the same.
pub(crate) async fn overlap(
    connection: &Connection,
    partition: PartitionId,
    day: Day,
    last: &Identity,
) -> Result<Overlap, Failed> {
    let text = sql::for_day(sql::OVERLAP, partition, day);
    let rows = match query(connection, &text, &[&last.base_id]).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {
            return Ok(Overlap::NoTable);
        }
        rows => rows?,
    };
    let Some(row) = rows.first() else { return Ok(Overlap::Changed) };
    let found = Identity {
        base_id: last.base_id,
        count: u32::try_from(row.get::<_, i32>(0)).unwrap_or(0),
        producer: row.get(1),
        sequence: row.get(2),
        appended_at: row.get::<_, Micros>(3).time(),
    };
    Ok(if found == *last { Overlap::Same(row.get(4)) } else { Overlap::Changed })
}

/// Where a partition stands.
#[derive(Debug, Clone)]
pub(crate) struct PartitionState {
    pub(crate) day: Day,
    pub(crate) low_watermark: i64,
    /// The server that answered: when it was started.
    pub(crate) incarnation: SystemTime,
    /// The next closed day with messages after the one that was asked about.
    pub(crate) next_day: Option<Day>,
}

impl PartitionState {
    /// The day to read after the one that was asked about, if there is one.
    pub(crate) fn day_after(&self, day: Option<Day>) -> Option<Day> {
        self.next_day.or(Some(self.day)).filter(|next| day.is_none_or(|day| *next > day))
    }
}

/// Where a partition stands; `None` where the node does not know it.
pub(crate) async fn partition_state(
    connection: &Connection,
    partition: PartitionId,
    after: Option<Day>,
) -> Result<Option<PartitionState>, Failed> {
    let after = after.map_or(0, Day::as_i32);
    let rows = query(connection, sql::PARTITION_STATE, &[&partition.as_i32(), &after]).await?;
    Ok(rows.first().and_then(|row| {
        Some(PartitionState {
            day: Day::from_i32(row.get(0)).ok()?,
            low_watermark: row.get(1),
            incarnation: row.get(3),
            next_day: row.get::<_, Option<i32>>(2).and_then(|day| Day::from_i32(day).ok()),
        })
    }))
}

/// Which of these partitions have something beyond the positions, or stand on another day than the one
/// that is being read: all of them where retention has dropped a table. One statement.
pub(crate) async fn look(
    connection: &Connection,
    partitions: &[(PartitionId, Day, i64)],
) -> Result<Vec<PartitionId>, Failed> {
    let parts: Vec<String> = partitions
        .iter()
        .map(|(partition, day, _)| sql::for_day(sql::LOOK, *partition, *day))
        .collect();
    let rows = match query(connection, &parts.join("\nunion all\n"), &[]).await {
        // Of which one is not said. Its reader finds out, even if it is paused until long after.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {
            return Ok(partitions.iter().map(|(partition, ..)| *partition).collect());
        }
        rows => rows?,
    };
    let changed = |row: &Row| {
        let partition = PartitionId::from_i32(row.get(0)).ok()?;
        let (_, day, position) = partitions.iter().find(|(id, ..)| *id == partition)?;
        let moved = row.get::<_, Option<i32>>(1) != Some(day.as_i32());
        let more = row.get::<_, Option<i64>>(2).is_some_and(|last| last > *position);
        (moved || more).then_some(partition)
    };
    Ok(rows.iter().filter_map(changed).collect())
}

/// The day that a position is in, none for the position before everything.
pub(crate) fn day_of(position: i64) -> Option<Day> {
    let day = i32::try_from(position / 100_000_000 % 1_000_000).ok()?;
    Day::from_i32(day).ok().filter(|_| position > 0)
}

/// The last id that a day can have.
pub(crate) fn end_of(partition: PartitionId, day: Day) -> i64 {
    last_of(partition, day)
}
