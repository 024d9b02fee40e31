//! Keeps up with the control database: by its notifications, and by a look every few seconds. While
//! it can't be reached, all goes on with what is known.
//!
//! ```text
//! listen ── connected, told of a version, ended ──┐
//! every 5 s ──────────────────────────────────────┴─> look: another version? ─> nodes, topics, file
//! ```
//!
//! The same session hears of groups: members that come and go, assignments, seeks.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};
use tokio_postgres::AsyncMessage;

use crate::cluster::cache::Cache;
use crate::cluster::presence::{Place, Presence};
use crate::deadline::{jitter, spread};
use crate::error::{Error, Result};
use crate::store::connect::refused;
use crate::store::listen::{self, GROUPS, PRIMARIES, Session, TOPOLOGY};
use crate::store::target::Target;

/// How often the version of the topology is looked at, give or take a fifth.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Between attempts to listen, give or take a half: after a restart of the control database a whole
/// fleet listens again, and looks.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// The same, where a pooler was met: there may be another address behind it by then.
const POOLED: Duration = Duration::from_mins(1);

/// Where to listen for changes, by the address of the control database.
pub(super) fn listen_at(control: &str, presence: &Presence) -> Result<Target> {
    listen::target(control, &presence.name(Place::Control))
}

/// Keeps up until it is dropped.
pub(super) async fn run(
    cache: Arc<Cache>,
    control: Arc<Target>,
    presence: Arc<Presence>,
    look_every: Duration,
) {
    tokio::join!(look(&cache, look_every), hear(&control, &cache, &presence));
}

async fn look(cache: &Arc<Cache>, every: Duration) {
    let mut trouble = None;
    loop {
        // However it ends: it is time to look.
        let _ = timeout(jitter(every), cache.told()).await;
        let error = cache.look().await.err();
        let kind = error.as_ref().map(Error::kind);
        if let Some(error) = error.filter(|_| kind != trouble) {
            if error.is_transient() {
                tracing::warn!(error = %error.chain(), "no look at the topology, going on with what is known");
            } else {
                tracing::error!(alert = "topology", error = %error.chain(), "the topology is not taken over");
            }
        }
        trouble = kind;
    }
}

/// Listens, again after every failure.
async fn hear(control: &Target, cache: &Cache, presence: &Presence) {
    loop {
        let pause = match hear_once(control, cache, presence).await {
            Ok(End::Pooled) => POOLED,
            Ok(End::Closed) => LISTEN_AGAIN,
            Err(error) => {
                tracing::debug!(error = %error.chain(), "listening to the control database failed");
                LISTEN_AGAIN
            }
        };
        sleep(pause / 2 + spread(pause)).await;
    }
}

/// How a listening connection ended.
enum End {
    Closed,
    /// A pooler stands before the server: changes are found by looking.
    Pooled,
}

async fn hear_once(control: &Target, cache: &Cache, presence: &Presence) -> Result<End> {
    let what = "listen to the control database";
    let session = listen::open(control, what, false, cache.newest()).await?;
    let Some(Session { client, mut messages, primary }) = session else {
        return Ok(End::Pooled);
    };
    // The connection is driven while that is answered.
    let channels = [TOPOLOGY, GROUPS];
    let mut asking = Box::pin(listen::begin(&client, &channels));
    let mut present = None;
    loop {
        tokio::select! {
            answer = &mut asking, if present.is_none() => {
                answer.map_err(|error| refused(error, what))?;
                present = Some(presence.arrive(Place::Control));
                // Listen first, look second: nothing can fall in between.
                cache.warn();
                presence.tell_groups(None);
            }
            message = messages.next() => match message {
                Some(Ok(AsyncMessage::Notification(note))) if note.channel() == GROUPS => {
                    presence.tell_groups(Some(note.payload()));
                }
                Some(Ok(AsyncMessage::Notification(note))) if note.payload() == PRIMARIES => {
                    cache.warn();
                }
                Some(Ok(AsyncMessage::Notification(_))) => cache.tell(),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(refused(error, what)),
                None => return Ok(End::Closed),
            },
            () = cache.newest().overtakes(primary) => return Ok(End::Closed),
        }
    }
}
