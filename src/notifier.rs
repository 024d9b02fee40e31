//! Hints that there is something to pull. Correctness never depends on one: consumers look by
//! themselves every few seconds, more often while hints do not come, and after every (re)subscription.
//!
//! Which notifier a process has is a setting: see [`NotifierKind`].

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{Stream, future};

use crate::id::{NodeId, PartitionId};

mod both;
mod channel;
mod health;
mod kind;
mod local;
mod none;
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod task;

pub use both::Both;
pub use health::{Health, HealthCell, HealthState};
pub use kind::NotifierKind;
pub use local::LocalNotifier;
pub use none::NoNotifier;
pub(crate) use postgres::PostgresNotifier;
#[cfg(feature = "redis")]
pub use redis::RedisNotifier;
#[cfg(feature = "redis")]
pub(crate) use redis::without_password as redis_without_password;

/// What a subscriber hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hint {
    /// These partitions have something.
    Partitions(Vec<PartitionId>),
    /// Hints may have been lost, and arrive from now on: look at everything once. In a subscription to
    /// partitions of several nodes that is said of one of them.
    Look,
    /// Hints do not arrive, until the next [`Look`](Self::Look); of which node, and what is wrong, is in
    /// [`Notifier::health`].
    Interrupted,
}

/// The hints of one subscription. It goes on until it is dropped.
pub type Hints = Pin<Box<dyn Stream<Item = Hint> + Send>>;

/// Carries hints from those who appended to those who wait.
///
/// Many tasks use one value at once, of one process; producers and consumers of other processes have
/// values of their own. An implementation
/// - MUST return from [`publish`](Self::publish) at once, without waiting for anything, and MUST NOT
///   panic or fail: what can't be sent is dropped;
/// - MUST NOT keep more than a bounded number of hints that wait to be sent: later ones are merged into
///   them, or dropped;
/// - MUST yield [`Hint::Look`] as the first of a subscription once hints that are published from then on
///   arrive, and again after every interruption;
/// - MUST deliver a hint that was published after a subscription's last [`Hint::Look`] to that
///   subscription, usually within a millisecond or two, or else yield another [`Hint::Look`] once it
///   can tell that hints were lost;
/// - SHOULD yield [`Hint::Interrupted`] as soon as it can tell that hints do not arrive, also as the first
///   of a subscription, and MUST by then say so in [`health`](Self::health): consumers look more often
///   until the next [`Hint::Look`], by which it MUST say there that all is well;
/// - SHOULD find out within some seconds that hints do not arrive, also where nothing fails: by a canary, a
///   message to itself;
/// - MAY merge hints, MAY deliver one more than once, and MAY deliver more than was asked for;
/// - MUST NOT end a subscription's stream before it is dropped, MUST NOT let a slow subscription hold up
///   another, and MUST bound what waits for one;
/// - MUST NOT need [`shutdown`](Self::shutdown) to let go of what it has once it is dropped.
///
/// With feature `testing` there is a suite that checks an implementation against this: `shardmq::testing`.
pub trait Notifier: fmt::Debug + Send + Sync + 'static {
    /// Says that these partitions have something. Called after the commit.
    fn publish(&self, partitions: &[PartitionId]);

    /// Hears of these partitions. Must be called within a tokio runtime.
    fn subscribe(&self, partitions: &[PartitionId]) -> Hints;

    /// How hints of a node's partitions arrive here, where somebody is subscribed to some. Called often.
    fn health(&self, node: NodeId) -> Health;

    /// Sends what waits to be sent, if that takes no longer than a second. What is published later may be sent
    /// or not. Does nothing by default. Cancel safe: then what waits is dropped.
    fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(future::ready(()))
    }
}

impl<N: Notifier + ?Sized> Notifier for Arc<N> {
    fn publish(&self, partitions: &[PartitionId]) {
        (**self).publish(partitions);
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        (**self).subscribe(partitions)
    }

    fn health(&self, node: NodeId) -> Health {
        (**self).health(node)
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        (**self).shutdown()
    }
}
