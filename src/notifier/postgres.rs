//! Hints through `LISTEN/NOTIFY`: one listening connection and one channel per process and node.
//!
//! ```text
//! publish ─> pending set of the node ─> one NOTIFY at most in flight ─> all that listen there
//!            (later hints join it)      (a transaction of its own)
//! ```
//!
//! Never inside the appending transaction: a commit that notifies takes one lock for the whole server,
//! over its flush and the wait for a standby. Alone, it waits for neither.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::{Notify, broadcast, broadcast::error::RecvError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::Nodes;
use crate::error::Result;
use crate::id::{NodeId, PartitionId};
use crate::notifier::{Hint, Hints, Notifier};
use crate::store::{connect, node, sql};

mod listener;

use listener::listen;

/// Hints that a slow subscriber may be behind.
const CAPACITY: usize = 1024;
/// Partitions in one payload, which Postgres limits to 8,000 bytes.
const MAX_PARTITIONS: usize = 1_000;
/// How long hints may take that are left at a shutdown.
const LAST_HINTS: Duration = Duration::from_secs(1);

/// The default notifier.
#[derive(Debug)]
pub(crate) struct PostgresNotifier {
    nodes: Arc<Nodes>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    channels: Mutex<HashMap<NodeId, Arc<Channel>>>,
}

/// What one node has: hints that wait to be sent, and those who listen.
#[derive(Debug)]
struct Channel {
    node: NodeId,
    pending: Mutex<BTreeSet<PartitionId>>,
    wake: Notify,
    hints: broadcast::Sender<Hint>,
    /// Whether the tasks of the two directions were started.
    started: Mutex<(bool, bool)>,
}

impl Channel {
    /// Nobody listens any more, unless somebody has subscribed meanwhile. Who subscribes does so before
    /// it looks whether somebody listens.
    fn ends_listening(&self) -> bool {
        let mut started = lock(&self.started);
        let unheard = self.hints.receiver_count() == 0;
        started.1 &= !unheard;
        unheard
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PostgresNotifier {
    pub(crate) fn new(nodes: Arc<Nodes>, shutdown: CancellationToken, tasks: TaskTracker) -> Self {
        Self { nodes, shutdown, tasks, channels: Mutex::default() }
    }

    fn channel(&self, node: NodeId) -> Arc<Channel> {
        let make = || {
            Arc::new(Channel {
                node,
                pending: Mutex::default(),
                wake: Notify::new(),
                hints: broadcast::channel(CAPACITY).0,
                started: Mutex::default(),
            })
        };
        Arc::clone(lock(&self.channels).entry(node).or_insert_with(make))
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = task => {}
            }
        });
    }
}

impl Notifier for PostgresNotifier {
    fn publish(&self, partitions: &[PartitionId]) {
        for partition in partitions {
            let channel = self.channel(partition.node());
            if !std::mem::replace(&mut lock(&channel.started).0, true) {
                let sending =
                    send(Arc::clone(&self.nodes), Arc::clone(&channel), self.shutdown.clone());
                self.tasks.spawn(sending);
            }
            lock(&channel.pending).insert(*partition);
            channel.wake.notify_one();
        }
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let wanted: Arc<HashSet<PartitionId>> = Arc::new(partitions.iter().copied().collect());
        let nodes: BTreeSet<NodeId> = partitions.iter().map(|partition| partition.node()).collect();
        let streams: Vec<Hints> =
            nodes.into_iter().map(|node| self.subscribe_node(node, Arc::clone(&wanted))).collect();
        // Without partitions there is nothing to hear, and it does not end either.
        Box::pin(stream::select_all(streams).chain(stream::pending()))
    }
}

impl PostgresNotifier {
    fn subscribe_node(&self, node: NodeId, wanted: Arc<HashSet<PartitionId>>) -> Hints {
        let channel = self.channel(node);
        let receiver = channel.hints.subscribe();
        let first = std::mem::replace(&mut lock(&channel.started).1, true);
        if !first {
            self.spawn(listen(Arc::clone(&self.nodes), channel));
        }
        let later = stream::unfold((receiver, wanted), |(mut receiver, wanted)| async move {
            let hint = loop {
                match receiver.recv().await {
                    Ok(Hint::Look) | Err(RecvError::Lagged(_)) => break Hint::Look,
                    Ok(Hint::Partitions(mut partitions)) => {
                        partitions.retain(|partition| wanted.contains(partition));
                        if !partitions.is_empty() {
                            break Hint::Partitions(partitions);
                        }
                    }
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            };
            Some((hint, (receiver, wanted)))
        });
        // Where the node is listened to already, hints arrive from now on.
        let now = stream::iter(first.then_some(Hint::Look));
        Box::pin(now.chain(later))
    }
}

/// Sends what is pending, one NOTIFY at a time; what comes meanwhile goes with the next. At a shutdown it
/// sends the rest, if the node answers soon: a process often ends right after its last message.
async fn send(nodes: Arc<Nodes>, channel: Arc<Channel>, shutdown: CancellationToken) {
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(LAST_HINTS).await;
    };
    let sending = async {
        loop {
            tokio::select! {
                biased;
                () = channel.wake.notified() => send_pending(&nodes, &channel).await,
                () = shutdown.cancelled() => return,
            }
        }
    };
    tokio::select! {
        () = sending => {}
        () = too_late => {}
    }
}

async fn send_pending(nodes: &Nodes, channel: &Channel) {
    loop {
        let partitions: Vec<PartitionId> = {
            let mut pending = lock(&channel.pending);
            let rest = pending.iter().nth(MAX_PARTITIONS).copied();
            let rest = rest.map(|from| pending.split_off(&from)).unwrap_or_default();
            std::mem::replace(&mut *pending, rest).into_iter().collect()
        };
        if partitions.is_empty() {
            return;
        }
        if let Err(error) = notify(nodes, channel.node, &partitions).await {
            // Consumers look by themselves.
            metrics::counter!("shardmq_notify_failed_total").increment(1);
            tracing::debug!(node = %channel.node, error = %error.chain(), "a hint was not sent");
        }
    }
}

async fn notify(nodes: &Nodes, id: NodeId, partitions: &[PartitionId]) -> Result<()> {
    let names: Vec<String> = partitions.iter().map(ToString::to_string).collect();
    let payload = names.join(",");
    let connection = nodes.node(id).await?.get().await?;
    node::write(connection, node::Durability::Relaxed, sql::NOTIFY, &[&payload])
        .await
        .map_err(|error| connect::refused(error, "notify"))?;
    Ok(())
}
