//! Keeps nodes in order, from within any process that produces or consumes: day tables are made
//! ahead, days whose time is over are dropped, finished ones frozen, old dedup keys forgotten.
//!
//! One process at a time for each node, by a lease in a row of that node: it is renewed every 8 s
//! and over after 20 s, so that another takes over within 30 s. Every step may be done twice. A
//! process that finds the lease taken asks again the later, the more ask ([`Pace`]). What can't be
//! undone is done only where the node's clock and this machine's agree that its time is over. Each
//! beat also looks for sessions that hold a lock for long which appends wait for ([`Locks`]).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Nodes;
use crate::deadline::jitter;
use crate::error::Result;
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::pace::{Beat, Pace};
use crate::store::append::make_days_ahead;
use crate::store::connect::refused;
use crate::store::node::Node;
use crate::store::upkeep::{self, Dropped, Expired, Upkeep};
use crate::store::{control, group};
use crate::upkeep::locks::Locks;

mod locks;

mod primaries;

/// How many days ahead tables are made.
const DAYS_AHEAD: i32 = 3;
/// Between two renewals of the lease, and between two attempts to take it.
const BEAT: Duration = Duration::from_secs(8);
/// Between two attempts of a process that has no use for the node.
const LONGEST: Duration = Duration::from_mins(10);
/// Between attempts to drop what was contended.
const CONTENDED: Duration = Duration::from_secs(8);
const LEASE: Duration = Duration::from_secs(20);
/// How many old dead letters one statement drops.
const DEAD_AT_ONCE: i32 = 1_000;
/// Between rounds over all partitions.
const ROUND: Duration = Duration::from_mins(5);

/// Dedup keys that are forgotten in one transaction.
const KEYS_AT_ONCE: i32 = 10_000;

/// Looks after the nodes of a cluster until it is shut down. Each has its own beat: neither one
/// that hangs nor one whose round takes long keeps the others waiting.
pub(crate) async fn run(nodes: Arc<Nodes>, shutdown: CancellationToken) {
    let holder = Uuid::new_v4();
    let mut kept: BTreeSet<NodeId> = BTreeSet::new();
    let mut keepers = FuturesUnordered::new();
    loop {
        for node in nodes.known() {
            if kept.insert(node) {
                keepers.push(Keeper::new(Arc::clone(&nodes), node, holder).run());
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
    pace: Pace,
    locks: Locks,
    /// How often the node's pool had been used when the last beat was over.
    uses: u64,
    /// Until when the lease may be ours.
    until: watch::Sender<Instant>,
}

impl Keeper {
    fn new(nodes: Arc<Nodes>, node: NodeId, holder: Uuid) -> Self {
        let (pace, locks) = (Pace::new(BEAT, LONGEST), Locks::default());
        let until = watch::Sender::new(Instant::now());
        Self { nodes, node, holder, due: None, pace, locks, uses: 0, until }
    }

    /// Until the node is not known any more; returns its number.
    async fn run(mut self) -> NodeId {
        let (nodes, node, until) = (Arc::clone(&self.nodes), self.node, self.until.subscribe());
        tokio::select! {
            () = self.beats() => {}
            () = primaries::watch(&nodes, node, until) => {}
        }
        node
    }

    async fn beats(&mut self) {
        while self.nodes.known().contains(&self.node) {
            let next = self.beat().await;
            sleep(jitter(next)).await;
        }
    }

    /// Returns when the next beat is due.
    async fn beat(&mut self) -> Duration {
        let beat = self.try_beat().await.unwrap_or_else(|error| {
            self.due = None;
            tracing::debug!(node = %self.node, error = %error.chain(), "upkeep failed");
            Beat::Failed
        });
        self.pace.after(beat)
    }

    async fn try_beat(&mut self) -> Result<Beat> {
        let what = format!("look after node {}", self.node);
        let pool = self.nodes.node(self.node).await?;
        let is_used = pool.uses() != self.uses;
        let connection = pool.get_for_a_lease().await?;
        let kept = upkeep::keep_up(connection, self.holder, LEASE.as_secs_f64()).await;
        let kept = kept.map_err(|error| refused(error, &what))?;
        if let Upkeep::Anothers { sessions } = kept {
            self.until.send_replace(Instant::now());
            self.due = None;
            if !is_used {
                // Nobody else of this process has a use for it.
                pool.close_idle(Duration::ZERO);
            }
            self.uses = pool.uses();
            return Ok(Beat::Anothers { is_used, sessions });
        }
        let now = Instant::now();
        self.until.send_replace(now + LEASE);
        self.look_for_locks(&pool).await;
        if self.due.is_none_or(|due| now >= due) {
            let contended = round(&self.nodes, self.node, SystemTime::now).await?;
            self.due = Some(now + if contended { CONTENDED } else { ROUND });
        }
        self.uses = pool.uses();
        Ok(Beat::Ours)
    }
}

impl Keeper {
    /// What this fails at is looked at with the next beat.
    async fn look_for_locks(&mut self, pool: &Node) {
        let looked = async {
            let what = "look who holds locks";
            let holders = upkeep::lock_holders(&pool.get_for_a_lease().await?).await;
            holders.map_err(|error| refused(error, what))
        };
        match looked.await {
            Ok(holders) => self.locks.tell(self.node, holders),
            Err(error) => {
                tracing::debug!(node = %self.node, error = %error.chain(), "locks are not looked at");
            }
        }
    }
}

/// One round over all partitions of a node, by its clock and this one. True: a table could not be
/// dropped yet.
pub(crate) async fn round(
    nodes: &Nodes,
    node: NodeId,
    clock: impl Fn() -> SystemTime,
) -> Result<bool> {
    let what = format!("look after node {node}");
    let pool = nodes.node(node).await?;
    let partitions =
        upkeep::partitions(&pool.get().await?).await.map_err(|error| refused(error, &what))?;
    let mut contended = false;
    for (partition, in_use) in partitions {
        match keep(nodes, partition, in_use, &clock).await {
            Ok(later) => contended |= later,
            // The others go on.
            Err(error) => tracing::warn!(%partition, error = %error.chain(), "upkeep failed"),
        }
    }
    let open = upkeep::open_functions(&pool.get().await?).await;
    let open = open.map_err(|error| refused(error, &what))?;
    if open > 0 {
        tracing::warn!(
            %node, functions = open, alert = "rights",
            "everybody may execute functions of the schema, as after a restore without privileges: run \
             `shardmq migrate`"
        );
    }
    sweep_broadcasts(nodes, &pool, clock()).await;
    forget_keys(&pool, &what, &clock).await?;
    freeze(&pool, &what).await?;
    Ok(contended)
}

/// Removes the groups of broadcast consumers that have died. One that lives and can't reach this
/// node is known to the control database; where that does not answer, none is removed.
async fn sweep_broadcasts(nodes: &Nodes, pool: &Node, clock: SystemTime) {
    let swept = async {
        let what = "remove the groups of broadcast consumers that are gone";
        let live = control::live_broadcasts(&nodes.control().get().await?).await;
        let live = live.map_err(|error| refused(error, what))?;
        let swept = group::sweep_broadcasts(pool.get().await?, clock, &live).await;
        swept.map_err(|error| refused(error, what))
    };
    if let Err(error) = swept.await {
        tracing::warn!(error = %error.chain(), "upkeep failed");
    }
}

/// Freezes the tables of closed days, over one connection outside of the pool.
async fn freeze(pool: &Node, what: &str) -> Result<()> {
    let days = upkeep::unfrozen_days(&pool.get().await?).await;
    let days = days.map_err(|error| refused(error, what))?;
    if days.is_empty() {
        return Ok(());
    }
    let single = pool.single().await?;
    for (partition, day) in days {
        let frozen = upkeep::freeze_day(&single, partition, day).await;
        let frozen =
            frozen.map_err(|error| refused(error, &format!("freeze day {day} of {partition}")))?;
        if frozen {
            let noted = upkeep::day_frozen(pool.get().await?, partition, day).await;
            noted.map_err(|error| refused(error, what))?;
        }
    }
    Ok(())
}

/// Forgets dedup keys that are older than their window, a part at a time: appends need the
/// connection.
async fn forget_keys(pool: &Node, what: &str, clock: impl Fn() -> SystemTime) -> Result<()> {
    loop {
        let pruned = upkeep::prune_sent_keys(pool.get().await?, KEYS_AT_ONCE, clock()).await;
        if pruned.map_err(|error| refused(error, what))? < i64::from(KEYS_AT_ONCE) {
            return Ok(());
        }
    }
}

async fn keep(
    nodes: &Nodes,
    partition: PartitionId,
    in_use: bool,
    clock: impl Fn() -> SystemTime,
) -> Result<bool> {
    if in_use {
        let connection = nodes.node(partition.node()).await?.get().await?;
        make_days_ahead(connection, partition, DAYS_AHEAD).await?;
    }
    expire_dead_letters(nodes, partition, clock()).await?;
    expire(nodes, partition, clock()).await
}

/// Drops the dead letters of a partition whose time is over.
async fn expire_dead_letters(
    nodes: &Nodes,
    partition: PartitionId,
    clock: SystemTime,
) -> Result<()> {
    let pool = nodes.node(partition.node()).await?;
    let mut all = 0;
    loop {
        let connection = pool.get().await?;
        let expired = upkeep::expire_dead_letters(connection, partition, DEAD_AT_ONCE, clock).await;
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
async fn expire(nodes: &Nodes, partition: PartitionId, clock: SystemTime) -> Result<bool> {
    let what = format!("drop old days of partition {partition}");
    let pool = nodes.node(partition.node()).await?;
    loop {
        let expired = upkeep::expire_day(pool.get().await?, partition, clock)
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
            Expired::Clock(day) => {
                tracing::error!(
                    %partition, %day, alert = "clock",
                    "a day's time is over by the server's clock, which is more than an hour ahead of this \
                     machine's: it is kept until both agree. Set the clocks right"
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
