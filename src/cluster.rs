//! The way in: a cluster is a control database and the nodes that it knows.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, join};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::consumer::ConsumerBuilder;
use crate::error::Result;
use crate::id::NodeId;
use crate::name::TopicName;
use crate::notifier::{Notifier, NotifierKind};
use crate::producer::ProducerBuilder;
use crate::relay;
use crate::store::connect;
use crate::store::node::{Node, PoolOptions};
use crate::store::pooler::PreparedStatements;
use crate::store::target::Target;
use crate::supervise::supervised;
use crate::topology::Topology;
use crate::upkeep;

mod cache;
mod fate;
mod follow;
mod hints;
mod nodes;
mod presence;
mod stuck;
mod topology_file;

pub(crate) use cache::{Cache, Ended};
#[cfg(feature = "redis")]
pub(crate) use hints::prefix;
use hints::{Means, Told};
pub(crate) use hints::{NOTIFIER, REDIS_URL, listen_url_of};
pub(crate) use nodes::{ListenAt, Nodes};
pub(crate) use presence::{Place, Presence};
pub(crate) use stuck::Stuck;
use topology_file::TopologyFile;

/// A cluster: makes producers and consumers, and looks after topics. Cheap to clone; all clones
/// share their connections, at most three for each node: two for data, and one that listens where
/// something is consumed.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) control: Arc<Node>,
    pub(crate) id: Uuid,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) topology: Arc<Cache>,
    pub(crate) notifier: Arc<dyn Notifier>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    /// Whether this process takes its turn in looking after the nodes already, or never will.
    keeping_up: AtomicBool,
    relay: Arc<relay::Context>,
}

/// Settings of a [`Cluster`].
#[must_use = "a builder does nothing until connect"]
pub struct ClusterBuilder {
    url: String,
    pools: PoolOptions,
    listen_urls: HashMap<NodeId, String>,
    told: Told,
    hint_interval: Duration,
    upkeep: bool,
    outboxes: Vec<String>,
    relay_failpoint: Option<relay::Failpoint>,
    topology_file: Option<PathBuf>,
    look_interval: Duration,
    idle_timeout: Duration,
}

/// Data connections to each node, and to the control database.
const CONNECTIONS: usize = 2;
/// How long a data connection may be idle.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

impl ClusterBuilder {
    /// Data connections to each node, shared by appending and fetching, and opened when first
    /// needed: 2 by default, 1 to 64.
    pub fn connections_per_node(mut self, connections: usize) -> Self {
        self.pools.connections = connections.clamp(1, 64);
        self
    }

    /// How long a data connection may be idle before it is closed, or half as long again: a minute
    /// by default, 100 ms to 1 h. It is opened again when it is needed.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout.clamp(Duration::from_millis(100), Duration::from_hours(1));
        self
    }

    /// Whether statements stay prepared on data connections: by default where an address leads to
    /// Postgres itself, which is found out. Through a pooler they do not, so that PgBouncer in
    /// transaction mode will do, of any version.
    pub fn prepared_statements(mut self, setting: PreparedStatements) -> Self {
        self.pools.prepared_statements = setting;
        self
    }

    /// Where to listen for a node's hints: at the node's own address by default. To be called for
    /// each node whose address leads to a pooler in transaction mode, since `LISTEN` needs a
    /// session. The URL must lead to the same database, through Postgres itself or a pooler in
    /// session mode. The cluster may say so for all processes ([`Cluster::set_listen_url`]).
    /// Without it consumers of such a node hear no hints, and find messages by looking.
    pub fn listen_url(mut self, node: NodeId, url: &str) -> Self {
        self.listen_urls.insert(node, url.to_owned());
        self
    }

    /// Whether this process takes its turn in looking after the nodes, where it produces or
    /// consumes: day tables ahead, retention. It does by default; some process must.
    pub fn upkeep(mut self, upkeep: bool) -> Self {
        self.upkeep = upkeep;
        self
    }

    /// A database with an outbox that is no node, to be relayed from by this process too, where it
    /// produces or consumes and takes part in [`upkeep`](Self::upkeep). Its schema must be there
    /// (`shardmq migrate --outbox URL`, which also tells all processes of it, so that this is not
    /// needed).
    pub fn outbox(mut self, url: &str) -> Self {
        self.outboxes.push(url.to_owned());
        self
    }

    /// Called at each step of the relay, with its name, and waited for: for tests.
    #[doc(hidden)]
    pub fn relay_failpoint(
        mut self,
        hook: impl Fn(&'static str) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        self.relay_failpoint = Some(Arc::new(hook));
        self
    }

    /// Takes a notifier of the caller's own. [`Cluster::shutdown`] shuts it down too.
    pub fn notifier(mut self, notifier: impl Notifier) -> Self {
        self.told.own = Some(Arc::new(notifier));
        self
    }

    /// Which notifier this process has, whatever the environment (`SHARDMQ_NOTIFIER`) or the
    /// cluster ([`Cluster::set_notifier`]) say. Where none of them says, Postgres.
    pub fn notifier_kind(mut self, kind: NotifierKind) -> Self {
        self.told.kind = Some(kind);
        self
    }

    /// How long this process waits between two notifications of a node through `LISTEN/NOTIFY`, at
    /// least: 0 by default, up to 500 ms. What is stored meanwhile goes with the next, and a lone
    /// message does not wait. For nodes on which many processes send one message at a time: each
    /// notification is a transaction, and wakes all that listen.
    pub fn hint_interval(mut self, interval: Duration) -> Self {
        self.hint_interval = interval.min(Duration::from_millis(500));
        self
    }

    /// Where the Redis is through which hints go, whatever the environment (`SHARDMQ_REDIS_URL`) or
    /// the cluster say: see `notifier::RedisNotifier::new`. That says where, and not whether: a
    /// process uses it where its own setting or the cluster's has a notifier that needs one, or
    /// where neither has any, and then both. Needs feature `redis`.
    pub fn redis_url(mut self, url: &str) -> Self {
        self.told.redis_url = Some(url.to_owned());
        self
    }

    /// Keeps the topology in this file too, as JSON: the nodes' addresses (without passwords), and
    /// the topics that are used here. Where the control database can't be reached at the start, the
    /// file is what is known of the cluster, and producing and consuming begin all the same.
    /// Processes may share it. It is replaced as a whole, in its folder, which must be there.
    pub fn topology_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.topology_file = Some(path.into());
        self
    }

    /// How often the control database is asked whether the topology has changed, where no
    /// notification says so: for tests. 10 ms at least.
    #[doc(hidden)]
    pub fn look_interval(mut self, interval: Duration) -> Self {
        self.look_interval = interval.max(Duration::from_millis(10));
        self
    }

    /// Connects to the control database and reads which nodes there are. Nodes are connected when
    /// they are first used. Must be called within a tokio runtime. Cancel safe.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) where the control database can't be reached
    /// and no [topology file](Self::topology_file) was kept before;
    /// [`Invalid`](crate::ErrorKind::Invalid) where the notifier needs a Redis that nobody has
    /// named, or that is no address.
    pub async fn connect(self) -> Result<Cluster> {
        for url in self.listen_urls.values().chain(&self.outboxes) {
            connect::parse(url)?;
        }
        let options = PoolOptions { connections: CONNECTIONS, ..self.pools };
        let control = Arc::new(Node::control(&self.url, options)?);
        let file = self.topology_file.map(TopologyFile::new);
        let address = connect::describe(&connect::parse(&self.url)?.config);
        let start = cache::start(&control, address, file.as_ref()).await?;
        let presence = Arc::new(Presence::new());
        let (known, there) = (Arc::clone(&control), Arc::clone(&presence));
        let known_nodes = start.nodes.keys().copied();
        let listen_urls = hints::listen_urls(self.listen_urls, &start.settings, known_nodes);
        let of = (start.cluster, start.version.clone());
        let nodes = Nodes::new(of, self.pools, listen_urls, known, there);
        nodes.learn(start.version.clone(), start.nodes.clone().into_iter().collect());
        let nodes = Arc::new(nodes);
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        // Where this ends with an error, what was begun ends.
        let begun = shutdown.clone().drop_guard();
        let (id, settings) = (start.cluster, start.settings.clone());
        let (known, there) = (Arc::clone(&control), Arc::clone(&nodes));
        let topology = Arc::new(Cache::new(start, known, there, file, tasks.clone()));
        topology.keep();
        let listen_at = follow::listen_at(&self.url, &presence)?;
        let follow = follower(&topology, listen_at, presence, self.look_interval, &shutdown);
        tasks.spawn(shutdown.child_token().run_until_cancelled_owned(follow));
        let closer = idle_closer(&nodes, self.idle_timeout, &shutdown);
        tasks.spawn(shutdown.child_token().run_until_cancelled_owned(closer));
        let (known, stop) = (Arc::clone(&nodes), shutdown.child_token());
        let (tasks_too, hint_interval) = (tasks.clone(), self.hint_interval);
        let means =
            Means { cluster: id, nodes: known, shutdown: stop, tasks: tasks_too, hint_interval };
        let notifier = self.told.make(&settings, means)?;
        let relay = Arc::new(relay::Context {
            cluster: id,
            control: Arc::clone(&control),
            nodes: Arc::clone(&nodes),
            topology: Arc::clone(&topology),
            notifier: Arc::clone(&notifier),
            options,
            outboxes: self.outboxes,
            failpoint: self.relay_failpoint,
        });
        let inner = Inner {
            relay,
            keeping_up: AtomicBool::new(!self.upkeep),
            control,
            id,
            nodes,
            topology,
            notifier,
            shutdown,
            tasks,
        };
        begun.disarm();
        Ok(Cluster { inner: Arc::new(inner) })
    }
}

/// Keeps up with the topology.
fn follower(
    topology: &Arc<Cache>,
    listen_at: Target,
    presence: Arc<Presence>,
    look_interval: Duration,
    shutdown: &CancellationToken,
) -> impl Future<Output = Option<()>> + use<> {
    let (topology, listen_at) = (Arc::clone(topology), Arc::new(listen_at));
    let follow = move || {
        let (cache, there) = (Arc::clone(&topology), Arc::clone(&presence));
        follow::run(cache, Arc::clone(&listen_at), there, look_interval)
    };
    supervised("topology's follower", shutdown.child_token(), follow, |_| {})
}

/// Closes connections that nobody uses.
fn idle_closer(
    nodes: &Arc<Nodes>,
    timeout: Duration,
    shutdown: &CancellationToken,
) -> impl Future<Output = Option<()>> + use<> {
    let nodes = Arc::clone(nodes);
    let close = move || nodes::close_idle(Arc::clone(&nodes), timeout);
    supervised("idle connections' closer", shutdown.child_token(), close, |_| {})
}

impl fmt::Debug for ClusterBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URLs may have passwords.
        f.debug_struct("ClusterBuilder").field("pools", &self.pools).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Connects to the cluster of this control database (a libpq URL) with default settings.
    pub async fn connect(url: &str) -> Result<Self> {
        Self::builder(url).connect().await
    }

    /// Settings first: the URL of the control database, then [`ClusterBuilder::connect`].
    pub fn builder(url: &str) -> ClusterBuilder {
        let prepared_statements = PreparedStatements::default();
        ClusterBuilder {
            url: url.to_owned(),
            pools: PoolOptions { connections: CONNECTIONS, prepared_statements },
            listen_urls: HashMap::new(),
            told: Told::default(),
            hint_interval: Duration::ZERO,
            upkeep: true,
            outboxes: Vec::new(),
            relay_failpoint: None,
            topology_file: None,
            look_interval: follow::LOOK_EVERY,
            idle_timeout: IDLE_TIMEOUT,
        }
    }

    /// The cluster's id, drawn when its control schema was made.
    pub fn id(&self) -> Uuid {
        self.inner.id
    }

    /// A producer of a topic.
    pub fn producer(&self, topic: &str) -> ProducerBuilder {
        ProducerBuilder::new(self.clone(), topic)
    }

    /// A consumer of a topic, in a group: the group's consumers together see each message once.
    pub fn consumer(&self, topic: &str, group: &str) -> ConsumerBuilder {
        ConsumerBuilder::new(self.clone(), topic, group)
    }

    /// A consumer of a topic that gets every message, whoever else consumes it: in a group of its
    /// own, which begins with the messages that are sent from now on, and is removed when the
    /// consumer has shut down. Of one that crashed it is removed after ten minutes.
    pub fn broadcast(&self, topic: &str) -> ConsumerBuilder {
        ConsumerBuilder::broadcast(self.clone(), topic)
    }

    /// Ends the background tasks and connections that this cluster's clones share. Shut down
    /// producers and consumers before. Idempotent; waits at most 5 s.
    pub async fn shutdown(&self) {
        self.inner.shutdown.cancel();
        self.inner.tasks.close();
        let ended = join(self.inner.notifier.shutdown(), self.inner.tasks.wait());
        let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
        self.inner.nodes.close();
        self.inner.control.close();
    }

    /// Takes a turn in looking after the nodes, from now on: whoever uses a cluster does.
    pub(crate) fn keep_up(&self) {
        if !self.inner.keeping_up.swap(true, Ordering::AcqRel) {
            let (nodes, stop) = (Arc::clone(&self.inner.nodes), self.inner.shutdown.child_token());
            let run = move || upkeep::run(Arc::clone(&nodes), stop.child_token());
            let upkeep = supervised("upkeep", self.inner.shutdown.child_token(), run, |_| {});
            self.inner.tasks.spawn(upkeep);
            let (relay, stop) = (Arc::clone(&self.inner.relay), self.inner.shutdown.child_token());
            let run = move || relay::run(Arc::clone(&relay), stop.child_token());
            let relay = supervised("relay", self.inner.shutdown.child_token(), run, |_| {});
            self.inner.tasks.spawn(relay);
        }
    }

    /// What carries hints here: for tests.
    #[doc(hidden)]
    pub fn notifier(&self) -> Arc<dyn Notifier> {
        Arc::clone(&self.inner.notifier)
    }

    /// What producers and consumers need to know of a topic.
    pub(crate) async fn topology(&self, topic: &TopicName) -> Result<Topology> {
        self.inner.topology.topic(topic).await
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
