//! Sessions that listen, outside of any pool.
//!
//! A pooler in transaction mode would let its own connection listen, for anybody. So where an
//! address leads to a pooler, nobody listens.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join;
use tokio_postgres::{Client, Error};

use crate::deadline::in_time;
use crate::error::Result;
use crate::store::connect::{self, refused};
use crate::store::pooler::Marker;
use crate::store::session::Session as Bounded;
use crate::store::sql;
use crate::store::target::{Messages, Older, Opened, Target};
use crate::store::timeline::{self, Newest, Primary};

/// How long a server may take to tell which it is.
const ANSWER: Duration = Duration::from_secs(5);

/// The channel of a node's hints.
pub(crate) const HINTS: &str = "shardmq";
/// The channel of the control database, which tells of each new version of the topology.
pub(crate) const TOPOLOGY: &str = "shardmq_topology";
/// What is told there where not the version is another, but newer primaries are known.
pub(crate) const PRIMARIES: &str = "primaries";
/// Another one there, which tells of groups: `topic group`.
pub(crate) const GROUPS: &str = "shardmq_group";
/// The channel of an outbox, on which a relay is woken.
pub(crate) const OUTBOX: &str = "shardmq_outbox";

/// A connection to listen on.
pub(crate) struct Session {
    pub(crate) client: Client,
    /// What the server says. Whoever has the session must go on reading this, also while a
    /// statement is under way: the connection is driven by it.
    pub(crate) messages: Messages,
    /// Where it leads, where that is known.
    pub(crate) primary: Option<Primary>,
}

/// Where to listen, under a name for the session. Whoever keeps it goes first to the host that let
/// it in before.
pub(crate) fn target(url: &str, name: &str) -> Result<Target> {
    let mut target = connect::parse(url)?;
    target.config.application_name(name);
    Ok(target)
}

/// Opens a session on a primary that is no older one; none where a pooler stands before the server,
/// which is not asked to listen. With `trusted` none is looked for.
pub(crate) async fn open(
    target: &Target,
    what: &str,
    trusted: bool,
    newest: &Newest,
) -> Result<Option<Session>> {
    let mut older = Vec::new();
    // Each time without one host more.
    loop {
        let marker = Marker::new();
        let opened = target.connect(what, Some(&marker), &older).await?;
        if !(opened.marked || trusted) {
            return Ok(None);
        }
        let Opened { client, mut messages, host, .. } = opened;
        let marker = (!trusted).then_some(&marker);
        let asking = driven(&mut messages, ask(&client, marker));
        let asked = async { asking.await.map_err(|error| refused(error, what)) };
        let (is_direct, primary) = in_time(ANSWER, what, asked).await?;
        if !is_direct {
            return Ok(None);
        }
        match newest.newer_than(primary) {
            Some(newer) => older.push(Older { host, why: newest.refusal(primary, newer) }),
            None => return Ok(Some(Session { client, messages, primary })),
        }
    }
}

/// Whether no pooler made the session, and which primary it is on. In one round trip.
async fn ask(client: &Client, marker: Option<&Marker>) -> Result<(bool, Option<Primary>), Error> {
    let direct = async {
        match marker {
            Some(marker) => marker.is_there(client).await,
            None => Ok(true),
        }
    };
    // Whose settings the session has is not known yet.
    let primary = timeline::primary(Bounded::new(client, false));
    let (direct, primary) = join(direct, primary).await;
    Ok((direct?, primary?))
}

/// An answer on a connection that nobody else drives. Nothing is listened to yet, so nothing is
/// missed.
async fn driven<T>(
    messages: &mut Messages,
    asking: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut asking = std::pin::pin!(asking);
    loop {
        tokio::select! {
            answer = &mut asking => return answer,
            message = messages.next() => match message {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                // It tells why.
                None => return asking.await,
            },
        }
    }
}

/// Asks to hear of everything in these channels.
pub(crate) async fn begin(client: &Client, channels: &[&str]) -> Result<(), Error> {
    let all: Vec<String> = channels.iter().map(|channel| format!("listen {channel}")).collect();
    let bounded = format!("{}; {}; commit", sql::BEGIN_READ, all.join("; "));
    client.batch_execute(&bounded).await
}
