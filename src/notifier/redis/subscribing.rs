//! The connection that is subscribed: kept for as long as somebody listens, and made again after every
//! failure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use redis::aio::PubSubSink;
use redis::{Msg, RedisResult};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::address::Address;
use super::{ANSWER, BACKOFF, REMIND, Wire};
use crate::deadline::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::metrics as names;
use crate::notifier::channel::{Channel, lock, parse};
use crate::notifier::task::Running;
use crate::trouble::Trouble;

/// Between canaries, give or take a fifth.
const CANARY: Duration = Duration::from_secs(5);
/// For how long a connection that nobody needs is kept.
const KEPT: Duration = Duration::from_secs(3);

/// Listens as long as somebody does, again after every failure. Never ends.
pub(super) async fn run(wire: Arc<Wire>, _running: Running) {
    let (mut backoff, mut trouble) = (BACKOFF.0, Trouble::new(REMIND));
    for nth in 0.. {
        while wire.heard().is_empty() {
            wire.subscribed.notified().await;
        }
        let ended = listen(&wire, nth, &mut backoff, &mut trouble).await;
        let Err(error) = ended else {
            for channel in lock(&wire.channels).values() {
                channel.rest();
            }
            continue;
        };
        let why = error.chain();
        wire.interrupt(&why);
        ::metrics::counter!(names::LISTENER_LOST).increment(1);
        if trouble.meet(Instant::now()) {
            tracing::warn!(error = %why, "no hints from Redis: consumers look by themselves");
        }
        sleep(jitter(backoff)).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// One life of a connection. Ends well when nobody listens any more.
async fn listen(
    wire: &Wire,
    nth: usize,
    backoff: &mut Duration,
    trouble: &mut Trouble,
) -> Result<()> {
    for channel in wire.heard() {
        channel.begin();
    }
    let what = wire.address.what("hear from");
    let refused = |error| Address::refused(&what, error);
    let client = wire.address.client(nth).await?;
    let connecting = timeout(ANSWER, client.get_async_pubsub()).await;
    let connected = connecting.map_err(|_| silent(&what))?.map_err(refused)?;
    let (sink, mut messages) = connected.split();
    let mut life = Life::new(wire, sink);
    life.subscribe_own().await.map_err(|error| failed(&what, error))?;
    life.subscribe().await.map_err(|error| failed(&what, error))?;
    let mut idle_since = None;
    loop {
        tokio::select! {
            message = messages.next() => {
                let Some(message) = message else {
                    return Err(Error::new(ErrorKind::Unavailable, format!("{what}: the connection ended")));
                };
                if life.hear(&message) {
                    *backoff = BACKOFF.0;
                    if trouble.end() {
                        tracing::info!("hints from Redis arrive again");
                    }
                }
            }
            () = wire.subscribed.notified() => {
                life.subscribe().await.map_err(|error| failed(&what, error))?;
            }
            () = sleep_until(life.due) => {
                // Nobody tells that a subscription was dropped.
                life.subscribe().await.map_err(|error| failed(&what, error))?;
                life.send_canary(&what)?;
                if wire.heard().is_empty() {
                    let since = *idle_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= KEPT {
                        return Ok(());
                    }
                } else {
                    idle_since = None;
                }
            }
        }
    }
}

fn silent(what: &str) -> Error {
    Error::new(ErrorKind::Unavailable, format!("{what}: no answer within {ANSWER:?}"))
}

/// A connection that is subscribed to some nodes.
struct Life<'a> {
    wire: &'a Wire,
    sink: PubSubSink,
    /// By the names of their channels.
    nodes: BTreeMap<String, Arc<Channel>>,
    /// A canary came back.
    arrives: bool,
    /// The canary under way, and when it was sent.
    canary: Option<(String, Instant)>,
    due: Instant,
}

/// Why a statement of the protocol failed.
enum Failed {
    Late,
    Refused(redis::RedisError),
}

impl<'a> Life<'a> {
    fn new(wire: &'a Wire, sink: PubSubSink) -> Self {
        let (nodes, due) = (BTreeMap::new(), Instant::now());
        Self { wire, sink, nodes, arrives: false, canary: None, due }
    }

    async fn subscribe_own(&mut self) -> Result<(), Failed> {
        in_time(self.sink.subscribe(&self.wire.own)).await
    }

    /// Subscribes to the nodes that somebody has begun to listen to, and no more to those of whom nobody does.
    async fn subscribe(&mut self) -> Result<(), Failed> {
        let heard = self.wire.heard();
        let wanted: BTreeSet<NodeId> = heard.iter().map(|channel| channel.node).collect();
        let gone: Vec<String> = self
            .nodes
            .iter()
            .filter(|(_, c)| !wanted.contains(&c.node))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            in_time(self.sink.unsubscribe(&name)).await?;
            if let Some(channel) = self.nodes.remove(&name) {
                channel.rest();
            }
        }
        for channel in heard {
            let name = self.wire.channel_name(channel.node);
            if self.nodes.contains_key(&name) {
                continue;
            }
            in_time(self.sink.subscribe(&name)).await?;
            if self.arrives {
                channel.arrive();
            }
            self.nodes.insert(name, channel);
        }
        Ok(())
    }

    /// Takes a message. True where it is the first sign that all is well.
    fn hear(&mut self, message: &Msg) -> bool {
        let payload = String::from_utf8_lossy(message.get_payload_bytes());
        if let Some(channel) = self.nodes.get(message.get_channel_name()) {
            channel.hear(parse(&payload));
            return false;
        }
        let Some((_, sent)) = self.canary.take_if(|(canary, _)| *canary == payload) else {
            return false;
        };
        self.nodes.values().for_each(|channel| channel.measured(sent.elapsed()));
        self.due = Instant::now() + jitter(CANARY);
        let first = !std::mem::replace(&mut self.arrives, true);
        if first {
            self.nodes.values().for_each(|channel| channel.arrive());
        }
        first
    }

    /// Has one sent, unless the last one did not come back.
    fn send_canary(&mut self, what: &str) -> Result<()> {
        if self.canary.is_some() {
            self.wire.astray.store(true, Ordering::Relaxed);
            let what = format!("{what}: a canary did not come back (can it be published?)");
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        let canary = uuid::Uuid::new_v4().simple().to_string();
        *lock(&self.wire.canary) = Some(canary.clone());
        self.wire.pending.add(&[]);
        self.canary = Some((canary, Instant::now()));
        self.due = Instant::now() + CANARY;
        Ok(())
    }
}

fn failed(what: &str, failed: Failed) -> Error {
    match failed {
        Failed::Late => silent(what),
        Failed::Refused(error) => Address::refused(what, error),
    }
}

async fn in_time(doing: impl Future<Output = RedisResult<()>>) -> Result<(), Failed> {
    timeout(ANSWER, doing).await.map_err(|_| Failed::Late)?.map_err(Failed::Refused)
}
