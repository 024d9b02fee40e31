//! Effects in another database than the message's node: a message is applied there once, however often it
//! is delivered.
//!
//! Where the effects are on the node, [`Delivery::commit_in`] needs no table of its own. Elsewhere the
//! database gets one (`shardmq migrate --dedup URL`, or
//! [`migrate`](crate::migrate::migrate) with [`Schema::Dedup`](crate::migrate::Schema::Dedup)), in which
//! the handler's transaction records each message by its group and [uid](crate::Delivery::uid):
//!
//! ```no_run
//! # async fn example(
//! #     delivery: shardmq::Delivery,
//! #     client: &mut tokio_postgres::Client,
//! # ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let transaction = client.transaction().await?;
//! if shardmq::dedup::record(&delivery, &transaction).await? {
//!     transaction.execute("update stock set count = count - 1", &[]).await?;
//!     transaction.commit().await?;
//! }
//! delivery.ack()?;
//! # Ok(())
//! # }
//! ```

use std::time::Duration;

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use crate::consumer::Delivery;
use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::dedup;

/// Rows that are deleted in one statement.
const PART: u64 = 10_000;

/// Records in a transaction that the delivery's group has applied its message. False where it has already:
/// then nothing is left to do but to acknowledge it. Where another transaction is about to record the
/// same, this waits for its end. Where this future is dropped the statement may have been sent: roll back.
///
/// # Errors
/// [`ErrorKind::Incompatible`] where the transaction's database lacks the table, else those of the
/// database. End the transaction with a rollback then.
pub async fn record<C>(delivery: &Delivery, transaction: &C) -> Result<bool>
where
    C: GenericClient + Sync,
{
    let recorded = dedup::record(transaction, delivery.group(), delivery.uid()).await;
    recorded.map_err(|error| explained(error, "record that a message is applied"))
}

/// Forgets messages that were recorded longer ago than this, 10,000 in a transaction, if the client is in
/// none; returns how many. Now and then, from anywhere: what is forgotten would be applied again if it were
/// delivered again, so keep for longer than it may take a group to come back, and than a seek goes back.
/// A week is plenty for most. Not cancel safe: some may be forgotten by then.
///
/// # Errors
/// As [`record`].
pub async fn prune<C>(client: &C, older_than: Duration) -> Result<u64>
where
    C: GenericClient + Sync,
{
    let mut pruned = 0;
    loop {
        let part = dedup::prune(client, older_than.as_secs_f64(), PART.cast_signed()).await;
        let part = part.map_err(|error| explained(error, "forget messages that were applied"))?;
        pruned += part;
        if part < PART {
            return Ok(pruned);
        }
    }
}

fn explained(error: tokio_postgres::Error, what: &str) -> Error {
    if matches!(error.code(), Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME)) {
        let what = format!(
            "{what}: the database has no schema shardmq_dedup: run `shardmq migrate --dedup`"
        );
        return Error::with_source(ErrorKind::Incompatible, what, error);
    }
    refused(error, what)
}
