//! Private servers that are a whole cluster, for `dev` and `demo`.

use futures_util::future::{join_all, try_join_all};
use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, NodeId, Result};

use crate::output::note;

const DATABASE: &str = "shardmq";

/// A node on a server of its own.
pub(crate) struct Node {
    pub(crate) number: NodeId,
    pub(crate) server: Server,
}

impl Node {
    pub(crate) fn url(&self) -> String {
        self.server.url(DATABASE)
    }
}

/// Starts so many servers, migrates them, and registers them as nodes. The first one's database holds
/// the control and log schemas too. If dropped, what was started is stopped soon after.
pub(crate) async fn start(count: u8) -> Result<Vec<Node>> {
    // The first server makes the files that the others copy.
    let mut nodes = vec![start_one(1).await?];
    nodes.extend(try_join_all((2..=count).map(start_one)).await?);
    let control_url = nodes[0].url();
    for schema in [Schema::Control, Schema::Log] {
        migrate(&control_url, schema).await?;
    }
    let cluster = Cluster::connect(&control_url).await?;
    for node in &nodes {
        cluster.add_node(node.number, &node.url()).await?;
    }
    cluster.shutdown().await;
    Ok(nodes)
}

async fn start_one(number: u8) -> Result<Node> {
    let number = NodeId::new(number)?;
    let server = Server::builder().start().await?;
    server.create_database(DATABASE).await?;
    let node = Node { number, server };
    migrate(&node.url(), Schema::Node).await?;
    Ok(node)
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
