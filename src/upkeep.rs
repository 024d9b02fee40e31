//! Keeps nodes in order, from within any process that produces or consumes: day tables are made ahead,
//! days whose time is over are dropped, finished ones frozen, old dedup keys forgotten.
//!
//! One process at a time for each node, by a lease in a row of that node: it is renewed every 8 s and
//! over after 20 s, so that another takes over within 30 s. Every step may be done twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Nodes;
use crate::deadline::jitter;
use crate::error::Result;
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::store::append::make_days_ahead;
use crate::store::connect::refused;
use crate::store::group;
use crate::store::node::Node;
use crate::store::upkeep::{self, Dropped, Expired};

/// How many days ahead tables are made.
const DAYS_AHEAD: i32 = 3;
/// Between attempts to take or keep the lease, and to drop what was contended.
const BEAT: Duration = Duration::from_secs(8);
const LEASE_SECS: f64 = 20.0;
/// How many old dead letters one statement drops.
const DEAD_AT_ONCE: i32 = 1_000;
/// Between rounds over all partitions.
const ROUND: Duration = Duration::from_mins(5);

/// Dedup keys that are forgotten in one transaction.
const KEYS_AT_ONCE: i32 = 10_000;

/// Looks after the nodes of a cluster until it is shut down. Each has its own beat: neither one that
/// hangs nor one whose round takes long keeps the others waiting.
pub(crate) async fn run(nodes: Arc<Nodes>, shutdown: CancellationToken) {
    let holder = Uuid::new_v4();
    let mut kept: BTreeSet<NodeId> = BTreeSet::new();
    let mut keepers = FuturesUnordered::new();
    loop {
        for node in nodes.known() {
            if kept.insert(node) {
                keepers.push(Keeper { nodes: Arc::clone(&nodes), node, holder, due: None }.run());
            }
        }
        tokio::select! {
            Some(gone) = keepers.next() => { kept.remove(&gone); },
            () = sleep(jitter(BEAT)) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// The upkeep of one node.
struct Keeper {
    nodes: Arc<Nodes>,
    node: NodeId,
    holder: Uuid,
    /// When the next round is due; none while the lease is another's.
    due: Option<Instant>,
}

impl Keeper {
    /// Until the node is not known any more; returns its number.
    async fn run(mut self) -> NodeId {
        while self.nodes.known().contains(&self.node) {
            self.beat().await;
            sleep(jitter(BEAT)).await;
        }
        self.node
    }

    async fn beat(&mut self) {
        if let Err(error) = self.try_beat().await {
            self.due = None;
            tracing::debug!(node = %self.node, error = %error.chain(), "upkeep failed");
        }
    }

    async fn try_beat(&mut self) -> Result<()> {
        let what = format!("look after node {}", self.node);
        let connection = self.nodes.node(self.node).await?.get().await?;
        let ours = upkeep::keep_up(connection, self.holder, LEASE_SECS)
            .await
            .map_err(|error| refused(error, &what))?;
        if !ours {
            self.due = None;
            return Ok(());
        }
        let now = Instant::now();
        if self.due.is_none_or(|due| now >= due) {
            let contended = round(&self.nodes, self.node).await?;
            self.due = Some(now + if contended { BEAT } else { ROUND });
        }
        Ok(())
    }
}

/// One round over all partitions of a node. True: a table could not be dropped yet.
pub(crate) async fn round(nodes: &Nodes, node: NodeId) -> Result<bool> {
    let what = format!("look after node {node}");
    let pool = nodes.node(node).await?;
    let partitions =
        upkeep::partitions(&pool.get().await?).await.map_err(|error| refused(error, &what))?;
    let mut contended = false;
    for (partition, in_use) in partitions {
        match keep(nodes, partition, in_use).await {
            Ok(later) => contended |= later,
            // The others go on.
            Err(error) => tracing::warn!(%partition, error = %error.chain(), "upkeep failed"),
        }
    }
    let swept = group::sweep_broadcasts(pool.get().await?).await;
    swept.map_err(|error| refused(error, &what))?;
    forget_keys(&pool, &what).await?;
    let days = upkeep::unfrozen_days(&pool.get().await?).await;
    for (partition, day) in days.map_err(|error| refused(error, &what))? {
        let frozen = upkeep::freeze_day(pool.get().await?, partition, day).await;
        frozen.map_err(|error| refused(error, &format!("freeze day {day} of {partition}")))?;
        let noted = upkeep::day_frozen(pool.get().await?, partition, day).await;
        noted.map_err(|error| refused(error, &what))?;
    }
    Ok(contended)
}

/// Forgets dedup keys that are older than their window, a part at a time: appends need the connection.
async fn forget_keys(pool: &Node, what: &str) -> Result<()> {
    loop {
        let pruned = upkeep::prune_sent_keys(pool.get().await?, KEYS_AT_ONCE).await;
        if pruned.map_err(|error| refused(error, what))? < i64::from(KEYS_AT_ONCE) {
            return Ok(());
        }
    }
}

async fn keep(nodes: &Nodes, partition: PartitionId, in_use: bool) -> Result<bool> {
    if in_use {
        let connection = nodes.node(partition.node()).await?.get().await?;
        make_days_ahead(connection, partition, DAYS_AHEAD).await?;
    }
    expire_dead_letters(nodes, partition).await?;
    expire(nodes, partition).await
}

/// Drops the dead letters of a partition whose time is over.
async fn expire_dead_letters(nodes: &Nodes, partition: PartitionId) -> Result<()> {
    let pool = nodes.node(partition.node()).await?;
    let mut all = 0;
    loop {
        let expired = upkeep::expire_dead_letters(pool.get().await?, partition, DEAD_AT_ONCE).await;
        let what = || format!("drop old dead letters of partition {partition}");
        let count = expired.map_err(|error| refused(error, &what()))?;
        all += count;
        if count < i64::from(DEAD_AT_ONCE) {
            break;
        }
    }
    if all > 0 {
        ::metrics::counter!(names::DEAD_EXPIRED).increment(all.unsigned_abs());
        tracing::warn!(%partition, count = all, alert = "dead_letter", "old dead letters are dropped");
    }
    Ok(())
}

/// Drops the days of a partition whose time is over, oldest first.
async fn expire(nodes: &Nodes, partition: PartitionId) -> Result<bool> {
    let what = format!("drop old days of partition {partition}");
    let pool = nodes.node(partition.node()).await?;
    loop {
        let expired = upkeep::expire_day(pool.get().await?, partition)
            .await
            .map_err(|error| refused(error, &what))?;
        let day = match expired {
            Expired::Nothing => return Ok(false),
            Expired::Kept { day, group } => {
                ::metrics::counter!(names::DAYS_KEPT).increment(1);
                tracing::warn!(
                    %partition, %day, %group, alert = "retention",
                    "a day is kept beyond its time: a group has not finished it"
                );
                return Ok(false);
            }
            Expired::Yes(day) => day,
        };
        let dropped = upkeep::drop_day(pool.get().await?, partition, day)
            .await
            .map_err(|error| refused(error, &what))?;
        match dropped {
            Dropped::Yes => {
                ::metrics::counter!(names::DAYS_DROPPED).increment(1);
                tracing::info!(%partition, %day, "day dropped");
            }
            Dropped::Contended => {
                ::metrics::counter!(names::DROPS_CONTENDED).increment(1);
                tracing::info!(%partition, %day, "a day's table is in use: dropped later");
                return Ok(true);
            }
            Dropped::Nothing => {}
        }
    }
}
