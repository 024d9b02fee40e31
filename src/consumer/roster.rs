//! Who else is in the group: a heartbeat in the control database, and the even share that follows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use crate::consumer::Shared;
use crate::consumer::member::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::store::connect::refused;
use crate::store::control;
use crate::topology::share;

/// How long a statement may take: a database that hangs must hold nobody up.
const STATEMENT: Duration = Duration::from_secs(2);

/// Beats until the consumer stops. With the control database away, everybody keeps what they have.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(shared.options.lease / 3);
    loop {
        tokio::select! {
            _ = interval.tick() => beat(&shared).await,
            () = shared.stopping.cancelled() => return,
        }
    }
}

/// One heartbeat; a new share is told to the members of all nodes.
pub(crate) async fn beat(shared: &Shared) {
    let late = || Err(Error::new(ErrorKind::Timeout, "send a heartbeat: no answer"));
    let beaten = timeout(STATEMENT, try_beat(shared)).await;
    match beaten.unwrap_or_else(|_| late()) {
        Ok(share) => {
            if shared.share.swap(share, Ordering::AcqRel) != share {
                drop(shared.command(Command::Rebalance));
            }
        }
        Err(error) => tracing::warn!(error = %error.chain(), "heartbeat failed"),
    }
}

async fn try_beat(shared: &Shared) -> Result<usize> {
    let connection = shared.cluster.inner.control.get().await?;
    let lease = shared.options.lease.as_secs_f64();
    let names = (&shared.topology.topic, &shared.group);
    let members = control::heartbeat(connection, shared.member, names, &host(), lease)
        .await
        .map_err(|error| refused(error, "send a heartbeat to the control database"))?;
    if let Some(only) = &shared.options.only {
        return Ok(only.len());
    }
    let rank = members.iter().position(|member| *member == shared.member).unwrap_or(0);
    Ok(share(shared.topology.partitions.len(), members.len(), rank))
}

/// Takes the member off the list.
pub(crate) async fn leave(shared: &Shared) {
    let left = async {
        let connection = shared.cluster.inner.control.get().await?;
        control::leave(connection, shared.member)
            .await
            .map_err(|error| refused(error, "leave the group"))
    };
    // Where that fails, the heartbeat ends all the same.
    if let Ok(Err(error)) = timeout(STATEMENT, left).await {
        tracing::debug!(error = %error.chain(), "leaving the group");
    }
}

/// This machine's name.
fn host() -> String {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let name = std::env::var("HOSTNAME").ok().or_else(|| read("/proc/sys/kernel/hostname"));
    name.map_or_else(|| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// A duration give or take a fifth, so that many don't act at once.
pub(crate) fn jitter(duration: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 401;
    duration * u32::try_from(800 + random).unwrap_or(1000) / 1000
}
