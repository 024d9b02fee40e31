//! What groups have applied in a database of a user's.

use tokio_postgres::{Error, GenericClient};

use crate::id::Uid;
use crate::name::GroupName;
use crate::store::param::{Param, typed};
use crate::store::sql;

/// Records that a group has applied a message; false where it had.
pub(crate) async fn record<C: GenericClient + Sync>(
    transaction: &C,
    group: &GroupName,
    uid: Uid,
) -> Result<bool, Error> {
    let group = group.as_str();
    let index = i32::try_from(uid.index).unwrap_or(i32::MAX);
    let params: [&dyn Param; 4] = [&group, &uid.producer, &uid.sequence, &index];
    Ok(transaction.execute_typed(sql::DEDUP_RECORD, &typed(&params)).await? == 1)
}

/// Forgets what was applied longer ago than so many seconds: at most so many.
pub(crate) async fn prune<C: GenericClient + Sync>(
    client: &C,
    age_secs: f64,
    most: i64,
) -> Result<u64, Error> {
    client.execute_typed(sql::DEDUP_PRUNE, &typed(&[&age_secs, &most])).await
}
