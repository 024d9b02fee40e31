//! What breaks a node from inside, for private servers: a locked table, a day that ends, a wrong clock.

use tokio_postgres::{Client, Error};

use crate::id::{Day, PartitionId};
use crate::store::sql;

/// An open partition, its day, and how many seconds the node's clock must be ahead to be past that day.
pub(crate) struct OpenDay {
    pub(crate) partition: PartitionId,
    pub(crate) day: Day,
    pub(crate) ends_in_secs: i64,
}

/// All open partitions, in order.
pub(crate) async fn days(client: &Client) -> Result<Vec<OpenDay>, Error> {
    let rows = client.query(sql::FAULT_DAYS, &[]).await?;
    let read = |row: &tokio_postgres::Row| {
        Some(OpenDay {
            partition: PartitionId::from_i32(row.get(0)).ok()?,
            day: Day::from_i32(row.get(1)).ok()?,
            ends_in_secs: row.get(2),
        })
    };
    Ok(rows.iter().filter_map(read).collect())
}

/// Begins a transaction that holds a day's table against everybody.
pub(crate) async fn lock_day(
    client: &Client,
    partition: PartitionId,
    day: Day,
) -> Result<(), Error> {
    client.batch_execute("begin").await?;
    client.batch_execute(&sql::for_day(sql::FAULT_LOCK, partition, day)).await
}

/// Ends that transaction.
pub(crate) async fn unlock(client: &Client) -> Result<(), Error> {
    client.batch_execute("rollback").await
}

/// Makes the node's clock show so many seconds more than the true time.
pub(crate) async fn move_clock(client: &Client, ahead_secs: i64) -> Result<(), Error> {
    client.batch_execute(&clock_at(ahead_secs)).await
}

/// Moves all open partitions to the day after theirs. Nobody else sees the clock that is moved for that.
pub(crate) async fn roll(client: &Client, days: &[OpenDay]) -> Result<(), Error> {
    let Some(ahead) = days.iter().map(|day| day.ends_in_secs).max() else {
        return Ok(());
    };
    client.batch_execute("begin").await?;
    client.batch_execute(&clock_at(ahead + 1)).await?;
    for day in days {
        client.query_one(sql::FAULT_ROLL, &[&day.partition.as_i32()]).await?;
    }
    client.batch_execute(&clock_at(0)).await?;
    client.batch_execute("commit").await
}

fn clock_at(ahead_secs: i64) -> String {
    sql::FAULT_CLOCK.replace("{seconds}", &ahead_secs.to_string())
}
