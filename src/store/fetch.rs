//! Reading day tables.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, Type};
use uuid::Uuid;

use crate::headers;
use crate::id::{Day, PartitionId, Uid, last_of};
use crate::message::Headers;
use crate::store::connect::is_definite;
use crate::store::failed::Failed;
use crate::store::node::{self, Connection, query};
use crate::store::packed::Unpacked;
use crate::store::sql;
use crate::store::unread::{self, Unreadable};

/// The most tables that one look covers: all of a node.
pub(crate) const MAX_LOOK: usize = 99;
/// The most tables that can't be read, after which one look stops searching for others. Each may be
/// waited for.
const MAX_STUCK: usize = 8;

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
    /// Why it can't be read: then it has no arrays.
    pub(crate) unreadable: Option<Unreadable>,
}

/// What tells a row from another that took its place after a failover that lost the end of the log:
/// all of this, since a retry can bring the same batch to the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) base_id: i64,
    pub(crate) count: u32,
    pub(crate) producer: Uuid,
    pub(crate) sequence: i64,
    pub(crate) appended_at: SystemTime,
}

impl Batch {
    /// The headers of a message of it, those that the library sets too; a value that is not a
    /// string as its JSON text. An error where they are no JSON object that can be read.
    pub(crate) fn headers_of(&self, index: usize) -> serde_json::Result<Headers> {
        let json = self.headers.as_ref().and_then(|all| all.element(index));
        // Behind the format's version.
        json.map_or(Ok(Headers::new()), |json| headers::read(json.get(1..).unwrap_or_default()))
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

    /// The identity of a message in it, as it was stored here: a copy's own, and not that of its
    /// original.
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

    /// A row of a day table. Only what comes behind the position has its arrays.
    pub(super) fn read(row: &Row, position: i64) -> Result<Self, tokio_postgres::Error> {
        let stated: i32 = row.try_get(1)?;
        let mut batch = Self {
            base_id: row.try_get(0)?,
            // A row without messages has an id of its own all the same.
            count: count_of(stated),
            first_index: 0,
            bytes: usize::try_from(row.try_get::<_, i32>(2)?).unwrap_or(0),
            producer: row.try_get(3)?,
            sequence: row.try_get(4)?,
            appended_at: row.try_get::<_, Micros>(5)?.time(),
            incarnation: row.try_get(9)?,
            keys: None,
            headers: None,
            payloads: Unpacked::default(),
            unreadable: None,
        };
        if batch.last_id() > position {
            match unread::arrays(row, stated) {
                Ok(arrays) => (batch.keys, batch.headers, batch.payloads) = arrays,
                Err(why) => batch.unreadable = Some(why),
            }
        }
        Ok(batch)
    }
}

/// How many ids a row takes that says so.
fn count_of(stated: i32) -> u32 {
    u32::try_from(stated).unwrap_or(0).max(1)
}

/// A `timestamptz` to the microsecond, before 2000 too.
struct Micros(i64);

impl Micros {
    fn time(&self) -> SystemTime {
        const TO_2000: Duration = Duration::from_hours(262_968);
        let base = UNIX_EPOCH + TO_2000;
        // Infinity is no time that could be sent back.
        if [i64::MIN, i64::MAX].contains(&self.0) {
            return base;
        }
        let distance = Duration::from_micros(self.0.unsigned_abs());
        let time = if self.0 < 0 { base.checked_sub(distance) } else { base.checked_add(distance) };
        // Nor is what the platform's times do not reach.
        time.unwrap_or(base)
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
        Ok(rows) => unread::batches(&rows, (partition, day), position).map(Some),
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
        count: count_of(row.try_get(0)?),
        producer: row.try_get(1)?,
        sequence: row.try_get(2)?,
        appended_at: row.try_get::<_, Micros>(3)?.time(),
    };
    Ok(if found == *last { Overlap::Same(row.try_get(4)?) } else { Overlap::Changed })
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
    Ok(rows.first().map_or(Ok(None), read_state)?)
}

fn read_state(row: &Row) -> Result<Option<PartitionState>, tokio_postgres::Error> {
    let (low_watermark, incarnation) = (row.try_get(1)?, row.try_get(3)?);
    let next_day = row.try_get::<_, Option<i32>>(2)?.and_then(|day| Day::from_i32(day).ok());
    let day = Day::from_i32(row.try_get(0)?).ok();
    Ok(day.map(|day| PartitionState { day, low_watermark, incarnation, next_day }))
}

/// A partition with the day that it is read in, and the position there.
pub(crate) type Read = (PartitionId, Day, i64);

/// What a look has found.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    /// Partitions that have something beyond the position, or stand on another day than the one
    /// that is read; or that could not be looked at.
    pub(crate) changed: Vec<PartitionId>,
    /// Those of them whose table could not be read, and why: somebody has locked it, or it is
    /// broken.
    pub(crate) stuck: Vec<(PartitionId, Failed)>,
}

/// Looks which of these partitions have changed: one statement, or some more where a table can't be
/// read. That one is found by halves and left to its reader, so that it keeps none of the others
/// waiting.
pub(crate) async fn look(connection: &Connection, partitions: &[Read]) -> Result<Looked, Failed> {
    let mut looked = Looked::default();
    let mut parts = vec![partitions];
    while let Some(part) = parts.pop() {
        let Some((first, _)) = part.split_first() else { continue };
        if looked.stuck.len() >= MAX_STUCK {
            looked.changed.extend(part.iter().map(|(partition, ..)| *partition));
            continue;
        }
        match node::look(connection, &look_text(part)).await {
            Ok(rows) => looked.changed.extend(rows.iter().filter_map(|row| changed(row, part))),
            Err(error) if !is_of_a_table(&error) => return Err(error),
            Err(_) if part.len() > 1 => {
                let (left, right) = part.split_at(part.len() / 2);
                parts.extend([right, left]);
            }
            Err(error) => {
                looked.changed.push(first.0);
                // A table that is gone is no trouble: its reader goes on.
                if error.code() != Some(&SqlState::UNDEFINED_TABLE) {
                    looked.stuck.push((first.0, error));
                }
            }
        }
    }
    Ok(looked)
}

/// Whether a statement failed at one of its tables, and the server is well.
pub(crate) fn is_of_a_table(error: &Failed) -> bool {
    let code = error.code().map_or("", SqlState::code);
    // 53: it lacks memory, disk or connections. 57: it was told to end that.
    is_definite(error) && !["53", "57"].iter().any(|class| code.starts_with(class))
}

/// The statement for some partitions: the one of the file, with a row of values for each.
fn look_text(partitions: &[Read]) -> String {
    let lines = sql::LOOK.lines().filter(|line| !line.starts_with("--"));
    let text = lines.collect::<Vec<_>>().join("\n");
    let (head, rest) = text.split_once("(values").unwrap_or((&text, ""));
    let (row, tail) = rest.rsplit_once(") l (").unwrap_or((rest, ""));
    let rows: Vec<String> =
        partitions.iter().map(|(partition, day, _)| sql::for_day(row, *partition, *day)).collect();
    format!("{head}(values{}) l ({tail}", rows.join(","))
}

fn changed(row: &Row, partitions: &[Read]) -> Option<PartitionId> {
    let partition = PartitionId::from_i32(row.try_get(0).ok()?).ok()?;
    let (_, day, position) = partitions.iter().find(|(id, ..)| *id == partition)?;
    let moved = !matches!(row.try_get::<_, Option<i32>>(1), Ok(now) if now == Some(day.as_i32()));
    let last = row.try_get::<_, Option<i64>>(2);
    // One that can't be told is its reader's to find out.
    let more = !matches!(last, Ok(last) if last.is_none_or(|last| last <= *position));
    (moved || more).then_some(partition)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_has_a_row_of_values_for_each_partition() {
        let day = Day::from_yymmdd(261_201).unwrap();
        let of = |number| (PartitionId::new(1, number).unwrap(), day, 0);
        let text = look_text(&[of(1), of(2), of(3)]);
        for number in 1..=3 {
            assert!(text.contains(&format!("(101{number:02}, (select")), "{text}");
            assert!(text.contains(&format!("shardmq.batch_101{number:02}_261201 b")), "{text}");
        }
        assert_eq!(text.matches("values").count(), 1);
        assert!(text.contains(") l (partition, last_id)") && !text.contains("--"), "{text}");
    }
}
