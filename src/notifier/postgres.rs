//! Hints through `LISTEN/NOTIFY`: one listening connection and one channel per process and node.
//!
//! ```text
//! publish ─> pending set of the node ─> one NOTIFY at most in flight ─> all that listen there
//!            (later hints join it)      (a transaction of its own)
//! ```
//!
//! Never inside the appending transaction: a commit that notifies takes one lock for the whole
//! server, over its flush and the wait for a standby. Alone, it waits for neither.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::Nodes;
use crate::deadline::{in_time, jitter};
use crate::error::{ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::notifier::channel::{Channel, ENDED, Pending, lock, merged, payload};
use crate::notifier::task::{Running, Task};
use crate::notifier::{Health, HealthCell, Hints, Notifier};
use crate::store::node::query;
use crate::store::{connect, sql};
use crate::trouble::Trouble;

mod listener;

use listener::listen;

/// Partitions in one payload, which Postgres limits to 8,000 bytes.
const MAX_PARTITIONS: usize = 1_000;
/// How often it is said that none can be sent.
const REMIND: Duration = Duration::from_mins(5);
/// How long the server may take for a hint: those that come later wait for it.
const ANSWER: Duration = Duration::from_secs(2);
/// Between attempts to send what could not be sent.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How long hints may take that are left at a shutdown.
const LAST_HINTS: Duration = Duration::from_secs(1);

/// The default notifier.
#[derive(Debug)]
pub(crate) struct PostgresNotifier {
    nodes: Arc<Nodes>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    /// Between two notifications of a node, at least.
    interval: Duration,
    wires: Mutex<HashMap<NodeId, Arc<Wire>>>,
}

/// What one node has: hints that wait to be sent, and those who listen.
#[derive(Debug)]
struct Wire {
    channel: Channel,
    pending: Pending,
    sending: Task,
    listening: Task,
}

impl PostgresNotifier {
    pub(crate) fn new(
        nodes: Arc<Nodes>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
        interval: Duration,
    ) -> Self {
        Self { nodes, shutdown, tasks, interval, wires: Mutex::default() }
    }

    fn wire(&self, node: NodeId) -> Arc<Wire> {
        let make = || {
            let (sending, listening) = (Task::default(), Task::default());
            let (channel, pending) = (Channel::new(node), Pending::default());
            Arc::new(Wire { channel, pending, sending, listening })
        };
        Arc::clone(lock(&self.wires).entry(node).or_insert_with(make))
    }

    fn subscribe_node(&self, node: NodeId, wanted: Arc<HashSet<PartitionId>>) -> Hints {
        let wire = self.wire(node);
        // Outside of a runtime, and after a shutdown, nothing is heard.
        let runtime = Handle::try_current().ok().filter(|_| !self.shutdown.is_cancelled());
        if runtime.is_some() {
            wire.channel.begin();
        }
        let hints = wire.channel.subscribe(wanted);
        let Some(runtime) = runtime else { return hints };
        let lost = Arc::clone(&wire);
        if let Some(running) = wire.listening.start(move || lost.channel.interrupt(ENDED)) {
            let (nodes, shutdown) = (Arc::clone(&self.nodes), self.shutdown.clone());
            let listening = listen(nodes, Arc::clone(&wire), running);
            self.tasks.spawn_on(shutdown.run_until_cancelled_owned(listening), &runtime);
        }
        hints
    }
}

impl Notifier for PostgresNotifier {
    fn publish(&self, partitions: &[PartitionId]) {
        // Also after a shutdown: a message may be stored then that was under way before.
        let Ok(runtime) = Handle::try_current() else { return };
        for partition in partitions {
            let wire = self.wire(partition.node());
            wire.pending.add(&[*partition]);
            if let Some(running) = wire.sending.start(|| ()) {
                let (nodes, shutdown) = (Arc::clone(&self.nodes), self.shutdown.clone());
                let sending = send(nodes, Arc::clone(&wire), running, shutdown, self.interval);
                self.tasks.spawn_on(sending, &runtime);
            }
        }
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let wanted: Arc<HashSet<PartitionId>> = Arc::new(partitions.iter().copied().collect());
        let nodes: BTreeSet<NodeId> = partitions.iter().map(|partition| partition.node()).collect();
        let of = |node| self.subscribe_node(node, Arc::clone(&wanted));
        merged(nodes.into_iter().map(of).collect())
    }

    fn health(&self, node: NodeId) -> Health {
        let wire = lock(&self.wires).get(&node).cloned();
        wire.map_or_else(|| HealthCell::new().get(), |wire| wire.channel.health.get())
    }
}

/// Sends what is pending, one NOTIFY at a time; what comes meanwhile goes with the next. At a
/// shutdown it sends the rest, if the node answers soon: a process often ends right after its last
/// message.
async fn send(
    nodes: Arc<Nodes>,
    wire: Arc<Wire>,
    mut running: Running,
    shutdown: CancellationToken,
    interval: Duration,
) {
    let mut trouble = Trouble::new(REMIND);
    let too_late = async {
        shutdown.cancelled().await;
        sleep(LAST_HINTS).await;
    };
    let sending = async {
        loop {
            tokio::select! {
                biased;
                () = wire.pending.added() => {}
                () = shutdown.cancelled() => {}
            }
            let mut backoff = BACKOFF.0;
            while let Some(sent) = send_pending(&nodes, &wire, &mut trouble).await {
                // What comes meanwhile goes with the next; a lone message does not wait.
                let pause = if sent { interval } else { jitter(backoff) };
                backoff = if sent { BACKOFF.0 } else { (backoff * 2).min(BACKOFF.1) };
                if !sent && shutdown.is_cancelled() {
                    sleep(BACKOFF.0).await;
                } else if !pause.is_zero() {
                    shutdown.run_until_cancelled(sleep(pause)).await;
                }
            }
            if shutdown.is_cancelled() && running.end_if(|| wire.pending.is_empty()) {
                return;
            }
        }
    };
    tokio::select! {
        () = sending => {}
        () = too_late => {}
    }
}

/// One notification of what is pending, and whether it was sent; if not, it is pending again. None
/// where nothing was.
async fn send_pending(nodes: &Nodes, wire: &Wire, trouble: &mut Trouble) -> Option<bool> {
    let partitions = wire.pending.take(MAX_PARTITIONS);
    if partitions.is_empty() {
        return None;
    }
    let node = wire.channel.node;
    let payload = payload(&partitions);
    if let Err(error) = in_time(ANSWER, "notify", notify(nodes, node, &payload)).await {
        // Consumers look by themselves, or hear of it late; of a node that is removed nobody does.
        if error.kind() != ErrorKind::NotFound {
            wire.pending.add(&partitions);
        }
        ::metrics::counter!(names::NOTIFY_FAILED).increment(1);
        if trouble.meet(Instant::now()) {
            tracing::warn!(
                %node, error = %error.chain(),
                "hints can't be sent: consumers find messages by looking"
            );
        }
        return Some(false);
    }
    if trouble.end() {
        tracing::info!(%node, "hints are sent again");
    }
    Some(true)
}

async fn notify(nodes: &Nodes, id: NodeId, payload: &str) -> Result<()> {
    let node = nodes.node(id).await?;
    let sent = query(&node.get().await?, sql::NOTIFY, &[&payload]).await;
    if let Err(error) = &sent
        && error.code() == Some(&SqlState::PROGRAM_LIMIT_EXCEEDED)
    {
        // The queue is full, or was: the next one finds room if those who listen have read.
        let _ = query(&node.get().await?, sql::NOTIFY_TAIL, &[]).await;
    }
    sent.map(drop).map_err(|error| connect::refused(error, "notify"))
}
