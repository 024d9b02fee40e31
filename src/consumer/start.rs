//! Where a group starts, resolved once: to a time, kept in control and on each node.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;

use crate::cluster::Cluster;
use crate::consumer::Start;
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{MessageId, NodeId};
use crate::name::GroupName;
use crate::store::connect::refused;
use crate::store::group::StartAt;
use crate::store::{control, group, node, sql};
use crate::topology::Topology;

/// By how much earlier a node starts that could not be asked when the group began at "latest": its
/// clock may be short of control's.
const LATEST_MARGIN: Duration = Duration::from_mins(1);

/// How long a database may take to say where a group starts.
const ANSWER: Duration = Duration::from_secs(5);

/// What a node is told that does not know the group yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupStart(StartAt);

/// Finds out where the group starts, and tells all nodes that can be reached.
pub(crate) async fn resolve(
    cluster: &Cluster,
    topology: &Topology,
    name: &GroupName,
    wanted: Start,
    broadcast: bool,
) -> Result<GroupStart> {
    match recorded(cluster, topology, name).await {
        Ok(Some(known)) => return Ok(known),
        Ok(None) => {}
        Err(error) if error.is_transient() => {
            return known_by_nodes(cluster, topology, name, error).await;
        }
        Err(error) => return Err(error),
    }
    // Nodes first: whoever finds the group in control finds it on them too.
    let start = StartAt { broadcast, ..of(cluster, wanted).await? };
    let nodes: Vec<NodeId> = topology.by_node().into_keys().collect();
    let told = nodes.into_iter().map(|node| tell(cluster, topology, name, node, start));
    for error in join_all(told).await.into_iter().filter_map(Result::err) {
        tracing::warn!(group = %name, error = %error.chain(), "a node hears of the group later");
    }
    let connection = cluster.inner.control.get().await?;
    control::make_group(connection, topology.identity(), name, start)
        .await
        .map_err(|error| refused(error, &format!("record where group {name} starts")))?;
    // As it is recorded: somebody else may have been first, and the clock is control's, not this
    // machine's.
    let recorded = recorded(cluster, topology, name).await?;
    recorded.ok_or_else(|| {
        let what = format!("topic {} was deleted meanwhile", topology.topic);
        Error::new(ErrorKind::NotFound, what)
    })
}

/// Where the group starts, if the control database knows it.
pub(crate) async fn recorded(
    cluster: &Cluster,
    topology: &Topology,
    name: &GroupName,
) -> Result<Option<GroupStart>> {
    let what = format!("look up where group {name} starts");
    let read = async {
        let connection = cluster.inner.control.get().await?;
        let known = control::group_start(&connection, &topology.topic, name).await;
        known.map_err(|error| refused(error, &what))
    };
    let known = in_time(ANSWER, &what, read).await?;
    Ok(known.map(|(start, by_clock)| GroupStart(later(start, by_clock))))
}

/// Where the group starts by the account of the nodes, while the control database is away.
async fn known_by_nodes(
    cluster: &Cluster,
    topology: &Topology,
    name: &GroupName,
    error: Error,
) -> Result<GroupStart> {
    on_nodes(cluster, topology, name).await.ok_or_else(|| {
        let what =
            format!("no node that answers knows group {name}, and the control database is away");
        Error::with_source(ErrorKind::Unavailable, what, error)
    })
}

/// Where the group starts by the account of the nodes, if one that answers knows it: each goes on
/// from where it says, and one that does not know starts no later than any other, by any clock.
pub(crate) async fn on_nodes(
    cluster: &Cluster,
    topology: &Topology,
    name: &GroupName,
) -> Option<GroupStart> {
    let asked = topology.by_node().into_keys().map(|id| async move {
        let what = format!("look up where group {name} starts on node {id}");
        in_time(ANSWER, &what, async {
            let connection = cluster.inner.nodes.node(id).await?.get().await?;
            let known = group::start(&connection, &topology.topic, name).await;
            known.map_err(|error| refused(error, &what))
        })
        .await
    });
    let answers = join_all(asked).await.into_iter().filter_map(Result::ok);
    let first = answers.flatten().min_by_key(|start| start.at);
    first.map(|start| GroupStart(later(start, true)))
}

/// What a node is told later.
fn later(start: StartAt, by_clock: bool) -> StartAt {
    let earlier = |at: SystemTime| at.checked_sub(LATEST_MARGIN).unwrap_or(UNIX_EPOCH);
    if by_clock { StartAt { at: start.at.map(earlier), ..start } } else { start }
}

/// The time and id that a start stands for.
pub(crate) async fn of(cluster: &Cluster, start: Start) -> Result<StartAt> {
    let (at, id) = match start {
        Start::Earliest => (Some(UNIX_EPOCH), None),
        Start::Latest => (None, None),
        Start::At(time) => (Some(time), None),
        Start::Id(id) => (appended_at(cluster, id).await?, Some(id.number())),
    };
    Ok(StartAt { at, id, broadcast: false })
}

/// When the first message at or after an id was appended; none where there is none yet.
async fn appended_at(cluster: &Cluster, id: MessageId) -> Result<Option<SystemTime>> {
    let partition = id.partition();
    let connection = cluster.inner.nodes.node(partition.node()).await?.get().await?;
    let rows =
        node::query(&connection, sql::APPENDED_AT, &[&partition.as_i32(), &id.number()]).await;
    let rows = rows.map_err(|error| refused(error, &format!("look up message {id}")))?;
    Ok(rows.first().and_then(|row| row.get(0)))
}

/// Tells a node where the group starts, unless it knows.
async fn tell(
    cluster: &Cluster,
    topology: &Topology,
    name: &GroupName,
    id: NodeId,
    start: StartAt,
) -> Result<()> {
    let refused = |error| refused(error, &format!("start group {name} on node {id}"));
    let node = cluster.inner.nodes.node(id).await?;
    let connection = node.get().await?;
    if group::start(&connection, &topology.topic, name).await.map_err(refused)?.is_some() {
        return Ok(());
    }
    group::write_start(connection, topology.identity(), name, start).await.map_err(refused)
}

impl GroupStart {
    /// Records it in the control database, where it is not known: a group that is consumed may have
    /// been removed there, by somebody who took its consumers for gone.
    pub(crate) async fn record(
        &self,
        cluster: &Cluster,
        topology: &Topology,
        name: &GroupName,
    ) -> Result<(), Error> {
        let what = format!("record where group {name} starts");
        in_time(ANSWER, &what, async {
            let connection = cluster.inner.control.get().await?;
            let made = control::make_group(connection, topology.identity(), name, self.0).await;
            made.map_err(|error| refused(error, &what))
        })
        .await
    }

    /// Tells a node that may have been away when the group began.
    pub(crate) async fn tell(
        &self,
        cluster: &Cluster,
        topology: &Topology,
        name: &GroupName,
        node: NodeId,
    ) -> Result<(), Error> {
        tell(cluster, topology, name, node, self.0).await
    }
}
