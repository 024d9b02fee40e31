//! What one consumer of very many partitions costs while nothing comes: statements and connections of each
//! node, and memory. The statements are counted in the servers' logs; `pg_stat_database` shows more
//! transactions than that, also without autovacuum, for a reason that was not found.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, NodeId, TopicOptions};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::Size;
use crate::spread::Spread;

/// How each line of a log begins that says a statement.
const MARK: &str = "statement of ";

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

async fn connections(admins: &[(Client, String)]) -> Vec<f64> {
    let mut all = Vec::new();
    for (admin, name) in admins {
        let open = "select count(*) from pg_stat_activity where datname = $1";
        all.push(admin.query_one(open, &[name]).await.unwrap().get::<_, i64>(0) as f64);
    }
    all
}

/// How many statements each database was sent by now. What begins and ends a transaction is sent along
/// with the statement between, and not counted.
fn statements(servers: &[Server]) -> HashMap<String, u32> {
    let mut all = HashMap::new();
    for server in servers {
        let log = fs::read(server.data_dir().with_file_name("server.log")).unwrap();
        for line in String::from_utf8_lossy(&log).lines() {
            let Some((database, said)) = line.strip_prefix(MARK).and_then(|l| l.split_once('|'))
            else {
                continue;
            };
            let text = said.split_once(": ").and_then(|(_, said)| said.split_once(": "));
            let counted = !text.is_some_and(|(_, text)| {
                text.trim() == "commit" || text.starts_with("-- Begins a transaction")
            });
            if said.starts_with("LOG:") && counted {
                *all.entry(database.to_owned()).or_default() += 1;
            }
        }
    }
    all
}

fn memory_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
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
    let after = memory_mib();
    let first = statements(&servers);
    sleep(Duration::from_secs(seconds)).await;
    let last = statements(&servers);
    let mut admins = Vec::new();
    // The first one has the control database too.
    for (admin, name) in nodes.iter().skip(1) {
        admins.push((connect(admin).await, name.clone()));
    }
    let per_5_s = admins.iter().map(|(_, name)| {
        let count = |counts: &HashMap<String, u32>| f64::from(*counts.get(name).unwrap_or(&0));
        (count(&last) - count(&first)) / seconds as f64 * 5.0
    });
    println!("idle: one consumer, {partitions} partitions, {count} nodes, for {seconds} s");
    println!("  all taken in {:.1} s", taken.as_secs_f64());
    println!("  statements in 5 s, by node: {}", Spread::of(per_5_s.collect()).text());
    println!("  connections, by node: {}", Spread::of(connections(&admins).await).text());
    println!("  memory: {before:.0} MiB before, {after:.0} MiB after");
    messages.shutdown(Duration::from_secs(30)).await.unwrap();
    cluster.shutdown().await;
}

async fn started() -> Server {
    let builder = Server::builder().durable(false).trusts_everybody();
    let builder = builder.setting("max_connections", "400");
    let builder = builder.setting("log_statement", "all");
    let builder = builder.setting("log_line_prefix", format!("{MARK}%d|"));
    builder.setting("max_locks_per_transaction", "256").start().await.unwrap()
}
