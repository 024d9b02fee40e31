//! Private servers that are a whole cluster.

use futures_util::future::{join_all, try_join_all};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use shardmq::embedded::{Redis, Server};
use shardmq::migrate::{Schema, migrate};
use shardmq::notifier::NotifierKind;
use shardmq::{Cluster, NodeId, Result};
use uuid::Uuid;

use crate::output::note;

/// The database of a server that is its node.
pub(crate) const DATABASE: &str = "shardmq";
/// How many databases are made at once.
const AT_ONCE: usize = 4;

/// A server, and the node that is its first database.
pub(crate) struct Node {
    pub(crate) number: NodeId,
    pub(crate) server: Server,
}

impl Node {
    pub(crate) fn url(&self) -> String {
        self.server.url(DATABASE)
    }
}

/// Starts so many servers, each of them a node.
pub(crate) async fn start(count: u8) -> Result<Vec<Node>> {
    start_on(count, count, 0).await
}

/// Starts at most so many servers, migrates them, and registers so many nodes: those beyond the servers
/// are further databases of these. Returns the servers. The first one's database holds the control and
/// log schemas too. If dropped, what was started is stopped soon after.
///
/// `connections`: how many one client opens to a node.
pub(crate) async fn start_on(count: u8, servers: u8, connections: usize) -> Result<Vec<Node>> {
    let servers = servers.min(count);
    let most = max_connections(usize::from(count.div_ceil(servers.max(1))), connections);
    // The first server makes the files that the others copy.
    let mut first = vec![start_one(1, most).await?];
    first.extend(try_join_all((2..=servers).map(|number| start_one(number, most))).await?);
    let further = (servers + 1..=count).zip(first.iter().cycle());
    let further = stream::iter(further).map(|(number, on)| make_one(number, &on.server));
    let further: Vec<_> = further.buffered(AT_ONCE).try_collect().await?;

    let control_url = first[0].url();
    for schema in [Schema::Control, Schema::Log] {
        migrate(&control_url, schema).await?;
    }
    let cluster = Cluster::connect(&control_url).await?;
    let own = first.iter().map(|node| (node.number, node.server.node_url(DATABASE)));
    let urls = own.chain(further);
    for (number, url) in urls {
        cluster.add_node(number, &url).await?;
    }
    cluster.shutdown().await;
    Ok(first)
}

/// What a server of so many nodes admits: two clients, and some for everything else.
fn max_connections(nodes: usize, connections: usize) -> usize {
    (2 * nodes * (connections + 1) + 50).max(200)
}

async fn start_one(number: u8, max_connections: usize) -> Result<Node> {
    let number = NodeId::new(number)?;
    let builder = Server::builder().setting("max_connections", max_connections.to_string());
    let server = builder.start().await?;
    server.create_database(DATABASE).await?;
    let node = Node { number, server };
    migrate(&node.url(), Schema::Node).await?;
    Ok(node)
}

/// A further node on a server; returns its address.
async fn make_one(number: u8, server: &Server) -> Result<(NodeId, String)> {
    let number = NodeId::new(number)?;
    let name = format!("{DATABASE}{number}");
    server.create_database(&name).await?;
    let url = server.url(&name);
    migrate(&url, Schema::Node).await?;
    Ok((number, server.node_url(&name)))
}

/// Starts a Redis through which the hints of the cluster go from now on, of those who connect from now on.
/// They need its address with the password: the control database keeps none.
pub(crate) async fn start_redis(control_url: &str) -> Result<Redis> {
    let password = Uuid::new_v4().simple().to_string();
    let redis = Redis::builder().password(password).start().await?;
    let cluster = Cluster::connect(control_url).await?;
    let set = cluster.set_notifier(NotifierKind::Redis, Some(&redis.url())).await;
    cluster.shutdown().await;
    set.map(|()| redis)
}

/// Stops all at once, also servers that somebody else started again in the same folders.
pub(crate) async fn stop(nodes: Vec<Node>) {
    let stopped = nodes.into_iter().map(|Node { number, server }| async move {
        if let Err(error) = server.stop().await {
            note(&format!("warning: node {}: {}", number, error.chain()));
        }
    });
    join_all(stopped).await;
}
