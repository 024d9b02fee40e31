//! The way in: a cluster is a control database and the nodes that it knows.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::consumer::ConsumerBuilder;
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::name::TopicName;
use crate::notifier::{Notifier, PostgresNotifier};
use crate::producer::ProducerBuilder;
use crate::store::connect::{self, refused};
use crate::store::control;
use crate::store::node::{Node, PoolOptions};
use crate::store::pooler::PreparedStatements;
use crate::topology::Topology;
use crate::upkeep;

mod nodes;

pub(crate) use nodes::{ListenAt, Nodes};

/// A cluster: makes producers and consumers, and looks after topics. Cheap to clone; all clones share
/// their connections, at most three for each node: two for data, and one that listens where something
/// is consumed.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) control: Arc<Node>,
    pub(crate) id: Uuid,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) notifier: Arc<dyn Notifier>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    /// Whether this process takes its turn in looking after the nodes already, or never will.
    keeping_up: AtomicBool,
}

/// Settings of a [`Cluster`].
#[must_use = "a builder does nothing until connect"]
pub struct ClusterBuilder {
    url: String,
    pools: PoolOptions,
    listen_urls: HashMap<NodeId, String>,
    notifier: Option<Arc<dyn Notifier>>,
    upkeep: bool,
}

/// Data connections to each node, and to the control database.
const CONNECTIONS: usize = 2;

impl ClusterBuilder {
    /// Data connections to each node, shared by appending and fetching, and opened when first needed:
    /// 2 by default, 1 to 64.
    pub fn connections_per_node(mut self, connections: usize) -> Self {
        self.pools.connections = connections.clamp(1, 64);
        self
    }

    /// Whether statements stay prepared on data connections: by default where an address leads to
    /// Postgres itself, which is found out. Through a pooler they do not, so that PgBouncer in
    /// transaction mode will do, of any version.
    pub fn prepared_statements(mut self, setting: PreparedStatements) -> Self {
        self.pools.prepared_statements = setting;
        self
    }

    /// Where to listen for a node's hints: at the node's own address by default. To be called for each
    /// node whose address leads to a pooler in transaction mode, since `LISTEN` needs a session. The
    /// URL must lead to the same database, through Postgres itself or a pooler in session mode.
    /// Without it consumers of such a node hear no hints, and find messages when they next look, after
    /// their [poll interval](ConsumerBuilder::poll_interval).
    pub fn listen_url(mut self, node: NodeId, url: &str) -> Self {
        self.listen_urls.insert(node, url.to_owned());
        self
    }

    /// Whether this process takes its turn in looking after the nodes, where it produces or consumes:
    /// day tables ahead, retention. It does by default; some process must.
    pub fn upkeep(mut self, upkeep: bool) -> Self {
        self.upkeep = upkeep;
        self
    }

    /// Takes another notifier than Postgres' `LISTEN/NOTIFY`.
    pub fn notifier(mut self, notifier: impl Notifier) -> Self {
        self.notifier = Some(Arc::new(notifier));
        self
    }

    /// Connects to the control database and reads which nodes there are. Nodes are connected when they
    /// are first used. Must be called within a tokio runtime. Cancel safe.
    pub async fn connect(self) -> Result<Cluster> {
        for url in self.listen_urls.values() {
            connect::parse(url)?;
        }
        let options = PoolOptions { connections: CONNECTIONS, ..self.pools };
        let control = Arc::new(Node::control(&self.url, options)?);
        let what = "read the topology";
        let connection = control.get().await?;
        // The version first: what is read after it is of that version, or of a later one.
        let (id, version) = control::cluster(&connection).await.map_err(|e| refused(e, what))?;
        let known = control::nodes(&connection).await.map_err(|e| refused(e, what))?;
        drop(connection);
        let nodes = Nodes::new(id, self.pools, self.listen_urls, Arc::clone(&control));
        nodes.learn(version, known)?;
        let nodes = Arc::new(nodes);
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        tasks.spawn(nodes::follow(Arc::clone(&nodes), shutdown.child_token()));
        let notifier = self.notifier.unwrap_or_else(|| {
            let nodes = Arc::clone(&nodes);
            Arc::new(PostgresNotifier::new(nodes, shutdown.child_token(), tasks.clone()))
        });
        let inner = Inner {
            keeping_up: AtomicBool::new(!self.upkeep),
            control,
            id,
            nodes,
            notifier,
            shutdown,
            tasks,
        };
        Ok(Cluster { inner: Arc::new(inner) })
    }
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
            notifier: None,
            upkeep: true,
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

    /// Ends the background tasks and connections that this cluster's clones share. Shut down producers
    /// and consumers before. Idempotent; waits at most 5 s.
    pub async fn shutdown(&self) {
        self.inner.shutdown.cancel();
        self.inner.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.inner.tasks.wait()).await;
        self.inner.nodes.close();
        self.inner.control.close();
    }

    /// Takes a turn in looking after the nodes, from now on: whoever uses a cluster does.
    pub(crate) fn keep_up(&self) {
        if !self.inner.keeping_up.swap(true, Ordering::AcqRel) {
            let nodes = Arc::clone(&self.inner.nodes);
            self.inner.tasks.spawn(upkeep::run(nodes, self.inner.shutdown.child_token()));
        }
    }

    /// What carries hints here: for tests.
    #[doc(hidden)]
    pub fn notifier(&self) -> Arc<dyn Notifier> {
        Arc::clone(&self.inner.notifier)
    }

    /// What producers and consumers need to know of a topic.
    pub(crate) async fn topology(&self, topic: &TopicName) -> Result<Topology> {
        let what = format!("look up topic {topic}");
        let connection = self.inner.control.get().await?;
        let found = control::topic(&connection, topic).await.map_err(|e| refused(e, &what))?;
        let Some(found) = found else {
            let names = control::topics(&connection).await.map_err(|e| refused(e, &what))?;
            let names = names.into_iter().map(|row| row.topic).collect();
            return Err(unknown_topic(topic, names));
        };
        Ok(Topology {
            topic: topic.clone(),
            generation: found.generation,
            partitions: found.partitions,
            slots: found.slots,
        })
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

/// Says that there is no such topic, and which ones have the nearest names.
fn unknown_topic(topic: &TopicName, mut names: Vec<String>) -> Error {
    names.sort_by_key(|name| distance(name, topic.as_str()));
    names.truncate(3);
    let hint = match names.as_slice() {
        [] => "there is none yet".to_owned(),
        names => format!("the nearest are {}", names.join(", ")),
    };
    Error::new(ErrorKind::NotFound, format!("topic {topic} does not exist; {hint}"))
}

/// How many letters must change to make one name of another (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_topic_names_the_nearest() {
        let topic = TopicName::new("order").unwrap();
        let names = ["payments", "orders", "border", "x"].map(String::from).to_vec();
        let text = unknown_topic(&topic, names).to_string();
        assert!(text.contains("the nearest are orders, border"), "{text}");
        assert!(unknown_topic(&topic, Vec::new()).to_string().contains("there is none yet"));
    }
}
