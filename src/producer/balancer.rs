//! Which partition a message goes to, where its sender decides.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;
use crate::message::{Headers, Message};
use crate::producer::health::NodeState;
use crate::producer::shared::Shared;

/// Chooses the partitions of messages, in place of the default: by the slot of the key
/// ([`key_slot`](crate::key_slot)), or else of the dedup key, and without any from partition to
/// partition, by batch.
///
/// Implementations MUST return at once, and MUST NOT block: they are called by whoever sends, for
/// each message. They may be called by many at once.
///
/// The order of messages of one key is kept only if all of them are given the same partition, and a
/// dedup key is known only in the partition that its first message was given.
///
/// ```
/// use shardmq::{Balancer, Outgoing, PartitionId};
///
/// /// Urgent messages have the first partition for themselves.
/// struct Urgent;
///
/// impl Balancer for Urgent {
///     fn choose(&self, message: &Outgoing<'_>, open: &[PartitionId]) -> Option<PartitionId> {
///         let (first, others) = open.split_first()?;
///         if message.headers.contains_key("urgent") {
///             return Some(*first);
///         }
///         others.get(message.payload.len() % others.len().max(1)).copied()
///     }
/// }
/// ```
pub trait Balancer: Send + Sync + 'static {
    /// The partition of a message; `None` for the one that it has by default.
    ///
    /// `open` are the partitions that take messages now, in rising order: neither full nor sealed,
    /// and of nodes that are not down. It may be empty, and MUST NOT be relied on to be complete a
    /// moment later. Another partition of the topic may be returned too: a message with a key or
    /// dedup key waits for it as [configured](crate::KeyFailover), one without goes to another node
    /// where its own fails. A partition that is not of this topic is an error of the send.
    fn choose(&self, message: &Outgoing<'_>, open: &[PartitionId]) -> Option<PartitionId>;
}

/// A message that is to be sent, as a [`Balancer`] sees it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Outgoing<'a> {
    /// Its key.
    pub key: Option<&'a str>,
    /// Its [dedup key](crate::Message::dedup_key).
    pub dedup_key: Option<&'a str>,
    /// Its headers.
    pub headers: &'a Headers,
    /// Its payload.
    pub payload: &'a [u8],
}

/// The balancer of a producer, and the partitions that it may choose from.
#[derive(Clone)]
pub(crate) struct Own {
    balancer: Arc<dyn Balancer>,
    open: Arc<Mutex<Option<Arc<[PartitionId]>>>>,
}

impl Own {
    pub(super) fn new(balancer: impl Balancer) -> Self {
        Self { balancer: Arc::new(balancer), open: Arc::default() }
    }

    /// The same, for other partitions.
    pub(super) fn anew(&self) -> Self {
        Self { balancer: Arc::clone(&self.balancer), open: Arc::default() }
    }

    /// The index of the chosen lane; none for the default.
    pub(super) fn choose(&self, shared: &Shared, message: &Message) -> Result<Option<usize>> {
        let open = self.open(shared);
        let outgoing = Outgoing {
            key: message.key.as_deref(),
            dedup_key: message.dedup_key.as_deref(),
            headers: &message.headers,
            payload: &message.payload,
        };
        let Some(chosen) = self.balancer.choose(&outgoing, &open) else {
            return Ok(None);
        };
        let index = shared.topology.partitions.binary_search(&chosen).map_err(|_| {
            let topic = &shared.topology.topic;
            let what =
                format!("the balancer chose partition {chosen}, which topic {topic} has not");
            Error::new(ErrorKind::Invalid, what)
        })?;
        Ok(Some(index))
    }

    /// What is open is another now, or may be.
    pub(super) fn forget(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn open(&self, shared: &Shared) -> Arc<[PartitionId]> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let list = || {
            let lanes = shared.lanes.iter().filter(|lane| {
                let is_down = lane.writer.health.state() == NodeState::Down;
                !is_down && lane.is_open(|| shared.today().ok())
            });
            lanes.map(|lane| lane.partition).collect()
        };
        Arc::clone(open.get_or_insert_with(list))
    }
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Balancer")
    }
}
