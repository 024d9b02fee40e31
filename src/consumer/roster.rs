//! Who else is in the group: a heartbeat in the control database, and the even share that follows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::consumer::Shared;
use crate::consumer::member::Command;
use crate::deadline::in_time;
use crate::error::Result;
use crate::store::connect::refused;
use crate::store::control;
use crate::topology::share;

/// How long a statement may take: a database that hangs must hold nobody up.
const STATEMENT: Duration = Duration::from_secs(2);

/// After how many leases without a word from the control database partitions that are free are taken
/// whoever's they should be.
const PATIENCE: u32 = 2;

/// Beats until the consumer stops. With the control database away, everybody keeps what they have, and
/// after a while also takes what nobody does.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(shared.options.lease / 3);
    let (mut heard, mut away) = (Instant::now(), false);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = shared.stopping.cancelled() => return,
        }
        match beat(&shared).await {
            Ok(()) => {
                if std::mem::take(&mut away) {
                    tracing::info!(group = %shared.group, "the control database is back");
                }
                heard = Instant::now();
            }
            Err(error) => {
                if !std::mem::replace(&mut away, true) {
                    tracing::warn!(
                        group = %shared.group, error = %error.chain(),
                        "no heartbeat: the consumer keeps the partitions that it has"
                    );
                }
                if heard.elapsed() > shared.options.lease * PATIENCE {
                    take_share(&shared, shared.topology.partitions.len());
                }
            }
        }
    }
}

/// One heartbeat; a new share is told to the members of all nodes.
pub(crate) async fn beat(shared: &Shared) -> Result<()> {
    let _turn = shared.registering.lock().await;
    if shared.stopping.is_cancelled() {
        return Ok(());
    }
    let share = in_time(STATEMENT, "send a heartbeat", try_beat(shared)).await?;
    take_share(shared, share);
    Ok(())
}

fn take_share(shared: &Shared, share: usize) {
    if shared.share.swap(share, Ordering::AcqRel) != share {
        drop(shared.command(Command::Rebalance));
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
    shared.stopping.cancel();
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
