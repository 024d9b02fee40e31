//! Sessions that listen, outside of any pool.
//!
//! A pooler in transaction mode would let its own connection listen, for anybody. So where an address
//! leads to a pooler, nobody listens.

use tokio_postgres::{Client, Error};

use crate::error::Result;
use crate::store::connect;
use crate::store::pooler::Marker;
use crate::store::sql;
use crate::store::target::{Messages, Target};

/// The channel of a node's hints.
pub(crate) const HINTS: &str = "shardmq";
/// The channel of the control database, which tells of each new version of the topology.
pub(crate) const TOPOLOGY: &str = "shardmq_topology";
/// Another one there, which tells of groups: `topic group`.
pub(crate) const GROUPS: &str = "shardmq_group";
/// The channel of an outbox, on which a relay is woken.
pub(crate) const OUTBOX: &str = "shardmq_outbox";

/// A connection to listen on.
pub(crate) struct Session {
    pub(crate) client: Client,
    /// What the server says. Whoever has the session must go on reading this, also while a statement
    /// is under way: the connection is driven by it.
    pub(crate) messages: Messages,
    /// What the session must have if no pooler opened it; none where that is not asked.
    pub(crate) marker: Option<Marker>,
}

/// Where to listen, under a name for the session. Whoever keeps it goes first to the host that let it in
/// before.
pub(crate) fn target(url: &str, name: &str) -> Result<Target> {
    let mut target = connect::parse(url)?;
    target.config.application_name(name);
    Ok(target)
}

/// Opens a session; none where a pooler is known to stand before the server. With `trusted` nothing is
/// looked for.
pub(crate) async fn open(target: &Target, what: &str, trusted: bool) -> Result<Option<Session>> {
    let marker = Marker::new();
    let opened = target.connect(what, Some(&marker)).await?;
    let direct = opened.marked || trusted;
    let (client, messages, marker) = (opened.client, opened.messages, (!trusted).then_some(marker));
    Ok(direct.then_some(Session { client, messages, marker }))
}

/// Asks to hear of everything in these channels; false where a pooler answers, which is not asked.
pub(crate) async fn begin(
    client: &Client,
    marker: Option<&Marker>,
    channels: &[&str],
) -> Result<bool, Error> {
    if let Some(marker) = marker
        && !marker.is_there(client).await?
    {
        return Ok(false);
    }
    let all: Vec<String> = channels.iter().map(|channel| format!("listen {channel}")).collect();
    let bounded = format!("{}; {}; commit", sql::BEGIN_READ, all.join("; "));
    client.batch_execute(&bounded).await?;
    Ok(true)
}
