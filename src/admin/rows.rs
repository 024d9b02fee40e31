//! Rows of nodes, as they are told.

use std::time::SystemTime;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::admin::{PartitionInfo, PartitionLag, StoredMessage};
use crate::error::{Error, ErrorKind, Result};
use crate::headers;
use crate::id::{MessageId, NodeId, PartitionId};
use crate::message::{Headers, RESERVED_HEADER_PREFIX};
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::packed::Json;

pub(super) fn read_partition(row: &Row, node: NodeId) -> Result<PartitionInfo> {
    let partition = PartitionId::from_i32(row.get(0))?;
    let day: i32 = row.get(3);
    let last_id = MessageId::try_from(row.get::<_, i64>(4)).ok();
    let closed = u64::try_from(row.get::<_, i64>(5)).unwrap_or(0);
    let today = last_id.filter(|id| id.day().as_i32() == day).map_or(0, MessageId::sequence);
    let messages = closed + u64::from(today);
    Ok(PartitionInfo { partition, node, state: row.get(2), last_id, messages })
}

pub(super) fn read_lag(row: &Row) -> Result<PartitionLag> {
    let oldest: Option<SystemTime> = row.get(5);
    let age = |at: SystemTime| at.elapsed().unwrap_or_default().as_secs_f64();
    let member: Option<Uuid> = row.get(6);
    Ok(PartitionLag {
        group: row.get(0),
        partition: PartitionId::from_i32(row.get(1))?,
        acked_id: MessageId::try_from(row.get::<_, i64>(2)).ok(),
        last_id: MessageId::try_from(row.get::<_, i64>(3)).ok(),
        lag: u64::try_from(row.get::<_, i64>(4)).unwrap_or(0),
        lag_secs: oldest.map(age),
        member: member.map(|member| member.to_string()),
    })
}

/// A message of a statement that has its columns first. Without payload it is one that could not be
/// read.
pub(super) fn read_message(row: &Row) -> Result<StoredMessage> {
    let what = "read a message";
    let odd = |error| refused(error, what);
    let id = MessageId::try_from(row.try_get::<_, i64>(0).map_err(odd)?)?;
    let headers = row.try_get::<_, Option<Json<'_>>>(5).map_err(odd)?;
    let headers = headers.map_or(Ok(Headers::new()), |Json(json)| headers::read(json));
    let mut headers = headers.map_err(|error| {
        Error::with_source(ErrorKind::Database, format!("read the headers of message {id}"), error)
    })?;
    headers.retain(|name, _| !name.starts_with(RESERVED_HEADER_PREFIX));
    Ok(StoredMessage {
        id,
        uid: row.try_get(1).map_err(odd)?,
        topic: TopicName::new(row.try_get(2).map_err(odd)?)?,
        key: row.try_get(4).map_err(odd)?,
        headers,
        payload: row.try_get::<_, Option<_>>(6).map_err(odd)?.unwrap_or_default(),
        appended_at: row.try_get(7).map_err(odd)?,
    })
}
