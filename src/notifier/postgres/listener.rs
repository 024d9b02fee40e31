//! The listening connection of a node: kept for as long as somebody is subscribed, and made again after
//! every failure.
//!
//! A connection whose peer is gone without a word looks idle for ever. So whoever has heard nothing for
//! a while sends a heartbeat through the channel itself, which all listeners of the node hear: one of
//! them beats for all. Where it does not come back in time, the connection is given up, 11 s after the
//! last hint at most, or 29 s after the last heartbeat where there were no hints. Meanwhile consumers
//! look by themselves.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{BoxFuture, OptionFuture};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::{AsyncMessage, Client};

use super::Channel;
use crate::cluster::{ListenAt, Nodes, Place};
use crate::deadline::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::notifier::Hint;
use crate::store::listen::{self, HINTS, Session};
use crate::store::{connect, sql};

/// How long it may be silent before it is asked, give or take a fifth.
const QUIET: Duration = Duration::from_secs(5);
/// The same, where nothing but heartbeats was heard: nobody sends much then.
const IDLE: Duration = Duration::from_secs(20);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts to listen again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Between looks at an address that led to a pooler: the node may have another by then.
const POOLED: Duration = Duration::from_mins(1);

/// Listens to a node for as long as somebody is subscribed.
pub(super) async fn listen(nodes: Arc<Nodes>, channel: Arc<Channel>) {
    loop {
        tokio::select! {
            () = keep_listening(&nodes, &channel) => {}
            () = channel.hints.closed() => {}
        }
        if channel.ends_listening() {
            return;
        }
    }
}

/// Listens again after every failure, and never ends.
async fn keep_listening(nodes: &Nodes, channel: &Channel) {
    let (mut backoff, mut told) = (BACKOFF.0, false);
    loop {
        match listen_once(nodes, channel, &mut backoff).await {
            Ok(End::Closed) => {
                tracing::info!(node = %channel.node, "the listening connection ended");
            }
            Ok(End::Pooled) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(
                        node = %channel.node,
                        "the node's address leads to a pooler, which can't listen: its hints are not \
                         heard, and messages come when consumers next look; give the address of \
                         Postgres itself for listening (ClusterBuilder::listen_url)"
                    );
                }
                sleep(jitter(POOLED)).await;
                continue;
            }
            Err(error) => {
                tracing::warn!(node = %channel.node, error = %error.chain(), "listening failed");
            }
        }
        ::metrics::counter!(names::LISTENER_LOST).increment(1);
        sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// How a listening connection ended.
enum End {
    Closed,
    /// A pooler stands before the server.
    Pooled,
}

/// What a statement found; false where a pooler answered, which was not asked to listen.
type Answer<'a> = BoxFuture<'a, Result<bool, tokio_postgres::Error>>;

/// One life of a listening connection.
async fn listen_once(nodes: &Nodes, channel: &Channel, backoff: &mut Duration) -> Result<End> {
    let at = nodes.listen_at(channel.node).await?;
    let (ListenAt::Node(from) | ListenAt::Given(from)) = &at;
    // At an address that was given for listening no pooler is looked for.
    let trusted = matches!(at, ListenAt::Given(_));
    let what = "connect to listen for hints";
    let place = Place::Node(channel.node);
    let target = listen::target(from, &nodes.presence().name(place))?;
    let session = listen::open(&target, what, trusted).await?;
    let Some(Session { client, mut messages, marker }) = session else {
        return Ok(End::Pooled);
    };
    // The connection is driven while statements are answered; what is heard meanwhile goes out too.
    let begin: Answer<'_> = Box::pin(listen::begin(&client, marker.as_ref(), &[HINTS]));
    let mut statement = OptionFuture::from(Some(begin));
    let (mut answered, mut present) = (false, None);
    let mut pulse = Pulse::new();
    loop {
        tokio::select! {
            Some(answer) = &mut statement => {
                if !answer.map_err(|error| connect::refused(error, "listen for hints"))? {
                    return Ok(End::Pooled);
                }
                statement = None.into();
                answered = true;
                if present.is_none() {
                    present = Some(nodes.presence().arrive(place));
                    *backoff = BACKOFF.0;
                    // Listen first, look second: nothing can fall in between.
                    let _ = channel.hints.send(Hint::Look);
                }
            }
            message = messages.next() => match message {
                Some(message) => hear(channel, message, &mut pulse)?,
                None => return Ok(End::Closed),
            },
            // What it was may still be there, and send hints to nobody else.
            () = nodes.moved(channel.node, from) => return Ok(End::Closed),
            () = pulse.due() => {
                pulse.ask()?;
                if std::mem::replace(&mut answered, false) {
                    let beat: Answer<'_> = Box::pin(beat(&client));
                    statement = Some(beat).into();
                }
            }
        }
    }
}

async fn beat(client: &Client) -> Result<bool, tokio_postgres::Error> {
    client.batch_execute(sql::NOTIFY_BEAT).await?;
    Ok(true)
}

fn hear(
    channel: &Channel,
    message: Result<AsyncMessage, tokio_postgres::Error>,
    pulse: &mut Pulse,
) -> Result<()> {
    let message = message.map_err(|error| connect::refused(error, "listen for hints"))?;
    if let AsyncMessage::Notification(note) = message
        && note.channel() == HINTS
    {
        let partitions = parse(note.payload());
        pulse.heard(!partitions.is_empty());
        if !partitions.is_empty() {
            let _ = channel.hints.send(Hint::Partitions(partitions));
        }
    }
    Ok(())
}

/// When a connection was heard of last, and whether an answer is due.
struct Pulse {
    due: Instant,
    asked: bool,
}

impl Pulse {
    /// Of a connection that has been asked to listen.
    fn new() -> Self {
        Self { due: Instant::now() + jitter(QUIET), asked: false }
    }

    async fn due(&self) {
        sleep_until(self.due).await;
    }

    /// A hint, or a heartbeat.
    fn heard(&mut self, hint: bool) {
        let quiet = if hint { QUIET } else { IDLE };
        *self = Self { due: Instant::now() + jitter(quiet), asked: false };
    }

    /// Asks, or fails where the last question was not answered.
    fn ask(&mut self) -> Result<()> {
        if self.asked {
            let what = "listen for hints: no answer to a heartbeat through the channel";
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        *self = Self { due: Instant::now() + ANSWER, asked: true };
        Ok(())
    }
}

/// The partitions of a payload. Anybody who may log in may notify: what is no partition is ignored.
fn parse(payload: &str) -> Vec<PartitionId> {
    payload.split(',').filter_map(|name| name.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_parsed_strictly() {
        let partitions = parse("10101,20101,x,,10199,-10101");
        assert_eq!(partitions.len(), 2);
        assert_eq!(partitions[1], PartitionId::new(1, 99).unwrap());
        assert!(parse("beat").is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_asked_about_once_and_then_is_an_error() {
        let begun = Instant::now();
        let mut pulse = Pulse::new();
        pulse.due().await;
        pulse.ask().unwrap();
        pulse.due().await;
        assert!(pulse.ask().is_err());
        assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
        for (hint, longest) in [(true, 6), (false, 24)] {
            pulse.heard(hint);
            let heard = Instant::now();
            pulse.due().await;
            assert!(heard.elapsed() <= Duration::from_secs(longest), "{:?}", heard.elapsed());
            pulse.ask().unwrap();
        }
    }
}
