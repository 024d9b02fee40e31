//! Checks that a [`Notifier`] does what it must, for whoever writes one. With feature `testing`.
//!
//! Each check is a function that returns what was violated, so that any test harness will do:
//!
//! ```
//! use shardmq::PartitionId;
//! use shardmq::notifier::LocalNotifier;
//! use shardmq::testing::NotifierSuite;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), shardmq::testing::Violation> {
//! let notifier = LocalNotifier::new();
//! // As if of two processes: here they share a value.
//! let suite = NotifierSuite::new(notifier.clone(), notifier, PartitionId::new(1, 1).unwrap());
//! suite.check().await?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, timeout};

use crate::id::PartitionId;
use crate::notifier::{Hint, Hints, Notifier};

/// How long a hint, or a state, is waited for.
const SOON: Duration = Duration::from_secs(10);
/// How long a call may take that must return at once. Long, since the machine may be busy.
const AT_ONCE: Duration = Duration::from_secs(1);
/// How often in a row it must take longer: a machine stalls once, and who waits does so each time.
const TRIES: u32 = 3;
/// Calls while nothing can be sent.
const MANY: usize = 5_000;

/// What a notifier did that it must not, or the other way round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the notifier {}", self.0)
    }
}

impl std::error::Error for Violation {}

type Checked<T = ()> = Result<T, Violation>;

fn require(holds: bool, otherwise: &str) -> Checked {
    if holds { Ok(()) } else { Err(Violation(otherwise.to_owned())) }
}

/// The contract of a [`Notifier`] as checks.
#[derive(Debug, Clone)]
pub struct NotifierSuite {
    publisher: Arc<dyn Notifier>,
    subscriber: Arc<dyn Notifier>,
    /// Three of one node: the last is a stranger's, unless who subscribes asks for it.
    partitions: [PartitionId; 3],
}

impl NotifierSuite {
    /// Of what publishes and what subscribes: two values as if of two processes, or twice the same. The
    /// partition and two more of its node must be nobody else's.
    ///
    /// # Panics
    /// Where the partition is one of the last two of its node.
    pub fn new(
        publisher: impl Notifier,
        subscriber: impl Notifier,
        partition: PartitionId,
    ) -> Self {
        let (node, table) = (partition.node().number(), partition.table());
        let nth = |n| PartitionId::new(node, table + n);
        let (Ok(one), Ok(two), Ok(three)) = (nth(0), nth(1), nth(2)) else {
            panic!("partition {partition} has no two after it on its node");
        };
        let (publisher, subscriber) = (Arc::new(publisher), Arc::new(subscriber));
        Self { publisher, subscriber, partitions: [one, two, three] }
    }

    /// All that can be checked while nothing is broken. Takes a second or two.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub async fn check(&self) -> Checked {
        self.hints_arrive_after_the_first_look().await?;
        self.strangers_and_nothing_do_no_harm().await?;
        self.all_subscriptions_hear_the_same().await?;
        self.many_are_merged_or_looked_for().await?;
        self.a_slow_subscription_holds_up_nobody().await?;
        self.subscriptions_do_not_end().await
    }

    /// What must hold around an interruption: `interrupt` makes that nothing passes any more, and `mend`
    /// makes that all passes again. Waits at most 30 s for each.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub async fn check_interruption(
        &self,
        interrupt: impl Future<Output = ()>,
        mend: impl Future<Output = ()>,
    ) -> Checked {
        let [mine, other, _] = self.partitions;
        let mut hints = self.subscribe(&[mine, other]).await?;
        self.passes(&mut hints, mine).await?;
        interrupt.await;
        let interrupted = async {
            while self.health() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let found = timeout(3 * SOON, interrupted).await;
        require(found.is_ok(), "SHOULD find out within some seconds that hints do not arrive")?;
        require(
            self.subscriber.health(mine.node()).error.is_some(),
            "MUST say in its health why hints do not arrive",
        )?;
        let mut late = self.subscriber.subscribe(&[mine]);
        self.publishes_at_once(mine)?;
        // What was heard before says nothing of after.
        while hints.next().now_or_never().flatten().is_some() {}
        mend.await;
        self.is_well_again(&mut hints).await?;
        self.passes(&mut hints, mine).await?;
        // Who subscribed meanwhile is no worse off.
        self.is_well_again(&mut late).await?;
        self.passes(&mut late, mine).await
    }

    /// A look comes by which the health is well. One that comes earlier is of an attempt that did not last.
    async fn is_well_again(&self, hints: &mut Hints) -> Checked {
        let looks = async {
            loop {
                if next(hints).await? == Hint::Look && self.health() {
                    return Ok(());
                }
            }
        };
        let missing = "MUST yield a look after an interruption, by which all is well";
        timeout(3 * SOON, looks).await.map_err(|_| Violation(missing.to_owned()))?
    }

    async fn hints_arrive_after_the_first_look(&self) -> Checked {
        let [one, two, _] = self.partitions;
        let mut hints = self.subscribe(&[one, two]).await?;
        for _ in 0..20 {
            self.passes(&mut hints, one).await?;
            self.passes(&mut hints, two).await?;
        }
        self.publisher.publish(&[one, two]);
        self.hears(&mut hints, two).await
    }

    async fn strangers_and_nothing_do_no_harm(&self) -> Checked {
        let [one, two, stranger] = self.partitions;
        let mut hints = self.subscribe(&[one, two]).await?;
        self.publisher.publish(&[stranger]);
        self.publisher.publish(&[]);
        self.passes(&mut hints, one).await
    }

    async fn all_subscriptions_hear_the_same(&self) -> Checked {
        let [one, two, _] = self.partitions;
        let mut first = self.subscribe(&[one, two]).await?;
        let mut second = self.subscribe(&[one]).await?;
        self.publisher.publish(&[one]);
        self.hears(&mut first, one).await?;
        self.hears(&mut second, one).await?;
        drop(first);
        self.passes(&mut second, one).await
    }

    async fn many_are_merged_or_looked_for(&self) -> Checked {
        let [one, two, _] = self.partitions;
        let mut hints = self.subscribe(&[one, two]).await?;
        self.publishes_at_once(one)?;
        self.publisher.publish(&[two]);
        self.hears(&mut hints, two).await?;
        // What came first is not forgotten over what came after.
        while hints.next().now_or_never().flatten().is_some() {}
        self.publisher.publish(&[two]);
        self.publishes_at_once(one)?;
        self.hears(&mut hints, two).await
    }

    async fn a_slow_subscription_holds_up_nobody(&self) -> Checked {
        let [one, two, last] = self.partitions;
        let mut slow = self.subscribe(&[one, two, last]).await?;
        let mut quick = self.subscribe(&[one, two]).await?;
        for _ in 0..50 {
            self.publishes_at_once(one)?;
            self.passes(&mut quick, two).await?;
        }
        // It hears of what came last after all, of which nothing waits for it yet, or looks.
        self.publisher.publish(&[last]);
        self.hears(&mut slow, last).await
    }

    async fn subscriptions_do_not_end(&self) -> Checked {
        let [one, ..] = self.partitions;
        for partitions in [&[one][..], &[]] {
            let mut hints = self.subscriber.subscribe(partitions);
            let until = Instant::now() + AT_ONCE;
            while Instant::now() < until {
                match hints.next().now_or_never() {
                    Some(None) => return Err(Violation("MUST NOT end a subscription".to_owned())),
                    Some(Some(_)) => {}
                    None => tokio::time::sleep(AT_ONCE / 10).await,
                }
            }
        }
        Ok(())
    }

    /// A subscription whose first look was had.
    async fn subscribe(&self, partitions: &[PartitionId]) -> Checked<Hints> {
        let subscribe = || self.subscriber.subscribe(partitions);
        let mut hints = at_once(subscribe, "MUST return from subscribe at once")?;
        let first = async {
            while next(&mut hints).await? != Hint::Look {}
            Ok(())
        };
        let none = |_| Violation("MUST yield a look first, once hints arrive".to_owned());
        timeout(SOON, first).await.map_err(none)??;
        require(self.health(), "MUST say that all is well by the time of the look")?;
        Ok(hints)
    }

    /// A hint that is published now is heard.
    async fn passes(&self, hints: &mut Hints, partition: PartitionId) -> Checked {
        self.publisher.publish(&[partition]);
        self.hears(hints, partition).await
    }

    /// A hint of this partition, or a look at everything.
    async fn hears(&self, hints: &mut Hints, partition: PartitionId) -> Checked {
        let heard = async {
            loop {
                match next(hints).await? {
                    Hint::Partitions(partitions) if !partitions.contains(&partition) => {}
                    Hint::Interrupted => {}
                    Hint::Partitions(_) | Hint::Look => return Ok(()),
                }
            }
        };
        let lost = |_| Violation("MUST deliver a hint, or yield a look".to_owned());
        timeout(SOON, heard).await.map_err(lost)?
    }

    /// Many times, whether they can be sent or not.
    fn publishes_at_once(&self, partition: PartitionId) -> Checked {
        let publish = || (0..MANY).for_each(|_| self.publisher.publish(&[partition]));
        at_once(publish, "MUST return from publish at once")
    }

    fn health(&self) -> bool {
        self.subscriber.health(self.partitions[0].node()).is_ok()
    }
}

/// What a call returns that took no longer than it may, in one of some tries.
fn at_once<T>(call: impl Fn() -> T, otherwise: &str) -> Checked<T> {
    let quick = |_| {
        let began = Instant::now();
        let returned = call();
        (began.elapsed() < AT_ONCE).then_some(returned)
    };
    (0..TRIES).find_map(quick).ok_or_else(|| Violation(otherwise.to_owned()))
}

async fn next(hints: &mut Hints) -> Checked<Hint> {
    hints.next().await.ok_or_else(|| Violation("MUST NOT end a subscription".to_owned()))
}
