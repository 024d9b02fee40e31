//! Acknowledging a message inside of a transaction of the consumer's own.

use std::fmt;

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use crate::consumer::delivery::Delivery;
use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::failures::commit_parked_in;
use crate::store::group::{self, InTransaction, Outcome};

impl Delivery {
    /// Acknowledges the message inside a transaction on the [node](Self::partition) that it is on, so that
    /// the group's position and what the transaction does happen together or not at all: this message takes
    /// effect exactly once, whatever is killed in between. Not so one that its producer has stored a second
    /// time ([`is_possible_duplicate`](Self::is_possible_duplicate)), under another id: where that matters,
    /// [`dedup`](crate::dedup) goes by the uid, also here.
    ///
    /// ```no_run
    /// # async fn example(
    /// #     mut delivery: shardmq::Delivery,
    /// #     client: &mut tokio_postgres::Client,
    /// # ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// let transaction = client.transaction().await?;
    /// transaction.execute("update account set balance = balance + 1", &[]).await?;
    /// let acknowledged = delivery.commit_in(&transaction).await?;
    /// transaction.commit().await?;
    /// acknowledged.committed();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// One statement, which locks the group's row of the partition until the transaction ends: takeovers,
    /// seeks and the commits of other acknowledgements pass over it meanwhile, and other transactions of
    /// this partition wait here. So call it last. Nothing else waits, however long the transaction is
    /// open, unless much of the partition fails meanwhile: that is parked afterwards, and kept in memory
    /// until then. Of a message that was [parked](crate::Order::Unordered) it is the row of its copy alone
    /// that is locked.
    ///
    /// The delivery is still in hand after an error, a rollback, or a commit whose answer was lost: it
    /// may be tried again, in another transaction. What was committed after all is not committed twice.
    /// Where this future is dropped the statement may have been sent: roll back then too.
    ///
    /// # Errors
    /// End the transaction with a rollback after each. [`ErrorKind::LeaseLost`] and [`ErrorKind::Reset`]
    /// where the partition is another's, or was moved by a seek: the message is delivered again.
    /// [`ErrorKind::Conflict`] where it is acknowledged already: an earlier transaction was committed, and
    /// nothing is left to do; or this very transaction has done so before, and after its rollback the message is
    /// still in hand. [`ErrorKind::Unavailable`] where the server was started again since the
    /// message was read, until the consumer has seen that it is still there.
    /// [`ErrorKind::Invalid`] where the transaction is not on the message's node.
    pub async fn commit_in<C>(&mut self, transaction: &C) -> Result<Acknowledged<'_>>
    where
        C: GenericClient + Sync,
    {
        let (partition, id) = (self.partition(), self.id());
        let what = format!("acknowledge message {id} in a transaction");
        let holding = self.holding();
        holding.accepts()?;
        let this = InTransaction {
            partition,
            fence: holding.fence,
            incarnation: holding.incarnation(),
            id: id.number(),
            is_next: holding.tracker().is_next(id.number()),
        };
        let outcome = match &self.origin().parked {
            Some(parked) => {
                commit_parked_in(transaction, &holding.group, &this, parked.claim.id).await
            }
            None => group::commit_in(transaction, &holding.group, &this).await,
        };
        let outcome = match outcome {
            // A database that is no node has no such table.
            Err(error) if is_no_node(&error) => Outcome::Elsewhere,
            outcome => outcome.map_err(|error| refused(error, &what))?,
        };
        let kind = match outcome {
            Outcome::Acknowledged => return Ok(Acknowledged { delivery: self }),
            Outcome::LeaseLost => ErrorKind::LeaseLost,
            Outcome::Reset => ErrorKind::Reset,
            Outcome::OtherServer => {
                holding.compare();
                let why = format!("{what}: the server was started again: not yet");
                return Err(Error::new(ErrorKind::Unavailable, why));
            }
            Outcome::Already => {
                // As good as answered, where it is still this one's.
                let _ = self.committed();
                let why = format!("{what}: it is acknowledged already");
                return Err(Error::new(ErrorKind::Conflict, why));
            }
            Outcome::Uncommitted => {
                let why =
                    format!("{what}: it is acknowledged already, in this transaction or before it");
                return Err(Error::new(ErrorKind::Conflict, why));
            }
            Outcome::Elsewhere => {
                let node = partition.node();
                let why = format!("{what}: the transaction is not on node {node}, where it is");
                return Err(Error::invalid(why));
            }
        };
        Err(holding.refusal(kind))
    }
}

fn is_no_node(error: &Failed) -> bool {
    matches!(error.code(), Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME))
}

/// A message that is acknowledged if a transaction is committed. Say so by
/// [`committed`](Self::committed); until then, and if this is dropped, its delivery is still in hand.
#[must_use = "the delivery is in hand until it is said that the transaction was committed"]
pub struct Acknowledged<'a> {
    delivery: &'a mut Delivery,
}

impl Acknowledged<'_> {
    /// The transaction was committed: the message is done.
    pub fn committed(self) {
        // Refused where the partition went meanwhile: its next owner has seen the commit.
        let _ = self.delivery.committed();
    }
}

impl fmt::Debug for Acknowledged<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Acknowledged").field(&self.delivery.id()).finish()
    }
}
