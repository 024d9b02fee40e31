//! The topology as this process knows it: kept up with the control database, so that everything
//! goes on while that is away, and kept in a file where one was given, so that processes also start
//! then.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::cluster::fate::{self, Found};
use crate::cluster::nodes::{ANSWER, Nodes, judge};
use crate::cluster::topology_file::{Snapshot, TopologyFile};
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{TopicName, nearest};
use crate::store::connect::refused;
use crate::store::control;
use crate::store::node::Node;
use crate::store::timeline::Newest;
use crate::topology::{Topology, Version};

/// How long the control database may take to answer at the start, when it has to be connected to.
const START: Duration = Duration::from_secs(10);
/// How often doubts are looked at without delay: one in so long a time.
const DOUBTS: Duration = Duration::from_secs(1);

/// What is known of the topology.
pub(crate) struct Cache {
    /// The control database, as `host:port/database`.
    address: String,
    cluster: Uuid,
    /// Of the same version as the nodes, or of an earlier one.
    settings: Mutex<BTreeMap<String, String>>,
    control: Arc<Node>,
    nodes: Arc<Nodes>,
    /// The topics that this process uses.
    topics: Mutex<BTreeMap<TopicName, Topology>>,
    /// Topics as they were in the file at the start.
    kept: BTreeMap<TopicName, Topology>,
    /// The version of the topology that they are of, or an earlier one.
    version: Mutex<Version>,
    /// How often another version was taken over.
    revision: AtomicU64,
    /// Told when `topics` or the version have changed.
    changed: watch::Sender<()>,
    /// Somebody was told that a topic is gone: to be looked at, whatever the version.
    doubted: AtomicBool,
    doubted_at: Mutex<Option<Instant>>,
    told: Notify,
    /// Topics that the control database has lost, and the nodes have not.
    lost: Mutex<BTreeSet<Uuid>>,
    file: Option<TopologyFile>,
    tasks: TaskTracker,
}

/// What is known of the topology at the start: as the control database has it, or, while that can't
/// be reached, as it was kept in a file.
pub(super) async fn start(
    control: &Node,
    address: String,
    file: Option<&TopologyFile>,
) -> Result<Snapshot> {
    let kept = file.and_then(|file| file.read(&address));
    // Boxed: whoever connects carries it.
    let now = in_time(START, "read the topology", Box::pin(read_all(control, address))).await;
    match (now, kept) {
        (Ok(now), Some(kept)) if kept.cluster != now.cluster => Ok(now),
        (Ok(now), Some(kept)) => {
            let Err(error) = judge(&now.version, &kept.version) else {
                return Ok(Snapshot { topics: kept.topics, ..now });
            };
            tracing::error!(alert = "topology", error = %error.chain(), "starting from the topology file");
            Ok(kept)
        }
        (Err(error), Some(kept)) if error.is_transient() => {
            tracing::warn!(error = %error.chain(), "starting from the topology file");
            Ok(kept)
        }
        (now, _) => now,
    }
}

async fn read_all(control: &Node, address: String) -> Result<Snapshot> {
    let what = "read the topology";
    let connection = control.get().await?;
    // The version first: what is read after it is of that version, or of a later one.
    let (cluster, version) = control::cluster(&connection).await.map_err(|e| refused(e, what))?;
    let nodes = control::nodes(&connection).await.map_err(|e| refused(e, what))?;
    let settings = control::settings(&connection).await.map_err(|e| refused(e, what))?;
    let (nodes, topics) = (nodes.into_iter().collect(), BTreeMap::new());
    Ok(Snapshot { control: address, cluster, version, nodes, settings, topics })
}

impl Cache {
    /// With what was known at the start.
    pub(super) fn new(
        start: Snapshot,
        control: Arc<Node>,
        nodes: Arc<Nodes>,
        file: Option<TopologyFile>,
        tasks: TaskTracker,
    ) -> Self {
        let Snapshot { control: address, cluster, version, settings, topics: kept, .. } = start;
        Self {
            address,
            cluster,
            settings: Mutex::new(settings),
            control,
            nodes,
            topics: Mutex::default(),
            kept,
            version: Mutex::new(version),
            revision: AtomicU64::new(0),
            changed: watch::Sender::new(()),
            doubted: AtomicBool::new(false),
            doubted_at: Mutex::default(),
            told: Notify::new(),
            lost: Mutex::default(),
            file,
            tasks,
        }
    }

    /// A topic as the control database has it now; while that can't be reached, as it was known
    /// last.
    pub(crate) async fn topic(self: &Arc<Self>, name: &TopicName) -> Result<Topology> {
        let what = format!("look up topic {name}");
        // Boxed: whoever makes a producer or consumer carries it.
        match in_time(ANSWER, &what, Box::pin(self.read(name, &what))).await {
            Ok(found) => {
                self.learn(&found);
                Ok(found)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let used = self.lock().get(name).map(|topology| topology.id);
                if let Some(id) = used {
                    self.doubt(id);
                }
                Err(error)
            }
            Err(error) if error.is_transient() => {
                let known = self.known(name).ok_or_else(|| error.clone())?;
                tracing::warn!(topic = %name, error = %error.chain(), "going on with what is known");
                self.lock().insert(name.clone(), known.clone());
                Ok(known)
            }
            Err(error) => Err(error),
        }
    }

    /// A topic as it was known last, without asking.
    pub(crate) fn known(&self, name: &TopicName) -> Option<Topology> {
        let used = self.lock().get(name).cloned();
        used.or_else(|| self.kept.get(name).cloned())
    }

    async fn read(&self, name: &TopicName, what: &str) -> Result<Topology> {
        let connection = self.control.get().await?;
        let found = control::topic(&connection, name).await.map_err(|e| refused(e, what))?;
        let Some(found) = found else {
            let names = control::topics(&connection).await.map_err(|e| refused(e, what))?;
            let names = names.into_iter().map(|row| row.topic).collect();
            return Err(unknown_topic(name, names));
        };
        Ok(Topology {
            topic: name.clone(),
            id: found.id,
            generation: found.generation,
            partitions: found.partitions,
            slots: found.slots,
        })
    }

    async fn read_settings(&self) -> Result<BTreeMap<String, String>> {
        let connection = self.control.get().await?;
        let settings = control::settings(&connection).await;
        settings.map_err(|error| refused(error, "read the settings"))
    }

    fn learn(self: &Arc<Self>, topology: &Topology) {
        let before = self.lock().insert(topology.topic.clone(), topology.clone());
        lock(&self.lost).remove(&topology.id);
        if before.as_ref() != Some(topology) {
            self.changed.send_replace(());
            self.keep();
        }
    }

    /// Another number for each version of the topology that was taken over.
    pub(crate) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// Returns when a topic that this process uses is gone, or another one has its name.
    pub(crate) async fn ended(&self, topology: &Topology) -> Ended {
        let mut changed = self.changed.subscribe();
        loop {
            match self.lock().get(&topology.topic) {
                Some(now) if now.id == topology.id => {}
                Some(now) => return Ended::Another(now.clone()),
                None => return Ended::Deleted,
            }
            // The sender lives as long as this.
            let _ = changed.changed().await;
        }
    }

    /// Changes with each version of the topology that is taken over, and with each topic.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Somebody was told that a topic of this id is not there: to be looked at soon.
    pub(crate) fn doubt(&self, id: Uuid) {
        if lock(&self.lost).contains(&id) || self.doubted.swap(true, Ordering::AcqRel) {
            return;
        }
        // Where that was looked at just now, the next look that is due anyway will do.
        let mut last = lock(&self.doubted_at);
        if last.is_none_or(|last| last.elapsed() >= DOUBTS) {
            *last = Some(Instant::now());
            self.told.notify_one();
        }
    }

    /// The topology may have changed.
    pub(super) fn tell(&self) {
        self.told.notify_one();
    }

    /// The same, and newer primaries may be listed under the version that is known.
    pub(super) fn warn(&self) {
        self.nodes.warned();
        self.tell();
    }

    /// Returns when there is something to look at, or to record.
    pub(super) async fn told(&self) {
        tokio::select! {
            () = self.told.notified() => {}
            () = self.nodes.seen() => {}
        }
    }

    /// The newest primary of the control database that is known.
    pub(super) fn newest(&self) -> &Newest {
        self.control.newest()
    }

    /// Looks whether the topology has another version, and takes it over.
    pub(super) async fn look(self: &Arc<Self>) -> Result<()> {
        in_time(ANSWER, "look at the topology", self.nodes.look()).await?;
        let version = self.nodes.version();
        let doubted = self.doubted.load(Ordering::Acquire);
        if version == *lock(&self.version) && !doubted {
            return Ok(());
        }
        // For who starts from the file: what this process was started with stays.
        let settings = in_time(ANSWER, "look at the settings", self.read_settings()).await?;
        *lock(&self.settings) = settings;
        let names: Vec<TopicName> = self.lock().keys().cloned().collect();
        for name in names {
            let what = format!("look up topic {name}");
            match in_time(ANSWER, &what, Box::pin(self.read(&name, &what))).await {
                Ok(found) => self.learn(&found),
                Err(error) if error.kind() == ErrorKind::NotFound => self.is_missing(&name).await?,
                // Looked at again with the next look.
                Err(error) => return Err(error),
            }
        }
        *lock(&self.version) = version;
        self.doubted.store(false, Ordering::Release);
        self.revision.fetch_add(1, Ordering::AcqRel);
        self.changed.send_replace(());
        self.keep();
        Ok(())
    }

    /// The control database does not have a topic that this process uses. A topic that was deleted
    /// is gone from its nodes too; one that the control database has lost is not, and all goes on
    /// with what is known.
    async fn is_missing(self: &Arc<Self>, name: &TopicName) -> Result<()> {
        let Some(topology) = self.lock().get(name).cloned() else { return Ok(()) };
        match fate::on_nodes(&self.nodes, &topology).await? {
            Found::Nothing => {
                self.lock().remove(name);
                self.changed.send_replace(());
                tracing::warn!(topic = %name, "the topic was deleted");
            }
            Found::Partitions(node) => {
                if lock(&self.lost).insert(topology.id) {
                    tracing::error!(
                        alert = "topology", topic = %name, %node,
                        "the control database has lost the topic, and its nodes have it: all goes on with what \
                         is known; `shardmq repair` puts it back"
                    );
                }
            }
        }
        Ok(())
    }

    /// Writes what is known to the file, in the background.
    pub(super) fn keep(self: &Arc<Self>) {
        let Some(file) = self.file.clone() else { return };
        let cache = Arc::clone(self);
        self.tasks.spawn_blocking(move || file.write(|| cache.snapshot()));
    }

    fn snapshot(&self) -> Snapshot {
        let (version, nodes) = self.nodes.snapshot();
        Snapshot {
            control: self.address.clone(),
            cluster: self.cluster,
            version,
            nodes,
            settings: lock(&self.settings).clone(),
            topics: self.lock().clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TopicName, Topology>> {
        lock(&self.topics)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a topic ended that is used.
#[derive(Debug, Clone)]
pub(crate) enum Ended {
    Deleted,
    /// It was deleted, and made again: this is another one.
    Another(Topology),
}

impl Ended {
    /// The error for users of the topic.
    pub(crate) fn error(&self, topic: &TopicName) -> Error {
        let what = match self {
            Self::Deleted => format!("topic {topic} was deleted"),
            Self::Another(_) => {
                format!("topic {topic} was deleted, and another one of this name was made")
            }
        };
        Error::new(ErrorKind::NotFound, what)
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Says that there is no such topic, and which ones have the nearest names.
fn unknown_topic(topic: &TopicName, names: Vec<String>) -> Error {
    let hint = nearest(topic.as_str(), names);
    Error::new(ErrorKind::NotFound, format!("topic {topic} does not exist; {hint}"))
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
