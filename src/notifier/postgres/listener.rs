//! The listening connection of a node: kept for as long as the cluster is in use, and made again after
//! every failure.
//!
//! A connection whose peer is gone without a word looks idle for ever. So whoever has heard nothing for
//! a while sends a heartbeat through the channel itself, which all listeners of the node hear: one of
//! them beats for all. Where it does not come back in time, the connection is given up, 11 s after the
//! last word at most. Meanwhile consumers look by themselves.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use futures_util::{Stream, StreamExt, stream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use super::{CHANNEL, Channel};
use crate::cluster::Nodes;
use crate::consumer::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::notifier::Hint;
use crate::store::{connect, sql};

/// How long it may be silent before it is asked, give or take a fifth.
const QUIET: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts to listen again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Listens to a node, again after every failure.
pub(super) async fn listen(nodes: Arc<Nodes>, channel: Arc<Channel>) {
    let mut backoff = BACKOFF.0;
    loop {
        match listen_once(&nodes, &channel, &mut backoff).await {
            Ok(()) => tracing::info!(node = %channel.node, "the listening connection ended"),
            Err(error) => {
                tracing::warn!(node = %channel.node, error = %error.chain(), "listening failed");
            }
        }
        ::metrics::counter!(names::LISTENER_LOST).increment(1);
        sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<AsyncMessage, tokio_postgres::Error>> + Send>>;

/// One life of a listening connection.
async fn listen_once(nodes: &Nodes, channel: &Channel, backoff: &mut Duration) -> Result<()> {
    let (client, mut messages) = open(&nodes.url(channel.node).await?).await?;
    // The connection is driven while statements are answered; what is heard meanwhile goes out too.
    let mut statement = OptionFuture::from(Some(Box::pin(client.batch_execute("listen shardmq"))));
    let (mut answered, mut listening) = (false, false);
    let mut pulse = Pulse::new();
    loop {
        tokio::select! {
            Some(answer) = &mut statement => {
                answer.map_err(|error| connect::refused(error, "listen for hints"))?;
                statement = None.into();
                answered = true;
                if !std::mem::replace(&mut listening, true) {
                    *backoff = BACKOFF.0;
                    // Listen first, look second: nothing can fall in between.
                    let _ = channel.hints.send(Hint::Look);
                }
            }
            message = messages.next() => match message {
                Some(message) => hear(channel, message, &mut pulse)?,
                None => return Ok(()),
            },
            () = pulse.due() => {
                pulse.ask()?;
                if std::mem::replace(&mut answered, false) {
                    statement = Some(Box::pin(client.batch_execute(sql::NOTIFY_BEAT))).into();
                }
            }
        }
    }
}

async fn open(url: &str) -> Result<(Client, Messages)> {
    let mut config = connect::parse(url)?;
    config.application_name("shardmq listen");
    let what = "connect to listen for hints";
    let opened = timeout(ANSWER, config.connect(NoTls)).await;
    let opened =
        opened.map_err(|_| Error::new(ErrorKind::Unavailable, format!("{what}: no answer")))?;
    let (client, mut connection) = opened.map_err(|error| connect::refused(error, what))?;
    let messages = stream::poll_fn(move |context| connection.poll_message(context));
    Ok((client, Box::pin(messages)))
}

fn hear(
    channel: &Channel,
    message: Result<AsyncMessage, tokio_postgres::Error>,
    pulse: &mut Pulse,
) -> Result<()> {
    let message = message.map_err(|error| connect::refused(error, "listen for hints"))?;
    if let AsyncMessage::Notification(note) = message
        && note.channel() == CHANNEL
    {
        pulse.heard();
        let partitions = parse(note.payload());
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

    fn heard(&mut self) {
        *self = Self::new();
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
        pulse.heard();
        pulse.due().await;
        pulse.ask().unwrap();
    }
}
