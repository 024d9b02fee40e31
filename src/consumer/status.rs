//! What a consumer tells about itself: events and a status.

use crate::events::Events;
use crate::id::{NodeId, PartitionId};
use crate::notifier::Health;

/// Something that happened to a consumer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ConsumerEvent {
    /// Hints of a node arrive otherwise than before, where the consumer has partitions. While they do not
    /// arrive, messages are found by looking, every 50 ms where some came lately, and less often up to the
    /// [poll interval](crate::ConsumerBuilder::poll_interval).
    Notifier {
        /// Which.
        node: NodeId,
        /// How, and since when.
        health: Health,
    },
}

/// The [events](crate::ConsumerHandle::events) of a consumer, as they happen.
pub type ConsumerEvents = Events<ConsumerEvent>;

/// How a consumer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerStatus {
    /// What it owns, in rising order.
    pub partitions: Vec<ConsumerPartition>,
    /// How hints arrive, of the nodes where it owns something.
    pub notifier: Vec<NodeHints>,
    /// Bytes that are fetched, or about to be, and not yet handed out.
    pub prefetched_bytes: usize,
    /// Whether a shutdown has begun: nothing is handed out any more.
    pub is_shutting_down: bool,
}

/// A partition that a consumer owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerPartition {
    /// Which.
    pub partition: PartitionId,
    /// Whether it is [paused](crate::ConsumerHandle::pause).
    pub paused: bool,
}

/// How hints of a node arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeHints {
    /// Which.
    pub node: NodeId,
    /// How, and since when.
    pub health: Health,
}
