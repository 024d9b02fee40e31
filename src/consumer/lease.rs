//! A member's lease on its node, and what it takes and gives up under it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use crate::cluster::Place;
use crate::consumer::Event;
use crate::consumer::holding::Holding;
use crate::consumer::member::{Member, STATEMENT};
use crate::consumer::reader::keep_reading;
use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::fetch::is_of_a_table;
use crate::store::group::{self, Fence, Taker};

/// After how many leases all that a former process had is this one's, or others'.
const TAKEN_OVER: u32 = 2;
/// How long a member must have kept its own lease before it takes an ended one of another's. After
/// a restart of the server all leases may be over and all members well: each has renewed by then.
const GRACE: Duration = Duration::from_secs(3);

impl Member {
    pub(super) async fn renew(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let connection = shared.connection(self.node).await?;
        let asked = Instant::now();
        let lease = shared.options.lease;
        let secs = lease.as_secs_f64();
        let session = shared.cluster.inner.nodes.presence().session(Place::Node(self.node));
        let renewed = group::renew(
            connection,
            (shared.member, shared.turn()),
            &shared.group,
            secs,
            self.incarnation,
            session,
            self.parked.since(),
        )
        .await
        .map_err(|error| refused(error, &format!("renew the lease on node {}", self.node)))?;
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
        self.expiry.put_off(asked + lease);
        self.parked.expect(renewed.parked_secs);
        self.reconcile(renewed.owned).await?;
        // Not since the start: the node may have been away, and nothing taken there as yet.
        if let Some(journal) = &shared.journal
            && self.kept_since.is_some_and(|since| since.elapsed() > lease * TAKEN_OVER)
        {
            journal.retire_old(self.node);
        }
        Ok(())
    }

    /// Another server answers: nothing is renewed until every partition was looked at there.
    fn meet(&mut self, incarnation: SystemTime) {
        for holding in self.holdings.values().filter(|h| h.incarnation() != incarnation) {
            holding.compare();
        }
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
                Some(fence) if fence == holding.fence => holding.renew(),
                Some(fence) if fence.owner == holding.fence.owner => {
                    self.lose(&holding, ErrorKind::Reset).await;
                }
                _ => self.lose(&holding, ErrorKind::LeaseLost).await,
            }
        }
        // Taken, or not released, in a statement whose answer was lost, or rolled back to an
        // earlier acquisition of this member: nobody else would take them for as long as this
        // member lives.
        let strays: Vec<_> =
            owned.into_iter().map(|(partition, fence)| (partition, fence.owner)).collect();
        self.release_owned(&strays).await
    }

    /// Takes what is wanted and free, and gives up what is no longer wanted.
    pub(super) async fn balance(&mut self) -> Result<()> {
        let wanted = self.wanted();
        self.give_up_others(&wanted);
        if self.renewed.is_none_or(|at| at.elapsed() > self.shared.options.lease) {
            self.renew().await?;
        }
        let lacking: Vec<i32> = wanted
            .into_iter()
            .filter(|partition| !self.holdings.contains_key(partition))
            .map(PartitionId::as_i32)
            .collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let acquired = self.acquire(&lacking).await?;
        if !acquired.is_empty() {
            // Something may be parked there.
            self.parked.look_at_all();
        }
        for acquired in acquired {
            self.begin(acquired).await;
        }
        Ok(())
    }

    /// Makes cursors one by one. One whose table can't be read is left out, and lacks until then.
    async fn make_each_cursor(&self, error: &Failed) -> Result<()> {
        let (topic, group) = (self.shared.topology.identity(), &self.shared.group);
        tracing::debug!(node = %self.node, error = %crate::error::chain(error), "cursors are made one by one");
        for partition in &self.partitions {
            let connection = self.shared.connection(self.node).await?;
            match group::make_cursors(connection, topic, group, Some(*partition)).await {
                Err(error) if !is_of_a_table(&error) => {
                    return Err(refused(error, &format!("take partition {partition}")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn acquire(&mut self, lacking: &[i32]) -> Result<Vec<group::Acquired>> {
        let shared = Arc::clone(&self.shared);
        let what = format!("take partitions on node {}", self.node);
        if !self.started {
            shared.start.tell(&shared.cluster, &shared.topology, &shared.group, self.node).await?;
            self.started = true;
        }
        let connection = shared.connection(self.node).await?;
        let identity = shared.topology.identity();
        match group::make_cursors(connection, identity, &shared.group, None).await {
            Err(error) if is_of_a_table(&error) => self.make_each_cursor(&error).await?,
            made => made.map_err(|error| refused(error, &what))?,
        }
        if let Some(journal) = &shared.journal {
            journal.begin(self.node);
        }
        let gone = shared.dead();
        let taker = Taker {
            member: shared.member,
            lease_secs: shared.options.lease.as_secs_f64(),
            ended_too: self.kept_since.is_some_and(|since| since.elapsed() >= GRACE),
            gone: &gone,
            dead: shared.journal.as_ref().map_or(&[], |journal| journal.former()),
        };
        let connection = shared.connection(self.node).await?;
        let acquired =
            group::acquire(connection, (shared.topology.id, &shared.group), &taker, lacking)
                .await
                .map_err(|error| refused(error, &what))?;
        // Nothing may be free, or the node may have forgotten the group: it is told again.
        self.started = !acquired.is_empty();
        if acquired.is_empty() {
            self.look_for_lost(lacking).await?;
        }
        Ok(acquired)
    }

    /// Starts to read a partition that was taken.
    async fn begin(&mut self, acquired: group::Acquired) {
        let partition = acquired.partition;
        // Lost, free and taken again, all since the last renewal.
        if let Some(before) = self.holdings.get(&partition).cloned() {
            self.lose(&before, ErrorKind::LeaseLost).await;
        }
        let holding = Arc::new(self.shared.holding(acquired));
        if self.expiry.is_over() {
            holding.lapse();
        }
        self.shared.hold(&holding);
        let reader = keep_reading(Arc::clone(&self.shared), Arc::clone(&holding));
        self.shared.cluster.inner.tasks.spawn(reader);
        ::metrics::counter!(names::ACQUIRED).increment(1);
        tracing::info!(%partition, group = %self.shared.group, "partition taken");
        self.holdings.insert(partition, holding);
    }

    /// Gives up what is another's by now, once its deliveries are answered.
    fn give_up_others(&mut self, wanted: &BTreeSet<PartitionId>) {
        let until = Instant::now() + self.shared.options.drain_timeout;
        let others =
            self.holdings.values().filter(|h| h.is_held() && !wanted.contains(&h.partition));
        let others: Vec<_> = others.cloned().collect();
        for holding in others {
            self.give_up(holding, until);
        }
    }

    /// Nothing more of it is handed out; it is given back when all is answered, or at the deadline.
    pub(super) fn give_up(&mut self, holding: Arc<Holding>, until: Instant) {
        holding.drain();
        self.draining.spawn(async move {
            let _ = timeout_at(until, holding.drained()).await;
            holding
        });
    }

    /// The server lacks what a reader has read: what was not committed is void, and the partition
    /// is taken again, under a new epoch, from the committed cursor.
    pub(super) async fn lose_tail(&mut self, partition: PartitionId, owner: Uuid) {
        let held = self.holdings.get(&partition).filter(|holding| holding.fence.owner == owner);
        let Some(holding) = held.cloned() else { return };
        let what = format!(
            "partition {partition}: the server lacks messages that were read: a failover lost the end \
             of the log; reading goes on from the committed cursor, and effects of lost messages may \
             exist"
        );
        tracing::error!(alert = "lost_tail", "{what}");
        let news = Error::of_lost_tail(partition, what);
        self.end_holding(&holding, ErrorKind::LeaseLost, news);
        // The lease that was renewed last may be among what was lost.
        self.renewed = None;
        self.let_go(partition, owner).await;
    }

    /// A partition is taken anew, from the committed cursor.
    pub(super) async fn begin_anew(&mut self, partition: PartitionId, owner: Uuid) {
        let held = self.holdings.get(&partition).filter(|holding| holding.fence.owner == owner);
        let Some(holding) = held.cloned() else { return };
        let what =
            format!("partition {partition} is read anew: something of it failed before the run");
        self.end_holding(&holding, ErrorKind::LeaseLost, Error::new(ErrorKind::LeaseLost, what));
        self.let_go(partition, owner).await;
    }

    async fn let_go(&mut self, partition: PartitionId, owner: Uuid) {
        let released = timeout(STATEMENT, self.release_owned(&[(partition, owner)])).await;
        if let Ok(Err(error)) = released {
            // The next renewal finds it.
            tracing::debug!(error = %error.chain(), "release of what is taken anew");
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
        // Where the group starts may be lost too: it was deleted, or the end of the log is gone.
        self.started = false;
        if holding.is_pending() {
            self.shared.note_uncommitted(holding.refusal(why), holding);
        }
        ::metrics::counter!(names::LEASE_LOST).increment(1);
        self.shared.send(Event::Error(news));
        self.forget(holding);
    }

    /// Holds it no longer.
    pub(super) fn forget(&mut self, holding: &Arc<Holding>) {
        self.lacks = true;
        let is_it = |known: Option<&Arc<Holding>>| known.is_some_and(|k| Arc::ptr_eq(k, holding));
        if is_it(self.holdings.get(&holding.partition)) {
            self.holdings.remove(&holding.partition);
        }
        let mut all = self.shared.holdings();
        if is_it(all.get(&holding.partition)) {
            all.remove(&holding.partition);
        }
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
        group::release(connection, &self.shared.group, owned).await.map_err(|error| {
            refused(error, &format!("release partitions on node {}", self.node))
        })?;
        // Whoever should have them waits for that.
        let free: Vec<_> = owned.iter().map(|(partition, _)| *partition).collect();
        self.shared.cluster.inner.notifier.publish(&free);
        Ok(())
    }
}
