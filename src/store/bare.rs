//! Reading with nothing around it: the same statement as [`fetch`](crate::store::fetch), each payload
//! touched where it lies in the row. The floor that the benches compare the library with.

use std::error::Error as StdError;

use tokio_postgres::types::{FromSql, Type};

use crate::id::{Day, PartitionId};
use crate::store::failed::Failed;
use crate::store::node::{Connection, query};
use crate::store::sql;

/// Reads on from a position, as [`fetch`](crate::store::fetch::fetch) does. Returns how many messages
/// were new, and the last id.
pub(crate) async fn fetch(
    connection: &Connection,
    partition: PartitionId,
    day: Day,
    position: i64,
    (bytes, rows): (i64, i32),
    mut touch: impl FnMut(&[u8]),
) -> Result<(u64, i64), Failed> {
    let text = sql::for_day(sql::FETCH, partition, day);
    let rows = query(connection, &text, &[&position, &bytes, &rows]).await?;
    let (mut messages, mut last) = (0, position);
    for row in &rows {
        let Some(InPlace(array)) = row.get(8) else {
            continue;
        };
        last = row.get::<_, i64>(0) + i64::from(row.get::<_, i32>(1)) - 1;
        messages += each(array, &mut touch);
    }
    Ok((messages, last))
}

/// A one-dimensional array as it came over the wire.
struct InPlace<'a>(&'a [u8]);

impl<'a> FromSql<'a> for InPlace<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::BYTEA_ARRAY
    }
}

/// Touches each element behind the array's header of 20 bytes; returns how many there were.
fn each(array: &[u8], touch: &mut impl FnMut(&[u8])) -> u64 {
    let (mut rest, mut count) = (array.get(20..).unwrap_or_default(), 0);
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let Some((element, behind)) = behind.split_at_checked(length) else {
            break;
        };
        touch(element);
        (rest, count) = (behind, count + 1);
    }
    count
}
