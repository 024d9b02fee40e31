//! What needs servers and several processes, or breaks something: run by hand, its figures kept in
//! RESULTS.md; with `--test` or `--quick` once, small.
//!
//! ```sh
//! cargo bench --features cli --bench cluster -- convoy
//! cargo bench --features cli --bench cluster -- failover
//! cargo bench --features cli --bench cluster -- rebalance
//! cargo bench --features cli --bench cluster -- idle
//! cargo bench --features cli --bench cluster -- outbox
//! cargo bench --features cli --bench cluster -- publish
//! cargo bench --features cli --bench cluster -- notify
//! ```

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_precision_loss)]

mod convoy;
mod failover;
mod idle;
mod notify;
mod outbox;
mod rebalance;
mod spread;

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, NodeId};

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Small,
    Whole,
}

#[tokio::main]
async fn main() {
    if let Ok(url) = std::env::var(convoy::CHILD) {
        return convoy::child(&url).await;
    }
    let (flags, names): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with('-'));
    let small = flags.iter().any(|flag| flag == "--test" || flag == "--quick");
    let size = if small { Size::Small } else { Size::Whole };
    let wanted = |name| names.is_empty() || names.iter().any(|wanted| wanted == name);
    if wanted("convoy") {
        convoy::measure(size).await;
    }
    if wanted("failover") {
        failover::measure(size).await;
    }
    if wanted("rebalance") {
        rebalance::measure(size).await;
    }
    if wanted("idle") {
        idle::measure(size).await;
    }
    if wanted("notify") {
        notify::measure(size).await;
    }
    if wanted("outbox") {
        outbox::measure(size).await;
    }
    if wanted("publish") {
        outbox::latency(size).await;
    }
}

/// A server that flushes, with so many connections.
async fn server(connections: u32) -> Server {
    let builder = Server::builder().durable(true).trusts_everybody();
    builder.setting("max_connections", connections.to_string()).start().await.unwrap()
}

/// A cluster of a node on each server; the first has the control database too, which is that of its node.
async fn cluster(servers: &[&Server]) -> (Cluster, String) {
    cluster_by(servers, None).await
}

/// The same; the control database may have another name.
async fn cluster_by(servers: &[&Server], control: Option<&str>) -> (Cluster, String) {
    let mut urls = Vec::new();
    for server in servers {
        server.create_database("node").await.unwrap();
        let url = server.url("node");
        migrate(&url, Schema::Node).await.unwrap();
        urls.push(url);
    }
    let mut control_url = urls[0].clone();
    if let Some(name) = control {
        servers[0].create_database(name).await.unwrap();
        control_url = servers[0].url(name);
    }
    migrate(&control_url, Schema::Control).await.unwrap();
    let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
    for (url, number) in urls.iter().zip(1..) {
        cluster.add_node(NodeId::new(number).unwrap(), url).await.unwrap();
    }
    (cluster, control_url)
}
