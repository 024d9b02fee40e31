//! The nodes that a process knows, kept up with the control database.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
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
use crate::store::control;
use crate::store::node::{Connection, Node, PoolOptions};
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
    known: Mutex<BTreeMap<NodeId, (String, Arc<Node>)>>,
    /// The version of the topology that `known` is of, or an earlier one.
    version: Mutex<Version>,
    /// Some address is another now.
    changed: Notify,
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
        let changed = Notify::new();
        let (turns, stuck) = (Mutex::default(), Stuck::default());
        Self {
            cluster,
            pools,
            listen_urls,
            control,
            known,
            version,
            changed,
            presence,
            turns,
            stuck,
        }
    }

    /// Where this process listens.
    pub(crate) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// A turn to look at a node for messages: one at a time of this process; none while somebody has it.
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

    /// A connection to a node, within a time for a free one and as much for the making of one.
    pub(crate) async fn connect(&self, id: NodeId, limit: Duration) -> Result<Connection> {
        self.node(id).await?.get_within(limit).await
    }

    /// A node's address.
    #[cfg(feature = "bench")]
    pub(crate) async fn url(&self, id: NodeId) -> Result<String> {
        self.find(id).await.map(|(url, _)| url)
    }

    /// Where to listen to a node: at an address that was given for that, or at its own.
    pub(crate) async fn listen_at(&self, id: NodeId) -> Result<ListenAt> {
        if let Some(url) = self.listen_urls.get(&id) {
            return Ok(ListenAt::Given(url.clone()));
        }
        self.find(id).await.map(|(url, _)| ListenAt::Node(url))
    }

    async fn find(&self, id: NodeId) -> Result<(String, Arc<Node>)> {
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
        Ok(nodes)
    }

    /// Looks whether the topology has another version, and takes it over.
    pub(super) async fn look(&self) -> Result<()> {
        let what = "look at the topology";
        let seen = self.version();
        let connection = self.control.get().await?;
        let (cluster, version) =
            control::cluster(&connection).await.map_err(|e| refused(e, what))?;
        if cluster != self.cluster {
            let what = format!("the control database is that of cluster {cluster} now");
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        if judge(&version, &seen)? == Relation::Same {
            return Ok(());
        }
        let nodes = control::nodes(&connection).await.map_err(|e| refused(e, what))?;
        self.learn(version, nodes);
        Ok(())
    }

    /// Takes over the addresses of a version of the topology, unless a later one is known. A node whose
    /// address is another gets a new pool; one that is not there any more is forgotten.
    pub(super) fn learn(&self, version: Version, nodes: Vec<(NodeId, String)>) {
        let mut known = self.lock();
        let mut current = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if version.after(&current) == Relation::Earlier {
            return;
        }
        let mut next = BTreeMap::new();
        for (id, url) in nodes {
            let node = match known.get(&id) {
                Some((before, node)) if *before == url => Arc::clone(node),
                _ => Arc::new(self.open(id, &url)),
            };
            next.insert(id, (url, node));
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
    fn open(&self, id: NodeId, url: &str) -> Node {
        Node::new(url, self.cluster, id, self.pools).unwrap_or_else(|error| {
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
    pub(super) fn snapshot(&self) -> (Version, BTreeMap<NodeId, String>) {
        let known = self.lock();
        let addresses = known.iter().map(|(id, (url, _))| (*id, url.clone())).collect();
        (self.version(), addresses)
    }

    /// Returns when a node has another address to listen at than this one.
    pub(crate) async fn moved(&self, id: NodeId, from: &str) {
        loop {
            let changed = self.changed.notified();
            let given = self.listen_urls.contains_key(&id);
            let at = self.lock().get(&id).map(|(url, _)| url.clone());
            if !given && at.is_some_and(|at| at != from) {
                return;
            }
            changed.await;
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (String, Arc<Node>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses a version earlier than one that was seen before it was asked for: that of a control database that was
/// restored from a backup, or promoted without its end. What was changed there since is taken over, and the loss
/// is told.
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
