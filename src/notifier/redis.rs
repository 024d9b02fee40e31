//! Hints through the pub/sub of a Redis: one channel by node, two connections by process.
//!
//! ```text
//! publish ─> pending set ─> one pipeline of PUBLISH at most in flight ─> all that subscribed to the node
//!                 ^         (later hints join the set)
//! canary ─────────┘   each 5 s, to a channel of this process' own
//! ```
//!
//! Redis keeps nothing for those who are not there, and forgets subscriptions with their connection. So hints
//! count as arriving only once a canary came back through both connections, and consumers look once then.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::error::Result;
use crate::id::{NodeId, PartitionId};
use crate::notifier::channel::{Channel, ENDED, Pending, lock, merged};
use crate::notifier::task::Task;
use crate::notifier::{Health, HealthCell, Hints, Notifier};

mod address;
mod sending;
mod subscribing;

use address::Address;
pub(crate) use address::without_password;

/// How long hints may take that are left at a shutdown.
const LAST_HINTS: Duration = Duration::from_secs(1);
/// How often it is said that there is no connection.
const REMIND: Duration = Duration::from_mins(5);
/// Between attempts to connect again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How long the server may take to let in, or to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Carries hints through a Redis, a Valkey, or what else speaks their protocol and has pub/sub.
///
/// Its tasks live in the tokio runtime of its first use, until it is dropped or shut down. Where that runtime
/// ends before, they begin anew with the next use. Nothing is connected before the first.
#[derive(Debug)]
pub struct RedisNotifier {
    wire: Arc<Wire>,
    tasks: TaskTracker,
    stop: CancellationToken,
    _ends_with_it: DropGuard,
}

/// What the tasks share.
#[derive(Debug)]
struct Wire {
    sending: Task,
    listening: Task,
    address: Address,
    prefix: String,
    /// The channel of this process' canaries.
    own: String,
    channels: Mutex<BTreeMap<NodeId, Arc<Channel>>>,
    /// Somebody subscribed to a node.
    subscribed: Notify,
    pending: Pending,
    /// The canary that is to be sent.
    canary: Mutex<Option<String>>,
    /// One did not come back: it may have gone to another server than the one that is listened to.
    astray: AtomicBool,
}

impl RedisNotifier {
    /// At this address: `redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DB]`, `rediss://` with TLS, the
    /// same with `valkey` and `valkeys`, or `redis+unix:///PATH`. Several hosts are members of one Redis
    /// Cluster, or otherwise the same to their clients, and tried in turn. Behind Sentinels:
    /// `redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,...]/NAME[/DB]`, `rediss+sentinel://` with TLS to all;
    /// user and password are the servers', not the Sentinels'.
    ///
    /// The user needs the rights to `PUBLISH`, `SUBSCRIBE` and `UNSUBSCRIBE` with channels of the prefix, and
    /// behind Sentinels to `ROLE`. TLS goes by the authorities that this machine trusts, or those of
    /// `SSL_CERT_FILE`; where the process has no default provider of rustls' cryptography, it is `ring` from
    /// then on.
    ///
    /// A password that is not in the address is taken from `SHARDMQ_REDIS_PASSWORD`. Channels begin with
    /// the prefix, such as the cluster's id: those of one prefix hear each other.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) where that is no address.
    pub fn new(url: &str, prefix: &str) -> Result<Self> {
        let own = format!("{prefix}:canary:{}", uuid::Uuid::new_v4().simple());
        let stop = CancellationToken::new();
        Ok(Self {
            wire: Arc::new(Wire {
                sending: Task::default(),
                listening: Task::default(),
                address: Address::parse(url)?,
                prefix: prefix.to_owned(),
                own,
                channels: Mutex::default(),
                subscribed: Notify::new(),
                pending: Pending::default(),
                canary: Mutex::default(),
                astray: AtomicBool::new(false),
            }),
            tasks: TaskTracker::new(),
            _ends_with_it: stop.clone().drop_guard(),
            stop,
        })
    }

    /// Starts what is not started yet. False outside of a runtime, and to listen after a shutdown: a message
    /// may be stored then that was under way before.
    fn start(&self, subscribing: bool) -> bool {
        let Ok(runtime) = Handle::try_current() else { return false };
        if subscribing && self.stop.is_cancelled() {
            return false;
        }
        if let Some(running) = self.wire.sending.start(|| ()) {
            let sending = sending::run(Arc::clone(&self.wire), running, self.stop.clone());
            self.tasks.spawn_on(sending, &runtime);
        }
        let lost = Arc::clone(&self.wire);
        if subscribing
            && let Some(running) = self.wire.listening.start(move || lost.interrupt(ENDED))
        {
            let listening = subscribing::run(Arc::clone(&self.wire), running);
            let stop = self.stop.clone();
            self.tasks.spawn_on(stop.run_until_cancelled_owned(listening), &runtime);
        }
        true
    }
}

impl Wire {
    /// Hints of no node arrive.
    fn interrupt(&self, why: &str) {
        for channel in lock(&self.channels).values() {
            channel.interrupt(why);
        }
    }

    fn channel(&self, node: NodeId) -> Arc<Channel> {
        let mut channels = lock(&self.channels);
        Arc::clone(channels.entry(node).or_insert_with(|| Arc::new(Channel::new(node))))
    }

    /// The nodes that somebody listens to.
    fn heard(&self) -> Vec<Arc<Channel>> {
        let channels = lock(&self.channels);
        channels.values().filter(|channel| channel.is_heard()).map(Arc::clone).collect()
    }

    fn channel_name(&self, node: NodeId) -> String {
        format!("{}:{node}", self.prefix)
    }
}

impl Notifier for RedisNotifier {
    fn publish(&self, partitions: &[PartitionId]) {
        // Outside of a runtime it is sent with the next.
        self.wire.pending.add(partitions);
        if !partitions.is_empty() {
            self.start(false);
        }
    }

    fn subscribe(&self, partitions: &[PartitionId]) -> Hints {
        let wanted: Arc<HashSet<PartitionId>> = Arc::new(partitions.iter().copied().collect());
        let nodes: BTreeSet<NodeId> = partitions.iter().map(|partition| partition.node()).collect();
        let of = |node| {
            let channel = self.wire.channel(node);
            if Handle::try_current().is_ok() && !self.stop.is_cancelled() {
                channel.begin();
            }
            channel.subscribe(Arc::clone(&wanted))
        };
        let hints: Vec<Hints> = nodes.into_iter().map(of).collect();
        if !hints.is_empty() && self.start(true) {
            self.wire.subscribed.notify_one();
        }
        merged(hints)
    }

    fn health(&self, node: NodeId) -> Health {
        let channel = lock(&self.wire.channels).get(&node).cloned();
        channel.map_or_else(|| HealthCell::new().get(), |channel| channel.health.get())
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.stop.cancel();
            self.tasks.close();
            let _ = timeout(LAST_HINTS, self.tasks.wait()).await;
        })
    }
}
