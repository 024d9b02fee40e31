//! Forgets old calls that stored delayed messages, while the lease is held: each call made a row. And looks who
//! may execute the outbox's functions.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::{LEASE, Outlet};
use crate::deadline::{in_time, jitter};
use crate::error::Result;
use crate::store::connect::refused;
use crate::store::{outbox, upkeep};

/// How often it is looked whether there are old ones.
const EVERY: Duration = Duration::from_mins(5);
/// How long a portion may take.
const LIMIT: Duration = LEASE;

/// Forgets until it is dropped: portion after portion while there are full ones, whatever the relay does.
pub(super) async fn run(outlet: Arc<Outlet>) {
    loop {
        match in_time(LIMIT, "forget old calls", prune(&outlet)).await {
            Ok(forgotten) if forgotten >= outbox::PRUNED => continue,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(
                    outbox = outlet.name, error = %error.chain(),
                    "old calls are forgotten later"
                );
            }
        }
        if let Err(error) = in_time(LIMIT, "look at rights", look_at_rights(&outlet)).await {
            tracing::debug!(outbox = outlet.name, error = %error.chain(), "rights are looked at later");
        }
        sleep(jitter(EVERY)).await;
    }
}

async fn look_at_rights(outlet: &Outlet) -> Result<()> {
    let open = upkeep::open_functions(&outlet.get().await?).await;
    let open =
        open.map_err(|error| refused(error, &format!("look at rights in {}", outlet.name)))?;
    if open > 0 {
        tracing::warn!(
            outbox = outlet.name,
            functions = open,
            alert = "rights",
            "everybody may execute functions of the schema, as after a restore without privileges: run \
             `shardmq migrate`"
        );
    }
    Ok(())
}

async fn prune(outlet: &Outlet) -> Result<i64> {
    let pruned = outbox::prune(outlet.get().await?).await;
    pruned.map_err(|error| refused(error, &format!("forget old calls in {}", outlet.name)))
}
