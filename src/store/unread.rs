//! Rows of day tables that can't be read: found one by one, so that what is around them is read.
//!
//! The tables' CHECKs keep such rows out. One that is there all the same was written past them, or damaged
//! on the disk.

use std::error::Error;

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;

use crate::id::{Day, PartitionId, first_of, last_of};
use crate::store::failed::Failed;
use crate::store::fetch::{self, Batch};
use crate::store::node::{Connection, query};
use crate::store::packed::Unpacked;
use crate::store::sql;

/// The most rows that are read one by one for one fetch.
const SINGLY: i32 = 64;
/// The most messages of a batch.
const MAX_COUNT: i32 = 100_000;

/// Why a row can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// Its messages can't be read, but which ids they have is known.
    Messages(String),
    /// Nor is it known which ids are its own.
    Ids(String),
}

type Arrays = (Option<Unpacked>, Option<Unpacked>, Unpacked);

/// The arrays of a row that says that it has so many messages.
pub(super) fn arrays(row: &Row, stated: i32) -> Result<Arrays, Unreadable> {
    let read = |index: usize, name: &str| {
        row.try_get::<_, Option<Unpacked>>(index)
            .map_err(|error| Unreadable::Messages(format!("{name}: {}", cause(&error))))
    };
    let arrays = (read(6, "keys")?, read(7, "headers")?, read(8, "payloads")?.unwrap_or_default());
    check(&arrays, stated)?;
    Ok(arrays)
}

fn check((keys, headers, payloads): &Arrays, stated: i32) -> Result<(), Unreadable> {
    let all = [(keys, "keys"), (headers, "headers")];
    let lengths = all.iter().filter_map(|(array, name)| Some((array.as_ref()?.len(), *name)));
    for (len, name) in lengths.chain([(payloads.len(), "payloads")]) {
        if usize::try_from(stated).ok().filter(|count| *count > 0) != Some(len) {
            let why = format!("it says that it has {stated} messages, and has {len} {name}");
            return Err(if stated > MAX_COUNT {
                Unreadable::Ids(why)
            } else {
                Unreadable::Messages(why)
            });
        }
    }
    let places = 0..payloads.len();
    let why = if places.clone().any(|place| payloads.element(place).is_none()) {
        "a payload is null"
    } else if keys.iter().any(|keys| places.clone().any(|place| !is_text(keys.element(place)))) {
        "a key is no text"
    } else if headers.iter().any(|all| places.clone().any(|place| !is_object(all.element(place)))) {
        "the headers of a message are no JSON object"
    } else {
        return Ok(());
    };
    Err(Unreadable::Messages(why.to_owned()))
}

fn is_text(element: Option<&[u8]>) -> bool {
    element.is_none_or(|text| std::str::from_utf8(text).is_ok())
}

/// In the first version of the format of `jsonb`. The server sees to the rest.
fn is_object(element: Option<&[u8]>) -> bool {
    element.is_none_or(|json| json.starts_with(b"\x01{") && std::str::from_utf8(json).is_ok())
}

/// The rows of a fetch. Ids that are not of the day, or of two rows, are nobody's.
pub(super) fn batches(
    rows: &[Row],
    of: (PartitionId, Day),
    position: i64,
) -> Result<Vec<Batch>, Failed> {
    let mut batches: Vec<Batch> = Vec::with_capacity(rows.len());
    for row in rows {
        let mut batch = Batch::read(row, position)?;
        mark_misplaced(&mut batch, batches.last(), of, position);
        batches.push(batch);
    }
    Ok(batches)
}

fn mark_misplaced(
    batch: &mut Batch,
    before: Option<&Batch>,
    (partition, day): (PartitionId, Day),
    position: i64,
) {
    let (first, last) = (batch.base_id, batch.last_id());
    if last <= position {
        return;
    }
    let why = if first < first_of(partition, day) || last > last_of(partition, day) {
        format!("its ids {first} to {last} are not of partition {partition} and day {day}")
    } else if let Some(before) = before.filter(|before| before.last_id() >= first) {
        format!("its first id {first} is one of the row {} before it", before.base_id)
    } else {
        return;
    };
    batch.unreadable = Some(Unreadable::Ids(why));
}

/// Whether an error says that the server can't read some row of what was asked for.
pub(crate) fn is_damage(error: &Failed) -> bool {
    let damage = [
        SqlState::DATA_CORRUPTED,
        SqlState::INDEX_CORRUPTED,
        SqlState::INTERNAL_ERROR,
        SqlState::IO_ERROR,
        SqlState::PROGRAM_LIMIT_EXCEEDED,
    ];
    error.code().is_some_and(|code| damage.contains(code) || code.code().starts_with("22"))
}

/// Reads on like [`fetch::fetch`], each row by itself, up to the first that can't be read, or to so many
/// bytes. `None`: the table does not exist.
pub(crate) async fn fetch_singly(
    connection: &Connection,
    partition: PartitionId,
    day: Day,
    position: i64,
    bytes: usize,
) -> Result<Option<Vec<Batch>>, Failed> {
    let text = sql::for_day(sql::HEADS, partition, day);
    let heads = query(connection, &text, &[&position, &SINGLY]).await?;
    // Their arrays are not asked for, so that none is missing.
    let heads = batches(&heads, (partition, day), i64::MAX)?;
    let mut rows: Vec<Batch> = Vec::new();
    for mut head in heads {
        if head.last_id() <= position {
            rows.push(head);
            continue;
        }
        let read = fetch::fetch(connection, partition, day, head.base_id - 1, (1, 2)).await;
        let row = match read {
            Ok(None) => return Ok(None),
            Ok(Some(read)) => read.into_iter().find(|row| row.base_id == head.base_id),
            Err(error) if is_damage(&error) => {
                let is_plain = i32::try_from(head.count).is_ok_and(|count| count <= MAX_COUNT);
                let why = cause(&error);
                let why = if is_plain { Unreadable::Messages(why) } else { Unreadable::Ids(why) };
                head.unreadable = Some(why);
                Some(head)
            }
            Err(error) => return Err(error),
        };
        // Gone meanwhile: the next fetch finds that.
        let Some(mut row) = row else { break };
        mark_misplaced(&mut row, rows.last(), (partition, day), position);
        let ends = row.unreadable.is_some();
        rows.push(row);
        if ends || rows.iter().map(|row| row.bytes).sum::<usize>() >= bytes {
            break;
        }
    }
    Ok(Some(rows))
}

/// What the server says, or the driver.
fn cause(error: &dyn Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}
