//! What a producer tells about itself: events and a status.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::events::Events;
use crate::id::{MessageId, NodeId, PartitionId};
use crate::producer::health::NodeState;
use crate::producer::shared::Shared;

/// Something that happened to a producer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ProducerEvent {
    /// A node is away: messages without a key go elsewhere.
    NodeDown {
        /// Which.
        node: NodeId,
        /// Why.
        error: Error,
    },
    /// A node takes messages again.
    NodeUp {
        /// Which.
        node: NodeId,
        /// How long it did not.
        after: Duration,
    },
    /// A server has lost messages whose ids this producer was given: it gives these ids to others now. So
    /// does a standby that is promoted without the last commits. Told once for each partition and loss, when
    /// the next message is stored there, and not where others have stored as many before.
    LostTail {
        /// Which partition.
        partition: PartitionId,
        /// The first id that was given again. Those before it may be gone too where others have stored
        /// messages since.
        first: MessageId,
        /// The last id that was acknowledged before.
        last: MessageId,
    },
    /// The buffer is full, and senders wait.
    Throttled,
    /// Nobody waits any more.
    Resumed,
    /// Messages were sent elsewhere without knowing whether they were stored before. Each is marked
    /// ([`Delivery::is_possible_duplicate`](crate::Delivery::is_possible_duplicate)).
    PossibleDuplicates {
        /// The node that did not say.
        node: NodeId,
        /// How many.
        messages: u32,
    },
}

/// The [events](crate::Producer::events) of a producer, as they happen.
pub type ProducerEvents = Events<ProducerEvent>;

impl std::fmt::Debug for ProducerEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProducerEvents")
    }
}

/// How a producer fares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ProducerStatus {
    /// Bytes of messages that are not answered yet; a message counts 64 bytes more than it has.
    pub buffered_bytes: usize,
    /// How many bytes they may be.
    pub buffer_bytes: usize,
    /// Senders that wait for room.
    pub waiting: usize,
    /// The nodes of the topic, by number.
    pub nodes: Vec<NodeStatus>,
}

/// How a node fares, as a producer sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeStatus {
    /// Its number.
    pub node: NodeId,
    /// How it fares.
    pub state: NodeState,
    /// For how many milliseconds.
    pub for_ms: u64,
    /// Why it is away, where it is.
    pub error: Option<String>,
}

pub(super) fn of(shared: &Shared) -> ProducerStatus {
    let limit = shared.options.buffer_bytes;
    let nodes = shared.writers.values().map(|writer| {
        let (since, why) = writer.health.detail();
        NodeStatus {
            node: writer.node,
            state: writer.health.state(),
            for_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            error: why.map(|error| error.chain()),
        }
    });
    ProducerStatus {
        buffered_bytes: limit.saturating_sub(shared.budget.available_permits()),
        buffer_bytes: limit,
        waiting: shared.waiting.load(Ordering::Relaxed),
        nodes: nodes.collect(),
    }
}

/// A sender that waits for room, until it is dropped.
pub(super) struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        if shared.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
            shared.tell(ProducerEvent::Throttled);
        }
        Self(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.tell(ProducerEvent::Resumed);
        }
    }
}
