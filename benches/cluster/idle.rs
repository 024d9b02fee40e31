//! What one consumer of very many partitions costs while nothing comes: transactions and connections of each
//! node, and memory.

use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, NodeId, TopicOptions};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::Size;
use crate::spread::Spread;

/// What a node has done and has open.
struct Used {
    transactions: i64,
    connections: i64,
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Clones of one migrated database, on some servers in turn.
async fn nodes(servers: &[Server], count: u8) -> Vec<(String, String)> {
    for server in servers {
        server.create_database("template").await.unwrap();
        for schema in [Schema::Node, Schema::Control] {
            migrate(&server.url("template"), schema).await.unwrap();
        }
    }
    let mut nodes = Vec::new();
    for number in 0..count {
        let (server, name) = (&servers[usize::from(number) % servers.len()], format!("n{number}"));
        let admin = connect(&server.url("postgres")).await;
        let clone = format!("create database {name} template template");
        admin.batch_execute(&clone).await.unwrap();
        nodes.push((server.url("postgres"), name));
    }
    nodes
}

async fn used(admins: &[(Client, String)]) -> Vec<Used> {
    let mut all = Vec::new();
    for (admin, name) in admins {
        let row = admin
            .query_one(
                "select xact_commit + xact_rollback,
                        (select count(*) from pg_stat_activity a where a.datname = d.datname)
                   from pg_stat_database d where datname = $1",
                &[name],
            )
            .await
            .unwrap();
        all.push(Used { transactions: row.get(0), connections: row.get(1) });
    }
    all
}

fn memory_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

pub(crate) async fn measure(size: Size) {
    let (count, each, seconds) = if size == Size::Small { (3, 3, 1) } else { (99, 99, 60) };
    let servers = [started().await, started().await, started().await];
    let nodes = nodes(&servers, count).await;
    let url = |(admin, name): &(String, String)| admin.replace("/postgres", &format!("/{name}"));
    let control = url(&nodes[0]);
    let cluster = Cluster::builder(&control).upkeep(false).connect().await.unwrap();
    for (node, number) in nodes.iter().zip(1..) {
        cluster.add_node(NodeId::new(number).unwrap(), &url(node)).await.unwrap();
    }
    let partitions = usize::from(count) * each;
    cluster.create_topic("idle", TopicOptions::partitions(partitions)).await.unwrap();
    cluster.shutdown().await;

    let cluster = Cluster::builder(&control).upkeep(false).connect().await.unwrap();
    let before = memory_mib();
    let begun = Instant::now();
    let messages = cluster.consumer("idle", "g").stream().await.unwrap();
    while messages.handle().held_partitions() < partitions {
        sleep(Duration::from_millis(10)).await;
    }
    let taken = begun.elapsed();
    sleep(Duration::from_secs(seconds / 3)).await;
    let mut admins = Vec::new();
    for (admin, name) in &nodes {
        admins.push((connect(admin).await, name.clone()));
    }
    let first = used(&admins).await;
    sleep(Duration::from_secs(seconds)).await;
    let last = used(&admins).await;
    // The first one has the control database too.
    let pairs = first.iter().zip(&last).skip(1);
    let per_5_s = pairs.map(|(first, last)| {
        (last.transactions - first.transactions) as f64 / seconds as f64 * 5.0
    });
    let connections = last.iter().skip(1).map(|used| used.connections as f64).collect();
    println!("idle: one consumer, {partitions} partitions, {count} nodes, for {seconds} s");
    println!("  all taken in {:.1} s", taken.as_secs_f64());
    println!("  transactions in 5 s, by node: {}", Spread::of(per_5_s.collect()).text());
    println!("  connections, by node: {}", Spread::of(connections).text());
    println!("  memory: {before:.0} MiB before, {:.0} MiB now", memory_mib());
    messages.shutdown(Duration::from_secs(30)).await.unwrap();
    cluster.shutdown().await;
}

async fn started() -> Server {
    let builder = Server::builder().durable(false).setting("max_connections", "400");
    builder.setting("max_locks_per_transaction", "256").start().await.unwrap()
}
