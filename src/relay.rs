//! Moves what was published in transactions from outboxes into the log, and delayed messages when
//! they are due: in any process that produces or consumes, in one at a time for each database.
//!
//! ```text
//! publish ─> outbox ──┐                        ┌─> node 01
//!                     ├─> frozen as batches ───┼─> node 02   each under an identity of its own,
//! deliver ─> delayed ─┘   (one transaction)    └─> ..        repeated until it is there
//! ```
//!
//! A lease in a row of the database says who relays: renewed every 2 s, over after 6. What is right
//! does not rest on it: a step that takes messages out has a lock, and finds that the lease is its
//! own; what is frozen may be appended by anybody, any number of times.
//!
//! [`seen`] says why no transaction that stays open delays another, [`holder`] what happens in
//! which order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::{Cache, ListenAt, Nodes};
use crate::deadline::{in_time, jitter};
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::metrics as names;
use crate::notifier::Notifier;
use crate::pace::{Beat, Pace};
use crate::store::connect::refused;
use crate::store::node::{Connection, Node, PoolOptions};
use crate::store::outbox::{self, Keep, Standing};
use crate::store::timeline::Newest;
use crate::store::{connect, control};
use crate::supervise::supervised;
use crate::trouble::Trouble;

mod deliver;
mod due;
mod holder;
mod lanes;
mod listen;
mod prune;
mod routes;
mod seen;
mod tasks;

/// How long a lease lasts.
const LEASE: Duration = Duration::from_secs(6);
/// Between attempts to take it.
const TRY: Duration = Duration::from_secs(5);
/// The same, where this process has no use for the node.
const TRY_SELDOM: Duration = Duration::from_mins(1);
/// Before it is tried again after a failure.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The same, where there is no outbox, or only another cluster's.
const NOT_HERE: Duration = Duration::from_mins(1);
/// How often it is looked which databases there are.
const LOOK: Duration = Duration::from_secs(1);
/// How long the control database may take to tell.
const ASK: Duration = Duration::from_secs(5);
/// How often trouble that lasts is told.
const REMIND: Duration = Duration::from_mins(1);
/// Of so many messages that are set aside at once each is told.
const TOLD: usize = 10;
/// So many names are kept: more than there are attempts in the time of a lease.
const MOST_NAMES: usize = 64;
/// How long giving a lease up may take.
const END: Duration = Duration::from_secs(1);

/// Stops the relay at a place that has a name, for tests.
pub(crate) type Failpoint = Arc<dyn Fn(&'static str) -> BoxFuture<'static, ()> + Send + Sync>;

/// What relaying needs of a cluster.
pub(crate) struct Context {
    pub(crate) cluster: Uuid,
    pub(crate) control: Arc<Node>,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) topology: Arc<Cache>,
    pub(crate) notifier: Arc<dyn Notifier>,
    pub(crate) options: PoolOptions,
    /// Databases with an outbox that this process was told of.
    pub(crate) outboxes: Vec<String>,
    pub(crate) failpoint: Option<Failpoint>,
}

/// A database with an outbox.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Node(NodeId),
    Database(String),
}

/// A database from which this process relays, or would.
struct Outlet {
    context: Arc<Context>,
    place: Place,
    /// For logs.
    name: String,
    /// Of a database that is no node.
    pool: Option<Node>,
    holder: Mutex<Names>,
    /// When the lease is over by this process's clock.
    until: Mutex<Instant>,
    /// Held by whoever takes the relay's lock: who has the lease does not find it taken by itself.
    working: tokio::sync::Mutex<()>,
    /// When to ask for the lease again, and how often the database had been used when it was asked
    /// for last.
    asking: Mutex<(Pace, u64)>,
}

/// Under which name the lease is asked for. Each time that it begins anew it is another one, so
/// that nothing of before that is under way yet has a part in what comes.
#[derive(Debug, Clone, Default)]
struct Names {
    current: Uuid,
    /// Those since the lease was last known to be ours: it may have been taken under any of them,
    /// where the answer was lost.
    former: Vec<Uuid>,
}

impl Names {
    fn begin_anew(&mut self) {
        self.former.push(std::mem::replace(&mut self.current, Uuid::new_v4()));
        let old = self.former.len().saturating_sub(MOST_NAMES);
        self.former.drain(..old);
    }
}

/// Relays until the cluster is shut down.
pub(crate) async fn run(context: Arc<Context>, shutdown: CancellationToken) {
    // Tasks of their own: none waits for another, nor for the control database.
    let mut keepers = JoinSet::new();
    let mut kept: BTreeMap<Place, (CancellationToken, AbortHandle)> = BTreeMap::new();
    let (mut registered, mut seen) = (Vec::new(), None);
    loop {
        let told = context.outboxes.iter().chain(&registered).cloned().map(Place::Database);
        let places: Vec<Place> =
            context.nodes.known().into_iter().map(Place::Node).chain(told).collect();
        kept.retain(|place, (token, keeper)| {
            let stays = places.contains(place);
            if !stays {
                token.cancel();
            }
            stays && !keeper.is_finished()
        });
        while keepers.try_join_next().is_some() {}
        for place in places {
            kept.entry(place.clone()).or_insert_with(|| {
                let token = shutdown.child_token();
                let (of, ends) = (Arc::clone(&context), token.clone());
                let keeper = move || keep(Arc::clone(&of), place.clone(), ends.clone());
                let keeper = supervised("relay of a database", token.clone(), keeper, |_| {});
                (token, keepers.spawn(keeper))
            });
        }
        let version = context.topology.revision();
        let asks = seen != Some(version);
        tokio::select! {
            found = outboxes(&context), if asks => match found {
                Ok(found) => (registered, seen) = (found, Some(version)),
                Err(_) => sleep(LOOK).await,
            },
            () = sleep(LOOK), if !asks => {}
            () = shutdown.cancelled() => break,
        }
    }
    while keepers.join_next().await.is_some() {}
}

/// The databases that are registered.
async fn outboxes(context: &Context) -> Result<Vec<String>> {
    let what = "read which databases have an outbox";
    let asking = async {
        let found = control::outboxes(&context.control.get().await?).await;
        found.map_err(|error| refused(error, what))
    };
    in_time(ASK, what, asking).await
}

/// Takes its turn in relaying from a database, until it is told to end.
async fn keep(context: Arc<Context>, place: Place, end: CancellationToken) {
    let outlet = match Outlet::new(context, place) {
        Ok(outlet) => Arc::new(outlet),
        Err(error) => {
            tracing::error!(error = %error.chain(), "an outbox is not relayed from");
            return end.cancelled().await;
        }
    };
    let turns = async {
        let (mut trouble, mut backoff) = (Trouble::new(REMIND), AGAIN.0);
        loop {
            let began = Instant::now();
            let pause = match outlet.turn().await {
                Ok(pause) => {
                    backoff = AGAIN.0;
                    if trouble.end() {
                        tracing::info!(outbox = outlet.name, "relaying goes on");
                    }
                    pause
                }
                Err(error) if error.kind() == ErrorKind::Incompatible => {
                    outlet.has_none(&error);
                    NOT_HERE
                }
                Err(error) => {
                    if trouble.meet(Instant::now()) {
                        tracing::warn!(
                            outbox = outlet.name, error = %error.chain(),
                            "relaying from an outbox failed, again soon"
                        );
                    }
                    // A failure after a while of work has nothing to do with those before it.
                    let worked = began.elapsed() > AGAIN.1;
                    backoff = if worked { AGAIN.0 } else { (backoff * 2).min(AGAIN.1) };
                    backoff
                }
            };
            sleep(jitter(pause)).await;
        }
    };
    tokio::select! {
        () = turns => {}
        () = end.cancelled() => {}
    }
    outlet.end().await;
}

impl Outlet {
    fn new(context: Arc<Context>, place: Place) -> Result<Self> {
        let (name, pool) = match &place {
            Place::Node(node) => (format!("node {node}"), None),
            Place::Database(url) => {
                let name = connect::describe(&connect::parse(url)?.config);
                (name, Some(Node::outbox(url, context.options)?))
            }
        };
        let until = Mutex::new(Instant::now());
        let (holder, working) = (Mutex::default(), tokio::sync::Mutex::default());
        let asking = Mutex::new((Pace::new(TRY, TRY_SELDOM), 0));
        Ok(Self { context, place, name, pool, holder, until, working, asking })
    }

    /// Asks for the lease, and relays while it has it. Returns how long to wait before the next
    /// time.
    async fn turn(self: &Arc<Self>) -> Result<Duration> {
        let began = Instant::now();
        self.names().begin_anew();
        let connection = match self.node().await? {
            Some(node) => node.get_for_a_lease().await?,
            None => self.get().await?,
        };
        let standing = outbox::keep(connection, &self.keep()).await;
        match standing.map_err(|error| refused(error, &format!("relay from {}", self.name)))? {
            Standing::Anothers => Ok(self.again(self.node().await?.as_deref())),
            Standing::OtherCluster => {
                tracing::error!(outbox = self.name, "the outbox is another cluster's");
                Ok(NOT_HERE)
            }
            Standing::Ours => {
                self.renew(began);
                holder::hold(self).await.map(|()| TRY)
            }
        }
    }

    /// Gives the lease up, so that another need not wait for its end.
    async fn end(&self) {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if until <= Instant::now() {
            return;
        }
        let ending = async {
            if let Ok(connection) = self.get().await {
                let _ = outbox::end(connection, self.holder()).await;
            }
        };
        let _ = timeout(END, ending).await;
    }

    /// When to ask again for a lease that another process holds.
    fn again(&self, node: Option<&Node>) -> Duration {
        let uses = node.map_or(0, Node::uses);
        let (pace, before) = &mut *self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let is_used = std::mem::replace(before, uses) != uses;
        if let Some(node) = node.filter(|_| !is_used) {
            node.close_idle(Duration::ZERO);
        }
        pace.after(Beat::Anothers { is_used, sessions: 0 })
    }

    async fn node(&self) -> Result<Option<Arc<Node>>> {
        match &self.place {
            Place::Node(node) => self.context.nodes.node(*node).await.map(Some),
            Place::Database(_) => Ok(None),
        }
    }

    async fn get(&self) -> Result<Connection> {
        match (&self.pool, &self.place) {
            (Some(pool), _) => pool.get().await,
            (None, Place::Node(node)) => self.context.nodes.node(*node).await?.get().await,
            (None, Place::Database(_)) => Err(Error::closed("the outbox")),
        }
    }

    /// Where to listen, whether no pooler need be looked for there, and which the newest primary
    /// is.
    async fn listen_at(&self) -> Result<(String, bool, Arc<Newest>)> {
        match &self.place {
            Place::Database(url) => {
                let newest = self.pool.as_ref().map(|pool| Arc::clone(pool.newest()));
                Ok((url.clone(), false, newest.unwrap_or_default()))
            }
            Place::Node(node) => {
                let (at, node) = self.context.nodes.listen_at(*node).await?;
                let newest = Arc::clone(node.newest());
                Ok(match at {
                    ListenAt::Node(url) => (url, false, newest),
                    ListenAt::Given(url) => (url, true, newest),
                })
            }
        }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holder(&self) -> Uuid {
        self.names().current
    }

    fn keep(&self) -> Keep {
        let Names { current, former } = self.names().clone();
        let lease_secs = LEASE.as_secs_f64();
        Keep { holder: current, former, cluster: self.context.cluster, lease_secs }
    }

    /// The lease was asked for at this time, and is ours.
    fn renew(&self, asked: Instant) {
        self.names().former.clear();
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = asked + LEASE;
    }

    /// Whether the lease is ours, as far as is known here.
    fn is_ours(&self) -> bool {
        Instant::now() < *self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no outbox. A node may not be migrated yet; any other database was named for having
    /// one.
    fn has_none(&self, error: &Error) {
        let error = error.chain();
        match self.place {
            Place::Node(_) => tracing::debug!(outbox = self.name, error, "no outbox"),
            Place::Database(_) => tracing::warn!(
                outbox = self.name,
                error,
                "a database that is to be relayed from has no outbox, or none that fits"
            ),
        }
    }

    /// Messages were set aside, each with its topic and why. Of many some are told, and how many
    /// there were.
    fn buried(&self, messages: &[(Option<String>, String)]) {
        ::metrics::counter!(names::OUTBOX_DEAD).increment(messages.len() as u64);
        for (topic, why) in messages.iter().take(TOLD) {
            tracing::warn!(
                outbox = self.name,
                topic = topic.as_deref().unwrap_or_default(),
                error = why,
                alert = "outbox",
                "a published message is set aside: no partition takes it"
            );
        }
        if messages.len() > TOLD {
            let count = messages.len() - TOLD;
            let outbox = &self.name;
            tracing::warn!(
                outbox,
                count,
                alert = "outbox",
                "more published messages are set aside"
            );
        }
    }

    async fn failpoint(&self, name: &'static str) {
        if let Some(hook) = &self.context.failpoint {
            hook(name).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_kept_under_that_the_lease_may_have_been_taken() {
        let mut names = Names::default();
        let mut all = Vec::new();
        for _ in 0..MOST_NAMES + 3 {
            names.begin_anew();
            all.push(names.current);
            assert!(!names.former.contains(&names.current));
        }
        let last = all.pop();
        assert_eq!(Some(names.current), last);
        assert_eq!(names.former, all[all.len() - MOST_NAMES..]);
    }
}
