//! What keeps a node in order: day tables ahead, old days gone.

use std::time::{Duration, SystemTime};

use tokio_postgres::error::SqlState;
use uuid::Uuid;

use crate::id::{Day, PartitionId};
use crate::name::TopicName;
use crate::store::failed::Failed;
use crate::store::fetch::is_of_a_table;
use crate::store::node::{Connection, Durability, query, write};
use crate::store::param::Param;
use crate::store::session::Single;
use crate::store::sql;

/// Whose the upkeep of a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upkeep {
    Ours,
    /// Another process'; so many sessions does this role have in the node's database.
    Anothers {
        sessions: u32,
    },
}

/// Takes or keeps the upkeep of a node.
pub(crate) async fn keep_up(
    connection: Connection,
    holder: Uuid,
    lease_secs: f64,
) -> Result<Upkeep, Failed> {
    let rows =
        write(connection, Durability::Relaxed, sql::KEEP_UP, &[&holder, &lease_secs]).await?;
    let sessions = rows.first().and_then(|row| row.get::<_, Option<i64>>(1));
    Ok(match sessions {
        None => Upkeep::Ours,
        Some(sessions) => {
            Upkeep::Anothers { sessions: u32::try_from(sessions).unwrap_or(u32::MAX) }
        }
    })
}

/// The node's partitions, and whether each is in use.
pub(crate) async fn partitions(
    connection: &Connection,
) -> Result<Vec<(PartitionId, bool)>, Failed> {
    let rows = match query(connection, sql::UPKEEP_PARTITIONS, &[&true]).await {
        // One table can't be read: the others are looked after all the same.
        Err(error) if is_of_a_table(&error) => {
            query(connection, sql::UPKEEP_PARTITIONS, &[&false]).await?
        }
        rows => rows?,
    };
    let read =
        |row: &tokio_postgres::Row| Some((PartitionId::from_i32(row.get(0)).ok()?, row.get(1)));
    Ok(rows.iter().filter_map(read).collect())
}

/// How many functions of the schema everybody may execute that are for some roles only.
pub(crate) async fn open_functions(connection: &Connection) -> Result<usize, Failed> {
    query(connection, sql::RIGHTS, &[]).await.map(|rows| rows.len())
}

/// Who holds a lock that appends wait for. What this role may not see of it is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The partition or table, for people.
    pub(crate) lock: String,
    /// None where its transaction is prepared.
    pub(crate) pid: Option<i32>,
    /// Another one each time, but for a session that holds a lock outside of any.
    pub(crate) transaction: String,
    pub(crate) user: String,
    pub(crate) application: String,
    pub(crate) client: String,
    /// When its transaction began, or its last statement ended.
    pub(crate) since: String,
}

/// Who holds locks of partitions, or of tables so that no row gets in.
pub(crate) async fn lock_holders(connection: &Connection) -> Result<Vec<Holder>, Failed> {
    let rows = query(connection, sql::LOCK_HOLDERS, &[]).await?;
    let text = |row: &tokio_postgres::Row, nth: usize| {
        row.get::<_, Option<String>>(nth).unwrap_or_default()
    };
    let read = |row: &tokio_postgres::Row| Holder {
        lock: text(row, 0),
        pid: row.get(1),
        transaction: text(row, 2),
        user: text(row, 3),
        application: text(row, 4),
        client: text(row, 5),
        since: text(row, 6),
    };
    Ok(rows.iter().map(read).collect())
}

/// What became of the oldest day of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expired {
    /// Its time is not over.
    Nothing,
    /// A group has not finished it.
    Kept { day: Day, group: String },
    /// The low watermark is beyond it: the table may be dropped.
    Yes(Day),
    /// Its time is over by the server's clock, which is more than an hour ahead of this machine's.
    Clock(Day),
}

/// Moves the low watermark over the oldest day of a partition if its time is over.
pub(crate) async fn expire_day(
    connection: Connection,
    partition: PartitionId,
    clock: SystemTime,
) -> Result<Expired, Failed> {
    let params: [&dyn Param; 2] = [&partition.as_i32(), &clock];
    let rows = write(connection, Durability::Durable, sql::EXPIRE_DAY, &params).await?;
    Ok(rows.first().map_or(Expired::Nothing, |row| {
        let day = row.get::<_, Option<i32>>(1).and_then(|day| Day::from_i32(day).ok());
        match (row.get(0), day) {
            ("expired", Some(day)) => Expired::Yes(day),
            ("clock", Some(day)) => Expired::Clock(day),
            ("kept", Some(day)) => Expired::Kept { day, group: row.get(2) },
            _ => Expired::Nothing,
        }
    }))
}

/// What became of a table that was to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dropped {
    Yes,
    /// Somebody held it for longer than the drop may wait.
    Contended,
    /// It was gone.
    Nothing,
}

/// Drops the table of a day below the low watermark.
pub(crate) async fn drop_day(
    connection: Connection,
    partition: PartitionId,
    day: Day,
) -> Result<Dropped, Failed> {
    let params: [&dyn Param; 2] = [&partition.as_i32(), &day.as_i32()];
    let rows = write(connection, Durability::Durable, sql::DROP_DAY, &params).await?;
    Ok(rows.first().map_or(Dropped::Nothing, |row| match row.get(0) {
        "dropped" => Dropped::Yes,
        "contended" => Dropped::Contended,
        _ => Dropped::Nothing,
    }))
}

/// Closed days whose table was not frozen yet, some at a time.
pub(crate) async fn unfrozen_days(
    connection: &Connection,
) -> Result<Vec<(PartitionId, Day)>, Failed> {
    let rows = query(connection, sql::UNFROZEN_DAYS, &[]).await?;
    let read = |row: &tokio_postgres::Row| {
        Some((PartitionId::from_i32(row.get(0)).ok()?, Day::from_i32(row.get(1)).ok()?))
    };
    Ok(rows.iter().filter_map(read).collect())
}

/// How long a table may be vacuumed. What is frozen by then stays so, and the next attempt goes on
/// there.
const FREEZE: Duration = Duration::from_mins(30);

/// Freezes a closed day's table; false where somebody else is at it, or it takes too long. Outside
/// of any transaction, as vacuum must be, and of the pool: it takes minutes where the table is
/// large.
pub(crate) async fn freeze_day(
    single: &Single,
    partition: PartitionId,
    day: Day,
) -> Result<bool, Failed> {
    let text = sql::for_day(sql::FREEZE_DAY, partition, day);
    match single.run_long(&text, FREEZE).await {
        Err(error) if error.code().is_some_and(is_given_up) => Ok(false),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(true),
    }
}

fn is_given_up(code: &SqlState) -> bool {
    [SqlState::LOCK_NOT_AVAILABLE, SqlState::QUERY_CANCELED].contains(code)
}

/// Records that a day's table was frozen.
pub(crate) async fn day_frozen(
    connection: Connection,
    partition: PartitionId,
    day: Day,
) -> Result<(), Failed> {
    let params: [&dyn Param; 2] = [&partition.as_i32(), &day.as_i32()];
    write(connection, Durability::Relaxed, sql::DAY_FROZEN, &params).await.map(drop)
}

/// Forgets dedup keys that are older than their window: at most so many. Returns how many.
pub(crate) async fn prune_sent_keys(
    connection: Connection,
    most: i32,
    clock: SystemTime,
) -> Result<i64, Failed> {
    let params: [&dyn Param; 2] = [&most, &clock];
    let rows = write(connection, Durability::Relaxed, sql::PRUNE_SENT_KEYS, &params).await?;
    Ok(rows.first().map_or(0, |row| row.get(0)))
}

/// How many messages after a position were dropped by retention.
pub(crate) async fn missed(
    connection: &Connection,
    partition: PartitionId,
    position: i64,
) -> Result<u64, Failed> {
    let rows = query(connection, sql::MISSED, &[&partition.as_i32(), &position]).await?;
    Ok(rows.first().map_or(0, |row| u64::try_from(row.get::<_, i64>(0)).unwrap_or(0)))
}

/// Drops dead letters of a partition whose time is over; how many, up to so many.
pub(crate) async fn expire_dead_letters(
    connection: Connection,
    partition: PartitionId,
    most: i32,
    clock: SystemTime,
) -> Result<i64, Failed> {
    let params: [&dyn Param; 3] = [&partition.as_i32(), &most, &clock];
    let rows = write(connection, Durability::Durable, sql::EXPIRE_DEAD_LETTERS, &params).await?;
    Ok(rows.first().map_or(0, |row| row.get(0)))
}

/// Says how long a node keeps a topic's days and dead letters.
pub(crate) async fn set_retention(
    connection: Connection,
    topic: &TopicName,
    (days, drop_unread, dead_letter_days): (i32, bool, i32),
) -> Result<(), Failed> {
    let topic = topic.as_str();
    let params: [&dyn Param; 4] = [&topic, &days, &drop_unread, &dead_letter_days];
    write(connection, Durability::Durable, sql::SET_RETENTION, &params).await.map(drop)
}
