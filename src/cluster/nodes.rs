//! The nodes that a process knows, kept up with the control database.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::sleep;
use uuid::Uuid;

use crate::cluster::presence::Presence;
use crate::cluster::stuck::Stuck;
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::store::connect::refused;
use crate::store::control::{self, Listed};
use crate::store::node::{Connection, Node, PoolOptions, Unfinished};
use crate::store::timeline::{Newest, Primary};
use crate::topology::{Relation, Version};

/// How long the control database may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// Closes connections that are idle for so long, or half as long again, until it is dropped.
pub(super) async fn close_idle(nodes: Arc<Nodes>, idle: Duration) {
    loop {
        sleep(idle / 2).await;
        nodes.close_idle(idle);
    }
}

/// Where to listen to a node.
pub(crate) enum ListenAt {
    /// At its own address, which may lead to a pooler.
    Node(String),
    /// At an address that was given for listening.
    Given(String),
}

/// The nodes that this process knows, with their pools.
pub(crate) struct Nodes {
    cluster: Uuid,
    pools: PoolOptions,
    listen_urls: HashMap<NodeId, String>,
    control: Arc<Node>,
    known: Mutex<BTreeMap<NodeId, (Listed, Arc<Node>)>>,
    /// The version of the topology that `known` is of, or an earlier one.
    version: Mutex<Version>,
    /// Some address is another now.
    changed: Notify,
    /// A newer primary of some node was seen.
    seen: Arc<Notify>,
    /// Newer primaries may be listed under the version that is known.
    warned: AtomicBool,
    presence: Arc<Presence>,
    /// Held by whoever of this process looks at a node for messages.
    turns: Mutex<HashMap<NodeId, Arc<tokio::sync::Mutex<()>>>>,
    stuck: Stuck,
}

impl Nodes {
    pub(super) fn new(
        (cluster, version): (Uuid, Version),
        pools: PoolOptions,
        listen_urls: HashMap<NodeId, String>,
        control: Arc<Node>,
        presence: Arc<Presence>,
    ) -> Self {
        let (known, version) = (Mutex::default(), Mutex::new(version));
        let (changed, seen) = (Notify::new(), Arc::default());
        let (turns, stuck) = (Mutex::default(), Stuck::default());
        Self {
            cluster,
            pools,
            listen_urls,
            control,
            known,
            version,
            changed,
            seen,
            warned: AtomicBool::new(false),
            presence,
            turns,
            stuck,
        }
    }

    /// Where this process listens.
    pub(crate) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// A turn to look at a node for messages: one at a time of this process; none while somebody
    /// has it.
    pub(crate) fn turn(&self, id: NodeId) -> Option<OwnedMutexGuard<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(id).or_default()).try_lock_owned().ok()
    }

    /// Partitions whose table can't be read now.
    pub(crate) fn stuck(&self) -> &Stuck {
        &self.stuck
    }

    /// How many data connections each node's pool has.
    pub(crate) fn connections(&self) -> usize {
        self.pools.connections
    }

    /// How a pool of so many connections is made.
    pub(crate) fn options(&self, connections: usize) -> PoolOptions {
        PoolOptions { connections, ..self.pools }
    }

    /// The control database's pool.
    pub(crate) fn control(&self) -> &Node {
        &self.control
    }

    /// A node's pool. Asks the control database where the node is not known yet.
    pub(crate) async fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        self.find(id).await.map(|(_, node)| node)
    }

    /// Returns when this process has seen a newer primary than before.
    pub(super) async fn seen(&self) {
        self.seen.notified().await;
    }

    /// A connection to a node, within a time for a free one and as much for the making of one.
    pub(crate) async fn connect(&self, id: NodeId, limit: Duration) -> Result<Connection> {
        self.node(id).await?.get_within(limit).await
    }

    /// A node's address.
    #[cfg(feature = "bench")]
    pub(crate) async fn url(&self, id: NodeId) -> Result<String> {
        self.find(id).await.map(|(listed, _)| listed.url)
    }

    /// Where to listen to a node, with its pool: at an address that was given for that, or at its
    /// own.
    pub(crate) async fn listen_at(&self, id: NodeId) -> Result<(ListenAt, Arc<Node>)> {
        let (listed, node) = self.find(id).await?;
        Ok(match self.listen_urls.get(&id) {
            Some(url) => (ListenAt::Given(url.clone()), node),
            None => (ListenAt::Node(listed.url), node),
        })
    }

    async fn find(&self, id: NodeId) -> Result<(Listed, Arc<Node>)> {
        if let Some(found) = self.lock().get(&id).cloned() {
            return Ok(found);
        }
        in_time(ANSWER, &format!("look up node {id}"), Box::pin(self.refresh())).await?;
        self.lock()
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("node {id} is not registered")))
    }

    /// The nodes that this process has heard of.
    pub(crate) fn known(&self) -> Vec<NodeId> {
        self.lock().keys().copied().collect()
    }

    /// All nodes, as the control database has them now.
    pub(crate) async fn refresh(&self) -> Result<Vec<(NodeId, String)>> {
        let what = "read the nodes";
        // Before it is asked for: another task may learn of a later version meanwhile.
        let seen = self.version();
        let connection = self.control.get().await?;
        let (_, version) = control::cluster(&connection).await.map_err(|e| refused(e, what))?;
        judge(&version, &seen)?;
        let nodes = control::nodes(&connection).await.map_err(|e| refused(e, what))?;
        self.learn(version, nodes.clone());
        Ok(nodes.into_iter().map(|(id, listed)| (id, listed.url)).collect())
    }

    /// Looks whether the topology has another version, and takes it over. Records what it does not
    /// know.
    pub(super) async fn look(&self) -> Result<()> {
        self.look_at_version().await?;
        if let Err(error) = self.record().await {
            // The next look tries again.
            tracing::debug!(error = %error.chain(), "a newer primary is not recorded");
        }
        Ok(())
    }

    /// Records the newer primaries that this process has seen, so that all other processes leave
    /// the older ones, and no new process connects there.
    async fn record(&self) -> Result<()> {
        let newer = self.newer();
        if newer.is_empty() {
            return Ok(());
        }
        let refused = |error| refused(error, "record a newer primary of a node");
        let change = Unfinished::new(self.control.get().await?);
        control::begin_change(change.connection()).await.map_err(refused)?;
        let mut any = false;
        for (id, registration, primary) in newer {
            let recorded =
                control::record_newer(change.connection(), id, registration, primary).await;
            any |= recorded.map_err(refused)?;
        }
        if any {
            control::commit_change(change.connection()).await.map_err(refused)?;
        } else {
            control::give_change_up(change.connection()).await.map_err(refused)?;
        }
        change.finished();
        self.look_at_version().await
    }

    /// The nodes of which a newer primary was seen than is listed, with their registrations.
    fn newer(&self) -> Vec<(NodeId, Uuid, Primary)> {
        let known = self.lock();
        let newer = known.iter().filter_map(|(id, (listed, node))| {
            let seen = node.newest().known()?;
            let is_newer = listed.primary.is_none_or(|listed| listed.is_older_than(&seen));
            is_newer.then_some((*id, listed.registration, seen))
        });
        newer.collect()
    }

    /// Says on old primaries of the control database which newer ones are known of the nodes. A
    /// process that listens there, or that starts and finds it first, hears of nothing else. False:
    /// again.
    pub(crate) async fn warn(&self) -> bool {
        let Some(newest) = self.control.newest().known() else { return true };
        let known: Vec<_> = {
            let known = self.lock();
            let newest = known.iter().filter_map(|(id, (listed, node))| {
                Some((*id, listed.registration, node.newest().known()?))
            });
            newest.collect()
        };
        let mut all = true;
        for found in self.control.primaries().await {
            if found.primary.is_older_than(&newest) {
                all &= control::warn(&found.client, &known).await.is_ok();
            }
        }
        all
    }

    /// An old primary of the control database may have told of newer ones of nodes.
    pub(super) fn warned(&self) {
        self.warned.store(true, Ordering::Release);
    }

    async fn look_at_version(&self) -> Result<()> {
        let what = "look at the topology";
        let seen = self.version();
        let connection = self.control.get().await?;
        let (cluster, version) =
            control::cluster(&connection).await.map_err(|e| refused(e, what))?;
        if cluster != self.cluster {
            let what = format!("the control database is that of cluster {cluster} now");
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        let is_warned = self.warned.swap(false, Ordering::AcqRel);
        if judge(&version, &seen)? == Relation::Same && !is_warned {
            return Ok(());
        }
        let nodes = control::nodes(&connection).await.map_err(|e| refused(e, what))?;
        self.learn(version, nodes);
        Ok(())
    }

    /// Takes over the addresses of a version of the topology, unless a later one is known. A node
    /// whose address is another, or that was registered anew, gets a new pool; one that is not
    /// there any more is forgotten.
    pub(super) fn learn(&self, version: Version, nodes: Vec<(NodeId, Listed)>) {
        let mut known = self.lock();
        let mut current = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if version.after(&current) == Relation::Earlier {
            return;
        }
        let mut next = BTreeMap::new();
        for (id, listed) in nodes {
            let node = match known.get(&id) {
                Some((before, node)) if is_the_same(before, &listed) => Arc::clone(node),
                _ => Arc::new(self.open(id, &listed)),
            };
            if let Some(primary) = listed.primary {
                node.newest().hear(primary);
            }
            next.insert(id, (listed, node));
        }
        for (id, (_, before)) in known.iter() {
            if next.get(id).is_none_or(|(_, node)| !Arc::ptr_eq(node, before)) {
                before.close();
            }
        }
        *known = next;
        *current = version;
        drop((known, current));
        self.changed.notify_waiters();
    }

    /// A node that can't be used keeps nobody from the others.
    fn open(&self, id: NodeId, listed: &Listed) -> Node {
        let is_beside = self.control.has_the_hosts_of(&listed.url);
        let control = is_beside.then(|| Arc::clone(self.control.newest()));
        let seen = Arc::clone(&self.seen);
        let newest = Arc::new(Newest::of_node(listed.primary, seen, control));
        let opened = Node::known(&listed.url, self.cluster, id, self.pools, newest);
        opened.unwrap_or_else(|error| {
            tracing::error!(
                node = %id, alert = "topology", error = %error.chain(),
                "this build of the library can't use a node's address"
            );
            Node::unusable(id, error)
        })
    }

    /// The version of the topology that is known.
    pub(super) fn version(&self) -> Version {
        self.version.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, with the nodes' addresses.
    pub(super) fn snapshot(&self) -> (Version, BTreeMap<NodeId, Listed>) {
        let known = self.lock();
        let listed = known.iter().map(|(id, (listed, _))| (*id, listed.clone())).collect();
        (self.version(), listed)
    }

    /// Returns when a session on a primary of a node should not be there any more: another pool is
    /// the node's, since it has another address or was registered anew, or a newer primary is
    /// known.
    pub(crate) async fn leaves(&self, id: NodeId, from: &Arc<Node>, primary: Option<Primary>) {
        let replaced = async {
            loop {
                let changed = self.changed.notified();
                let now = self.lock().get(&id).map(|(_, node)| Arc::clone(node));
                if now.is_some_and(|now| !Arc::ptr_eq(&now, from)) {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            () = replaced => {}
            () = from.newest().overtakes(primary) => {}
        }
    }

    /// Closes what is idle for so long, also to the control database.
    fn close_idle(&self, idle: Duration) {
        self.control.close_idle(idle);
        for (_, node) in self.lock().values() {
            node.close_idle(idle);
        }
    }

    pub(super) fn close(&self) {
        for (_, node) in self.lock().values() {
            node.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (Listed, Arc<Node>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the same pool serves a node that is listed so now.
fn is_the_same(before: &Listed, now: &Listed) -> bool {
    (&before.url, before.registration) == (&now.url, now.registration)
}

/// Refuses a version earlier than one that was seen before it was asked for: that of a control
/// database that was restored from a backup, or promoted without its end. What was changed there
/// since is taken over, and the loss is told.
pub(super) fn judge(found: &Version, seen: &Version) -> Result<Relation> {
    let (number, before) = (found.number, seen.number);
    let relation = found.after(seen);
    match relation {
        Relation::Same | Relation::Later => Ok(relation),
        Relation::Branched => {
            tracing::error!(
                alert = "topology",
                "the control database has lost changes of the topology and has been changed since: version \
                 {number} is taken over in the place of {before}; was it restored from a backup?"
            );
            Ok(relation)
        }
        Relation::Earlier => {
            let what = format!(
                "the control database has version {number} of the topology, and {before} was seen before: was \
                 it restored from a backup?"
            );
            Err(Error::new(ErrorKind::Conflict, what))
        }
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}
