//! A member's lease on its node, and what it takes and gives up under it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::consumer::Event;
use crate::consumer::commit::AGAIN;
use crate::consumer::holding::Holding;
use crate::consumer::member::{Member, STATEMENT};
use crate::consumer::reader::read;
use crate::consumer::seat::Seat;
use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::group::{self, Fence};

/// How long a partition that is given up may be in hand.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a member must have kept its own lease before it takes an ended one of another's. After a
/// restart of the server all leases may be over and all members well: each has renewed by then.
const GRACE: Duration = Duration::from_secs(3);

impl Member {
    pub(super) async fn renew(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let connection = shared.connection(self.node).await?;
        let asked = Instant::now();
        let lease = shared.options.lease;
        let secs = lease.as_secs_f64();
        let renewed =
            group::renew(connection, shared.member, &shared.group, secs, self.incarnation)
                .await
                .map_err(|error| {
                    refused(error, &format!("renew the lease on node {}", self.node))
                })?;
        self.other_server = !renewed.same_server;
        if self.other_server {
            self.meet(renewed.incarnation);
            return Ok(());
        }
        self.incarnation = Some(renewed.incarnation);
        // Longer than between two renewals: the node may have been away from everybody.
        if self.renewed.is_none_or(|at| asked - at > lease / 2) {
            self.kept_since = Some(asked);
        }
        self.renewed = Some(asked);
        self.reconcile(renewed.owned).await
    }

    /// Another server answers: nothing is renewed until every partition was looked at there.
    fn meet(&mut self, incarnation: SystemTime) {
        self.wake_all();
        let mut held = self.holdings.values().filter(|holding| holding.is_held());
        if held.all(|holding| holding.incarnation() == incarnation) {
            self.incarnation = Some(incarnation);
        }
    }

    /// Compares what is this member's by the node's account with what is held here.
    async fn reconcile(&mut self, owned: Vec<(PartitionId, Fence)>) -> Result<()> {
        let mut owned: HashMap<_, _> = owned.into_iter().collect();
        let holdings: Vec<_> = self.holdings.values().cloned().collect();
        for holding in holdings {
            match owned.remove(&holding.partition) {
                Some(fence) if fence == holding.fence => {}
                Some(fence) if fence.owner == holding.fence.owner => {
                    self.lose(&holding, ErrorKind::Reset).await;
                }
                _ => self.lose(&holding, ErrorKind::LeaseLost).await,
            }
        }
        // Taken, or not released, in a statement whose answer was lost, or rolled back to an earlier
        // acquisition of this member: nobody else would take them for
        // as long as this member lives.
        let strays: Vec<_> =
            owned.into_iter().map(|(partition, fence)| (partition, fence.owner)).collect();
        self.release_owned(&strays).await
    }

    /// Takes free partitions up to the even share, or gives up what is above it.
    pub(super) async fn balance(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let share = shared.share.load(Ordering::Acquire);
        self.give_up_above(share);
        if self.renewed.is_none_or(|at| at.elapsed() > shared.options.lease) {
            self.renew().await?;
        }
        let free_here = self.partitions.len().saturating_sub(self.holdings.len());
        let seats = shared.seats.take(share, free_here);
        if seats.is_empty() {
            return Ok(());
        }
        let acquired = self.acquire(seats.len()).await?;
        for (acquired, seat) in acquired.into_iter().zip(seats) {
            self.begin(acquired, seat).await;
        }
        Ok(())
    }

    async fn acquire(&mut self, most: usize) -> Result<Vec<group::Acquired>> {
        let shared = &self.shared;
        let names = (&shared.topology.topic, &shared.group);
        let what = format!("take partitions on node {}", self.node);
        if !self.started {
            shared.start.tell(&shared.cluster, &shared.topology, &shared.group, self.node).await?;
            self.started = true;
        }
        let connection = shared.connection(self.node).await?;
        group::make_cursors(connection, names.0, names.1)
            .await
            .map_err(|error| refused(error, &what))?;
        let ended_too = self.kept_since.is_some_and(|since| since.elapsed() >= GRACE);
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let connection = shared.connection(self.node).await?;
        group::acquire(connection, names, shared.member, most, ended_too, &self.partitions)
            .await
            .map_err(|error| refused(error, &what))
    }

    /// Starts to read a partition that was taken.
    async fn begin(&mut self, acquired: group::Acquired, seat: Seat) {
        let partition = acquired.partition;
        // Lost, free and taken again, all since the last renewal.
        if let Some(before) = self.holdings.get(&partition).cloned() {
            self.lose(&before, ErrorKind::LeaseLost).await;
        }
        let ended = self.shared.cluster.inner.shutdown.child_token();
        let holding = Arc::new(Holding::new(acquired, seat, ended));
        self.shared.cluster.inner.tasks.spawn(read(Arc::clone(&self.shared), Arc::clone(&holding)));
        ::metrics::counter!(names::ACQUIRED).increment(1);
        tracing::info!(%partition, group = %self.shared.group, "partition taken");
        self.holdings.insert(partition, holding);
    }

    /// Gives up partitions above the share, once their deliveries are answered.
    fn give_up_above(&mut self, share: usize) {
        for holding in self.holdings.values() {
            if !holding.drain_above(share) {
                continue;
            }
            let holding = Arc::clone(holding);
            self.draining.spawn(async move {
                let _ = timeout(DRAIN, holding.drained()).await;
                holding
            });
        }
    }

    /// The server lacks what a reader has read: what was not committed is void, and the partition is
    /// taken again, under a new epoch, from the committed cursor.
    pub(super) async fn lose_tail(&mut self, partition: PartitionId, owner: Uuid) {
        let held = self.holdings.get(&partition).filter(|holding| holding.fence.owner == owner);
        let Some(holding) = held.cloned() else { return };
        let what = format!(
            "partition {partition}: the server lacks messages that were read: a failover lost the end \
             of the log; reading goes on from the committed cursor, and effects of lost messages may \
             exist"
        );
        tracing::error!(alert = "lost_tail", "{what}");
        let news = Error::new(ErrorKind::LeaseLost, what);
        self.end_holding(&holding, ErrorKind::LeaseLost, news);
        // The lease that was renewed last may be among what was lost.
        self.renewed = None;
        let released = timeout(STATEMENT, self.release_owned(&[(partition, owner)])).await;
        if let Ok(Err(error)) = released {
            // The next renewal finds it.
            tracing::debug!(error = %error.chain(), "release after a lost tail");
        }
    }

    /// A partition is another's, or was moved by a seek.
    pub(super) async fn lose(&mut self, holding: &Arc<Holding>, why: ErrorKind) {
        self.end_holding(holding, why, holding.refusal(why));
        if why == ErrorKind::Reset {
            // Still this member's: free, to be taken again from the new position.
            let owned = [(holding.partition, holding.fence.owner)];
            if let Err(error) = self.release_owned(&owned).await {
                tracing::debug!(error = %error.chain(), "release after a seek");
            }
        }
    }

    /// Refuses what is acknowledged from now on, and says so.
    fn end_holding(&mut self, holding: &Arc<Holding>, why: ErrorKind, news: Error) {
        holding.end(why);
        if holding.tracker().pending().is_some() {
            self.uncommitted = Some(holding.refusal(why));
        }
        ::metrics::counter!(names::LEASE_LOST).increment(1);
        self.shared.send(Event::Error(news));
        self.holdings.remove(&holding.partition);
    }

    /// Commits and releases a partition that is answered, or that was waited for long enough.
    pub(super) async fn give_back(&mut self, holding: Arc<Holding>) {
        let partition = holding.partition;
        let current = self.holdings.get(&partition);
        if !current.is_some_and(|current| Arc::ptr_eq(current, &holding)) {
            return;
        }
        // What is acknowledged from now on would never be committed.
        holding.end(ErrorKind::LeaseLost);
        let done = timeout(STATEMENT, async {
            while !self.flush(Some(partition)).await? {
                tokio::time::sleep(AGAIN).await;
            }
            self.release(&[Arc::clone(&holding)]).await
        });
        let outcome = done.await.unwrap_or_else(|_| {
            let what = format!("give partition {partition} back: no answer");
            Err(Error::new(ErrorKind::Timeout, what))
        });
        if let Err(error) = &outcome
            && holding.tracker().pending().is_some()
        {
            self.uncommitted = Some(error.clone());
        }
        self.holdings.remove(&partition);
        self.note(outcome);
    }

    pub(super) async fn release(&self, holdings: &[Arc<Holding>]) -> Result<()> {
        let owned: Vec<_> =
            holdings.iter().map(|holding| (holding.partition, holding.fence.owner)).collect();
        self.release_owned(&owned).await
    }

    async fn release_owned(&self, owned: &[(PartitionId, Uuid)]) -> Result<()> {
        if owned.is_empty() {
            return Ok(());
        }
        let connection = self.shared.connection(self.node).await?;
        group::release(connection, &self.shared.group, owned)
            .await
            .map_err(|error| refused(error, &format!("release partitions on node {}", self.node)))
    }
}
