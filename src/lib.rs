#![doc = include_str!("../README.md")]

mod admin;
#[cfg(feature = "bench")]
pub mod bench;
mod cluster;
mod codec;
mod consumer;
mod deadline;
pub mod dedup;
#[cfg(feature = "embedded")]
pub mod embedded;
mod error;
mod events;
mod failure;
mod headers;
mod id;
mod message;
pub mod metrics;
pub mod migrate;
mod name;
pub mod notifier;
mod pace;
mod producer;
mod relay;
mod store;
mod supervise;
#[cfg(feature = "testing")]
pub mod testing;
mod topology;
mod trouble;
mod upkeep;
#[cfg(feature = "verify")]
pub mod verify;

pub use admin::{
    CursorState, DeadLetter, DeadLetterFilter, DeadLetterId, DeadLetters, DeadLettersMoved,
    GroupInfo, GroupPartition, GroupSummary, MAX_PARTITIONS, MemberInfo, Moved, NodeInfo,
    NotifierSetting, PartitionInfo, PartitionLag, Repaired, Retention, Sought, StoredMessage,
    TopicInfo, TopicOptions, TopicSummary, adopt, moved,
};
pub use cluster::{Cluster, ClusterBuilder};
pub use codec::{Codec, Json};
pub use consumer::{
    Acknowledged, ConsumerBuilder, ConsumerEvent, ConsumerEvents, ConsumerHandle,
    ConsumerPartition, ConsumerStatus, Delivery, Filter, Messages, NodeHints, Order, RetryPolicy,
    Start, Unreadable,
};
pub use error::{Error, ErrorKind, Result};
pub use events::Events;
pub use failure::FailedAttempt;
pub use id::{Day, MAX_NUMBER, MAX_SEQUENCE, MessageId, NodeId, PartitionId, ScheduledId, Uid};
pub use message::{
    DEFAULT_MAX_PAYLOAD_LEN, Headers, MAX_DEDUP_KEY_LEN, MAX_HEADERS_LEN, MAX_KEY_LEN,
    MAX_PAYLOAD_LEN, Message,
};
pub use name::{GroupName, MAX_NAME_LEN, TopicName};
pub use producer::{
    Balancer, KeyFailover, MAX_DELAYED, NodeState, NodeStatus, Outgoing, Producer, ProducerBuilder,
    ProducerEvent, ProducerEvents, ProducerStatus, Receipt, WhenFull,
};
pub use store::pooler::PreparedStatements;
pub use topology::{SLOTS, key_slot};
