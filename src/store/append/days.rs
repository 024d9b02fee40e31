//! The days that partitions stand on: asked before a producer's first append to them, moved to the server's
//! date, and their tables made ahead.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tokio::time::timeout;
use tokio_postgres::Row;

use super::{Failure, short};
use crate::error::Error;
use crate::id::{Day, PartitionId};
use crate::store::node::{Connection, Unfinished, query};
use crate::store::param::Param;
use crate::store::sql;

/// The day of each partition that is there. The connection comes back where it has answered.
pub(crate) async fn days(
    connection: Connection,
    partitions: &[PartitionId],
    deadline: Duration,
) -> Result<(Connection, BTreeMap<PartitionId, Day>), Failure> {
    let guard = Unfinished::new(connection);
    let numbers: Vec<i32> = partitions.iter().map(|partition| partition.as_i32()).collect();
    let asked = timeout(deadline, query(guard.connection(), sql::APPEND_DAYS, &[&numbers])).await;
    match asked {
        Ok(Ok(rows)) => Ok((guard.answered(), rows.iter().filter_map(read).collect())),
        Ok(Err(error)) => {
            guard.finished();
            Err(Failure::before(error))
        }
        Err(_) => Err(Failure::Silent),
    }
}

fn read(row: &Row) -> Option<(PartitionId, Day)> {
    let partition = PartitionId::try_from(u32::try_from(row.get::<_, i32>(0)).ok()?).ok()?;
    Some((partition, Day::from_i32(row.get(1)).ok()?))
}

/// What became of a partition that was to be moved to the server's date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rolled {
    /// It stands on this day, and the day's table is there.
    To(Day),
    /// The server's clock is more than an hour ahead of this process's: one of them is wrong.
    Clock,
    /// There is no such partition.
    Unknown,
}

/// Moves a partition to the server's date.
pub(crate) async fn roll(
    connection: Connection,
    partition: PartitionId,
    client_clock: SystemTime,
) -> Result<Rolled, Error> {
    let what = format!("roll partition {partition}");
    let number = partition.as_i32();
    let rows = short(connection, sql::ROLL, &[&number, &client_clock], &what).await?;
    Ok(rows.first().map_or(Rolled::Unknown, |row| match row.get(0) {
        "rolled" | "current" => Day::from_i32(row.get::<_, Option<i32>>(1).unwrap_or(0))
            .map_or(Rolled::Unknown, Rolled::To),
        "clock" => Rolled::Clock,
        _ => Rolled::Unknown,
    }))
}

/// Makes the tables of today and the days ahead.
pub(crate) async fn make_days_ahead(
    connection: Connection,
    partition: PartitionId,
    days: i32,
) -> Result<(), Error> {
    let what = format!("make day tables ahead for partition {partition}");
    let params: [&dyn Param; 2] = [&partition.as_i32(), &days];
    short(connection, sql::MAKE_DAYS_AHEAD, &params, &what).await.map(drop)
}
