//! The listening connection of a node: kept for as long as somebody is subscribed, and made again
//! after every failure.
//!
//! ```text
//! connect ─> LISTEN ─> canary ─ heard ─> hints arrive, look once ─┬─ heard ─> wait
//!    ^                   │ not in 5 s                             v             │ nothing for a while
//!    └───── backoff <────┴──────────────────────────────────── canary <─────────┘
//! ```
//!
//! A connection whose peer is gone without a word looks idle for ever, and where the server's queue
//! of notifications is full nothing comes through one that is well. So hints count as arriving only
//! once a canary, a notification of this process, sent as hints are, was heard, and whoever has
//! heard nothing for a while sends another, which all listeners of the node hear: one of them sends
//! for all. Where it does not come back in time, the connection is given up, 11 s after the last
//! hint at most, or 29 s after the last canary where there were no hints. Where hints keep coming,
//! one is sent each minute, to measure. Where none can be sent, hints do not count as arriving, and
//! the connection is kept.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture};
use futures_util::{StreamExt, TryFutureExt};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::AsyncMessage;

use super::{REMIND, Wire, notify};
use crate::cluster::{ListenAt, Nodes, Place};
use crate::deadline::{in_time, jitter};
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::metrics as names;
use crate::notifier::channel::{Channel, parse};
use crate::notifier::task::Running;
use crate::store::connect;
use crate::store::listen::{self, HINTS, Session};
use crate::trouble::Trouble;

/// How long it may be silent before a canary is sent, give or take a fifth.
const QUIET: Duration = Duration::from_secs(5);
/// The same, where nothing but canaries was heard: nobody sends much then.
const IDLE: Duration = Duration::from_secs(20);
/// How often one is sent all the same.
const MEASURE: Duration = Duration::from_mins(1);
/// Before another, where one could not be sent.
const AGAIN: Duration = Duration::from_secs(1);
/// How long it may take.
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts to listen again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Between looks at an address that led to a pooler: the node may have another by then.
const POOLED: Duration = Duration::from_mins(1);
/// What is wrong there, and what to do.
const IS_POOLED: &str = "the node's address leads to a pooler, which can't listen: its hints are not heard, and \
                         messages come when consumers next look; give the address of Postgres itself for \
                         listening (shardmq notifier listen, or ClusterBuilder::listen_url)";

/// Listens to a node for as long as somebody is subscribed.
pub(super) async fn listen(nodes: Arc<Nodes>, wire: Arc<Wire>, mut running: Running) {
    loop {
        tokio::select! {
            () = keep_listening(&nodes, &wire.channel) => {}
            () = wire.channel.unheard() => {}
        }
        wire.channel.rest();
        // Who subscribes does so before it looks whether somebody listens.
        if running.end_if(|| !wire.channel.is_heard()) {
            return;
        }
    }
}

/// Listens again after every failure, and never ends.
async fn keep_listening(nodes: &Nodes, channel: &Channel) {
    let (mut backoff, mut told) = (BACKOFF.0, false);
    let mut trouble = Trouble::new(REMIND);
    loop {
        match listen_once(nodes, channel, &mut backoff).await {
            Ok(End::Closed) => {
                tracing::info!(node = %channel.node, "the listening connection ended");
                channel.interrupt("the listening connection ended");
            }
            Ok(End::Pooled) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(node = %channel.node, "{IS_POOLED}");
                }
                channel.give_up(IS_POOLED);
                sleep(jitter(POOLED)).await;
                continue;
            }
            Err(error) => {
                // Hints arrived since it was said last.
                if backoff == BACKOFF.0 {
                    trouble.end();
                }
                if trouble.meet(Instant::now()) {
                    tracing::warn!(node = %channel.node, error = %error.chain(), "listening failed");
                }
                channel.interrupt(&error.chain());
            }
        }
        ::metrics::counter!(names::LISTENER_LOST).increment(1);
        sleep(jitter(backoff)).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
}

/// How a listening connection ended.
enum End {
    Closed,
    /// A pooler stands before the server.
    Pooled,
}

/// What was asked for.
type Answer<'a> = BoxFuture<'a, Result<()>>;

/// One life of a listening connection.
async fn listen_once(nodes: &Nodes, channel: &Channel, backoff: &mut Duration) -> Result<End> {
    channel.begin();
    let (at, node) = nodes.listen_at(channel.node).await?;
    let (ListenAt::Node(from) | ListenAt::Given(from)) = &at;
    // At an address that was given for listening no pooler is looked for.
    let trusted = matches!(at, ListenAt::Given(_));
    let what = "connect to listen for hints";
    let place = Place::Node(channel.node);
    let target = listen::target(from, &nodes.presence().name(place))?;
    let session = listen::open(&target, what, trusted, node.newest()).await?;
    let Some(Session { client, mut messages, primary }) = session else {
        return Ok(End::Pooled);
    };
    // The connection is driven while statements are answered; what is heard meanwhile goes out too.
    let begin = listen::begin(&client, &[HINTS]);
    let begin = begin.map_err(|error| connect::refused(error, "listen for hints"));
    let mut under_way = OptionFuture::from(Some(Box::pin(begin) as Answer<'_>));
    let (mut answered, mut present, mut arrives) = (false, None, false);
    let mut pulse = Pulse::new();
    loop {
        tokio::select! {
            Some(answer) = &mut under_way => {
                under_way = None.into();
                answered = true;
                match answer {
                    Ok(()) => {}
                    Err(error) if present.is_none() => return Err(error),
                    // That is no fault of this connection; whether hints arrive is not known any
                    // more.
                    Err(error) => if pulse.not_sent() {
                        channel.interrupt(&error.chain());
                        arrives = false;
                    }
                }
                if present.is_none() {
                    present = Some(nodes.presence().arrive(place));
                    pulse.begin();
                }
            }
            message = messages.next() => {
                let Some(message) = message else { return Ok(End::Closed) };
                let message = message.map_err(|error| connect::refused(error, "listen for hints"))?;
                // Listen first, look second: nothing can fall in between.
                if hear(channel, &message, &mut pulse) && !std::mem::replace(&mut arrives, true) {
                    *backoff = BACKOFF.0;
                    channel.arrive();
                }
            },
            // What it was may still be there, and send hints to nobody else.
            () = nodes.leaves(channel.node, &node, primary) => return Ok(End::Closed),
            () = pulse.due() => {
                pulse.ask()?;
                if std::mem::replace(&mut answered, false) {
                    let canary = send(nodes, channel.node, pulse.canary());
                    under_way = Some(Box::pin(canary) as Answer<'_>).into();
                }
            }
        }
    }
}

/// As hints are sent: where their way leads elsewhere than here, none comes back.
async fn send(nodes: &Nodes, node: NodeId, canary: String) -> Result<()> {
    in_time(ANSWER / 2, "send a canary", notify(nodes, node, &canary)).await
}

/// Takes what the server says. True where it is this process' own canary: others' may be of another
/// node.
fn hear(channel: &Channel, message: &AsyncMessage, pulse: &mut Pulse) -> bool {
    let AsyncMessage::Notification(note) = message else { return false };
    if note.channel() != HINTS {
        return false;
    }
    let partitions = parse(note.payload());
    let own = pulse.heard(note.payload(), !partitions.is_empty());
    if let Some(round_trip) = own {
        channel.measured(round_trip);
    }
    channel.hear(partitions);
    own.is_some()
}

/// When a connection was heard of last, and which canary is under way.
struct Pulse {
    due: Instant,
    asked: bool,
    /// What this process knows its canary by, and when it was sent.
    canary: Option<(String, Instant)>,
    measure_at: Instant,
    /// How many could not be sent, one after the other.
    unsent: u32,
}

impl Pulse {
    /// Of a connection that is asked to listen.
    fn new() -> Self {
        let now = Instant::now();
        Self { due: now + jitter(QUIET), asked: false, canary: None, measure_at: now, unsent: 0 }
    }

    /// It listens: a canary is due.
    fn begin(&mut self) {
        (self.due, self.asked) = (Instant::now(), false);
    }

    async fn due(&self) {
        sleep_until(self.due).await;
    }

    /// A hint, or a canary. How long that took, where it is this process' own, which is waited for
    /// whatever else is heard.
    fn heard(&mut self, payload: &str, is_hint: bool) -> Option<Duration> {
        let own = self.canary.take_if(|(canary, _)| canary == payload);
        let quiet = if is_hint { QUIET } else { IDLE };
        let due = (Instant::now() + jitter(quiet)).min(self.measure_at);
        // What others send puts off neither the answer nor, where none could be sent, the next try.
        self.due = match &self.canary {
            Some((_, sent)) => due.min(*sent + ANSWER),
            None if self.unsent > 0 && own.is_none() => due.min(self.due),
            None => due,
        };
        self.asked = self.canary.is_some();
        let (_, sent) = own?;
        self.unsent = 0;
        Some(sent.elapsed())
    }

    /// Asks, or fails where the last question was not answered.
    fn ask(&mut self) -> Result<()> {
        if self.asked {
            let what = "listen for hints: a canary through the channel did not come back (is it the node's \
                        database where we listen, and no pooler?)";
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        let now = Instant::now();
        (self.due, self.asked, self.measure_at) = (now + ANSWER, true, now + jitter(MEASURE));
        Ok(())
    }

    /// It could not be sent: another try comes soon. True where it is not the first.
    fn not_sent(&mut self) -> bool {
        self.canary = None;
        (self.due, self.asked) = (Instant::now() + jitter(AGAIN), false);
        self.unsent += 1;
        self.unsent > 1
    }

    /// A canary to be sent now.
    fn canary(&mut self) -> String {
        let canary = format!("beat {}", uuid::Uuid::new_v4().simple());
        self.canary = Some((canary.clone(), Instant::now()));
        canary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            pulse.heard("", hint);
            let heard = Instant::now();
            pulse.due().await;
            assert!(heard.elapsed() <= Duration::from_secs(longest), "{:?}", heard.elapsed());
            pulse.ask().unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_measures_its_own_canaries_also_where_hints_keep_coming() {
        let mut pulse = Pulse::new();
        pulse.begin();
        let begun = Instant::now();
        pulse.due().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        pulse.ask().unwrap();
        let canary = pulse.canary();
        tokio::time::advance(Duration::from_millis(3)).await;
        assert_eq!(pulse.heard("beat of another", false), None);
        assert_eq!(pulse.heard(&canary, false), Some(Duration::from_millis(3)));
        assert_eq!(pulse.heard(&canary, false), None);
        while begun.elapsed() < Duration::from_secs(75) {
            pulse.heard("10101", true);
            if tokio::time::timeout(Duration::from_secs(1), pulse.due()).await.is_ok() {
                return pulse.ask().unwrap();
            }
        }
        panic!("none was due in {:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_send_puts_off_neither_an_answer_nor_the_next_try() {
        let mut pulse = Pulse::new();
        pulse.begin();
        pulse.ask().unwrap();
        pulse.canary();
        let begun = Instant::now();
        // Hints of others, all the time.
        let heard = async |pulse: &mut Pulse| {
            loop {
                pulse.heard("10101", true);
                if tokio::time::timeout(Duration::from_millis(100), pulse.due()).await.is_ok() {
                    return;
                }
            }
        };
        heard(&mut pulse).await;
        assert!(begun.elapsed() <= ANSWER, "{:?}", begun.elapsed());
        assert!(pulse.ask().is_err());

        let mut pulse = Pulse::new();
        pulse.begin();
        pulse.ask().unwrap();
        pulse.canary();
        assert!(!pulse.not_sent());
        let begun = Instant::now();
        heard(&mut pulse).await;
        assert!(begun.elapsed() <= 2 * AGAIN, "{:?}", begun.elapsed());
        pulse.ask().unwrap();
        assert!(pulse.not_sent());
    }
}
