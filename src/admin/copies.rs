//! Copies of a cluster. A database that was restored from a dump carries the original's identity.
//! The copy becomes a cluster of its own, or takes the original's place.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::migrate::{self, Schema};
use crate::store::connect::{self, refused};
use crate::store::param::{Param, typed};
use crate::store::session::{Single, Value};
use crate::store::{place, sql};

/// The setting by which an adoption that was cut off goes on with the same id.
const ADOPTING: &str = "adopting";
const NAME: &str = "shardmq cluster";

/// What [`moved`] has found on another server than before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Moved {
    /// Whether it is the control database.
    pub control: bool,
    /// Nodes.
    pub nodes: Vec<NodeId>,
    /// Nodes that did not answer: to be called again, when they do.
    pub away: Vec<NodeId>,
}

/// Makes a cluster of its own of a copy: of a control database that was restored from a dump, by
/// its URL, and of copies of all its nodes, by number. It gets another id, which is returned, and
/// its nodes get these addresses. The original is not touched. Its consumers, the outboxes that
/// were registered with it, and its addresses for listening are forgotten in the copy. Where it is
/// cut off, it is to be called again.
///
/// # Errors
/// [`ErrorKind::Conflict`] where the control database, or a node, is no copy but the original, or
/// is of another cluster or number; [`ErrorKind::Invalid`] where a node of the cluster is not
/// named, or one that it does not have. Nothing is changed then.
pub async fn adopt(url: &str, nodes: &[(NodeId, String)]) -> Result<Uuid> {
    let what = "adopt a copy of a cluster";
    let control = connect::connect_once(url, NAME).await?;
    migrate::check(control.session(), Schema::Control).await?;
    let (before, place) = which(&control, what).await?;
    if !place.is_copy() {
        return Err(Error::new(ErrorKind::Conflict, "this control database is no copy, and stays"));
    }
    let given: BTreeMap<NodeId, &str> = nodes.iter().map(|(id, url)| (*id, url.as_str())).collect();
    let known = addresses(&control).await?;
    if let Some(node) = known.keys().find(|node| !given.contains_key(node)) {
        return Err(Error::invalid(format!(
            "node {node} of the cluster needs the address of its copy"
        )));
    }
    if let Some(node) = given.keys().find(|node| !known.contains_key(node)) {
        return Err(Error::invalid(format!("the cluster has no node {node}")));
    }
    let adopted = begun(&control, what).await?;
    let mut copies = Vec::new();
    for (id, url) in &given {
        copies.push((*id, *url, Copy::find(*id, url, &[before, adopted]).await?));
    }
    if let Some((id, ..)) =
        copies.iter().find(|(.., copy)| copy.cluster == before && !copy.elsewhere)
    {
        let what = format!("the address of node {id} leads to the original, and not to a copy");
        return Err(Error::new(ErrorKind::Conflict, what));
    }
    for (_, _, copy) in &copies {
        copy.becomes(adopted).await?;
    }
    let mut addresses = Vec::new();
    for (id, url, _) in &copies {
        addresses.push((i32::from(id.number()), connect::without_password(url)?));
    }
    record(&control, adopted, &addresses, &place).await?;
    Ok(adopted)
}

/// The control database is that of this cluster from now on, with nodes at these addresses.
async fn record(
    control: &Single,
    cluster: Uuid,
    addresses: &[(i32, String)],
    place: &place::Place,
) -> Result<()> {
    // What their newest primaries are is found out.
    let unknown: Option<i64> = None;
    let nodes: Vec<[&dyn Param; 4]> = addresses
        .iter()
        .map(|(number, address)| -> [&dyn Param; 4] { [number, address, &unknown, &unknown] })
        .collect();
    let adopt: [&dyn Param; 2] = [&cluster, &place.here];
    let mut changes: Vec<Change<'_>> =
        nodes.iter().map(|node| (sql::CONTROL_ADD_NODE, &node[..])).collect();
    changes.extend([(sql::CONTROL_ADOPT, &adopt[..]), (sql::CONTROL_BUMP, &[])]);
    write(control, &changes, "adopt a copy of a cluster").await
}

/// Says that a cluster has moved: that what seems to be a copy, as of a dump that was restored or
/// of an upgrade to another major version, is the cluster itself from now on, and the original is
/// gone. Of the control database at this URL, and of the nodes where their addresses lead.
/// Idempotent.
///
/// # Errors
/// [`ErrorKind::Conflict`] where an address leads to another cluster's node, or one of another
/// number.
pub async fn moved(url: &str) -> Result<Moved> {
    let what = "say that a cluster has moved";
    let control = connect::connect_once(url, NAME).await?;
    migrate::check(control.session(), Schema::Control).await?;
    let (cluster, place) = which(&control, what).await?;
    let mut moved = Moved { control: place.is_copy(), ..Moved::default() };
    let mut found = Vec::new();
    for (id, url) in addresses(&control).await? {
        match Copy::find(id, &url, &[cluster]).await {
            Ok(copy) => {
                if copy.elsewhere {
                    copy.becomes(cluster).await?;
                    moved.nodes.push(id);
                }
                found.push((i32::from(id.number()), copy.here));
            }
            Err(error) if error.kind() == ErrorKind::Unavailable => moved.away.push(id),
            Err(error) => return Err(error),
        }
    }
    let stand: [&dyn Param; 1] = [&place.here];
    // The timelines that are known belong to the servers before.
    let nodes: Vec<[&dyn Param; 2]> =
        found.iter().map(|(id, here)| -> [&dyn Param; 2] { [id, here] }).collect();
    let mut changes: Vec<Change<'_>> =
        nodes.iter().map(|node| (sql::CONTROL_MOVED_NODE, &node[..])).collect();
    changes.push((sql::CONTROL_BUMP, &[]));
    if moved.control {
        changes.push((sql::CONTROL_STAND, &stand));
    }
    write(&control, &changes, what).await?;
    Ok(moved)
}

/// The cluster of a control database, and where that was and is.
async fn which(control: &Single, what: &str) -> Result<(Uuid, place::Place)> {
    let found = place::of_control(control.session()).await;
    let found = found.map_err(|error| refused(error, what))?;
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{what}: there is no cluster")))
}

/// A database that may be a copy of a node.
struct Copy {
    single: Single,
    node: NodeId,
    cluster: Uuid,
    here: Option<String>,
    elsewhere: bool,
}

impl Copy {
    /// The node of this number, of one of these clusters.
    async fn find(node: NodeId, url: &str, clusters: &[Uuid]) -> Result<Self> {
        let single = connect::connect_once(url, NAME).await?;
        migrate::check(single.session(), Schema::Node).await?;
        let what = format!("ask node {node} who it is");
        let found =
            place::of_node(single.session()).await.map_err(|error| refused(error, &what))?;
        let is_it = |number: i32, cluster| {
            number == i32::from(node.number()) && clusters.contains(&cluster)
        };
        match found {
            Some((cluster, number, place)) if is_it(number, cluster) => {
                let elsewhere = place.is_copy();
                Ok(Self { single, node, cluster, here: place.here, elsewhere })
            }
            _ => {
                let what = format!("the address of node {node} leads to something else");
                Err(Error::new(ErrorKind::Conflict, what))
            }
        }
    }

    /// It is this cluster's from now on, and where it is.
    async fn becomes(&self, cluster: Uuid) -> Result<()> {
        let number = i32::from(self.node.number());
        let params: [&dyn Param; 4] = [&cluster, &number, &self.here, &self.cluster];
        let what = format!("say which node {} is", self.node);
        write(&self.single, &[(sql::IDENTITY_ADOPT, &params)], &what).await
    }
}

/// The id of an adoption, drawn with the first attempt.
async fn begun(control: &Single, what: &str) -> Result<Uuid> {
    let settings = read(control, sql::CONTROL_SETTINGS, what).await?;
    let begun = settings.iter().find(|row| row.get::<_, &str>(0) == ADOPTING);
    if let Some(id) = begun.and_then(|row| Uuid::parse_str(row.get(1)).ok()) {
        return Ok(id);
    }
    let id = Uuid::new_v4();
    write(control, &[(sql::CONTROL_SET, &[&ADOPTING, &id.to_string()])], what).await?;
    Ok(id)
}

async fn addresses(control: &Single) -> Result<BTreeMap<NodeId, String>> {
    let rows = read(control, sql::CONTROL_NODES, "read the nodes").await?;
    let node = |row: &Row| NodeId::new(u8::try_from(row.get::<_, i32>(0)).ok()?).ok();
    Ok(rows.iter().filter_map(|row| Some((node(row)?, row.get(1)))).collect())
}

/// A statement with its parameters.
type Change<'a> = (&'a str, &'a [&'a dyn Param]);

/// Makes changes in one transaction.
async fn write(single: &Single, changes: &[Change<'_>], what: &str) -> Result<()> {
    let changes: Vec<(&str, Vec<Value<'_>>)> =
        changes.iter().map(|(text, params)| (*text, typed(params))).collect();
    let changes: Vec<(&str, &[Value<'_>])> =
        changes.iter().map(|(text, params)| (*text, &params[..])).collect();
    single.write(&changes).await.map(drop).map_err(|error| refused(error, what))
}

async fn read(single: &Single, statement: &str, what: &str) -> Result<Vec<Row>> {
    single.session().query(statement, &[]).await.map_err(|error| refused(error, what))
}
