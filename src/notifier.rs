//! Hints that there is something to pull. Correctness never depends on one: consumers look by
//! themselves every few seconds, and after every (re)subscription.

use std::fmt;
use std::pin::Pin;

use futures_util::Stream;

use crate::id::PartitionId;

mod local;
mod postgres;

pub use local::LocalNotifier;
pub(crate) use postgres::PostgresNotifier;

/// What a subscriber hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hint {
    /// These partitions have something.
    Partitions(Vec<PartitionId>),
    /// Hints may have been lost: look at everything once.
    Look,
}

/// The hints of one subscription. It goes on until it is dropped.
pub type Hints = Pin<Box<dyn Stream<Item = Hint> + Send>>;

/// Carries hints from those who appended to those who wait.
///
/// An implementation
/// - MUST return from [`publish`](Self::publish) at once, without waiting for anything, and MUST NOT
///   panic or fail: what can't be sent is dropped;
/// - MUST deliver a hint that was published after a subscription's last [`Hint::Look`] to that
///   subscription, usually within a millisecond or two, or else yield another [`Hint::Look`] once it
///   can tell that hints were lost;
/// - MUST yield [`Hint::Look`] first, as soon as hints published from then on will arrive, and again
///   after every interruption;
/// - MAY merge hints, and MAY deliver more than was asked for;
/// - MUST NOT end a subscription's stream before it is dropped.
pub trait Notifier: fmt::Debug + Send + Sync + 'static {
    /// Says that these partitions have something. Called after the commit.
    fn publish(&self, partitions: &[PartitionId]);

    /// Hears of these partitions. Must be called within a tokio runtime.
    fn subscribe(&self, partitions: &[PartitionId]) -> Hints;
}
