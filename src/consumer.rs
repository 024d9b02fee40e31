//! Receiving messages: consumers of a group share the partitions of a topic and keep only a cursor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, PartitionId};
use crate::store::fetch::Batch;
use crate::topology::Topology;

mod acks;
mod again;
mod aside;
mod assignment;
mod budget;
mod builder;
mod commit;
mod delivery;
mod ending;
mod expiry;
mod filter;
mod handle;
mod holding;
mod journal;
mod keys;
mod lanes;
mod lease;
mod looking;
mod looks;
mod lost;
mod member;
mod messages;
mod pace;
mod parked;
mod pinned;
mod reader;
mod retry;
mod roster;
mod runner;
mod shared;
mod silence;
pub(crate) mod start;
mod status;
mod transaction;
mod waiting;
mod wanted;

use again::Resting;
use budget::Room;
pub use builder::ConsumerBuilder;
pub use delivery::Delivery;
use delivery::Verdict;
pub use filter::Filter;
pub use handle::ConsumerHandle;
use holding::Holding;
pub use messages::Messages;
use parked::Again;
pub use retry::RetryPolicy;
use shared::Shared;
pub use status::{ConsumerEvent, ConsumerEvents, ConsumerPartition, ConsumerStatus, NodeHints};
pub use transaction::Acknowledged;

/// Where a group starts that has not consumed the topic before, or where a
/// [seek](crate::Cluster::seek) moves it to. In between it goes on from its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// At the first message that is there.
    #[default]
    Earliest,
    /// At the first message from now on, by each node's own clock.
    Latest,
    /// At the first message that was appended at this time or later.
    At(SystemTime),
    /// At this message in its own partition, and at its time in the others: at their latest, where
    /// there is no message from this one on yet.
    Id(MessageId),
}

/// What [`Messages::run`] never has in hand at the same time. A stream hands messages out in the
/// order of their partitions whatever this says: what is done with them at a time is its reader's
/// affair.
///
/// A partition that is lost and taken again, after a seek say, begins anew: a message of before may
/// still be in hand then, which [`Delivery::revoked`] has told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Order {
    /// Two messages of one partition: each is done before the next one is begun.
    #[default]
    ByPartition,
    /// Two messages of one key. Those of different keys, and those without a key, go in parallel.
    ByKey,
    /// Nothing: all go in parallel. What fails is parked: a copy waits beside the log until its
    /// time comes, and delays nothing.
    Unordered,
}

/// What becomes of messages that are stored and can't be read, since their row is damaged on the
/// disk or was written past the checks of its table. None is passed over silently: each is told as
/// an error in the stream or to [`run`](Messages::run)'s log, with an alert `unreadable`, and
/// counted in [`metrics::UNREADABLE`](crate::metrics::UNREADABLE).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Unreadable {
    /// They become dead letters of the group, with their ids and the reason, and without key,
    /// headers and payload, in the transaction that moves the cursor over them. To
    /// [retry](crate::Cluster::retry_dead_letters) one reads its row again.
    #[default]
    DeadLetter,
    /// Their partition stops before them, until their row can be read or the group is moved by a
    /// [seek](crate::Cluster::seek). This is told again each minute.
    Stop,
}

fn check_known(topology: &Topology, partitions: &[PartitionId]) -> Result<()> {
    let known = |partition| topology.partitions.binary_search(partition).is_ok();
    let stranger = partitions.iter().find(|partition| !known(partition));
    stranger.map_or(Ok(()), |partition| {
        let what = format!("partition {partition} is not one of topic {}", topology.topic);
        Err(Error::new(ErrorKind::NotFound, what))
    })
}

/// What goes through the stream's channel.
#[derive(Debug)]
pub(crate) enum Event {
    Batch(Read),
    /// A parked message that is due.
    Parked {
        holding: Arc<Holding>,
        row: Arc<Batch>,
        again: Again,
        room: Room,
    },
    /// A message that the stream has handed out was not handled.
    Failed(Resting),
    /// The time of a message that failed has come, or it needs no holding back any more.
    Due(Resting),
    /// Whether an acquisition's messages may be handed out has changed.
    Turn(Uuid),
    /// A reader waits for room.
    Pressure,
    /// News for whoever consumes.
    Error(Error),
}

/// Messages of one row, from an id on, with the room that they take.
#[derive(Debug)]
pub(crate) struct Read {
    holding: Arc<Holding>,
    row: Arc<Batch>,
    from: i64,
    /// Some of them were acknowledged in an earlier holding.
    patchy: bool,
    /// Of the holding, when they were read.
    round: u32,
    room: Room,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
