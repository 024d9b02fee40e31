//! `shardmq dev`: a cluster of private servers that lives until a signal.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use futures_util::future::join_all;
use serde::Serialize;
use shardmq::NodeId;
use shardmq::embedded::Redis;
use tokio::time::sleep;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, note};
use crate::servers::{self, Node};
use crate::signals::Interrupt;

/// How often to look whether somebody started a dead server again.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Start private servers for development, until a signal ends them.
///
/// All their data is removed at the end. Who has not the addresses that are printed, with their
/// passwords, does not get in: other users of this machine neither. The passwords of nodes are also in
/// files beside their data, which only you may read; so the control database's address is enough.
#[derive(Parser)]
pub(crate) struct Args {
    /// How many nodes, each on a server of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=99))]
    nodes: u8,
    /// Start a Redis too, through which hints go in place of LISTEN/NOTIFY.
    #[arg(long)]
    redis: bool,
}

/// What `--json` prints when all is ready.
#[derive(Serialize)]
struct Ready {
    control_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    redis_url: Option<String>,
    nodes: Vec<ReadyNode>,
}

#[derive(Serialize)]
struct ReadyNode {
    node: NodeId,
    url: String,
    pid: Option<u32>,
    data_dir: PathBuf,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let (nodes, redis) = tokio::select! {
        started = start(args) => started?,
        () = interrupt.caught() => return Ok(()),
    };
    let announced = announce(context, &nodes, redis.as_ref()).await;
    if announced.is_ok() {
        tokio::select! {
            () = interrupt.caught() => {}
            _ = join_all(nodes.iter().map(watch)) => {}
            never = watch_redis(redis.as_ref()) => match never {},
        }
    }
    if let Some(redis) = redis
        && let Err(error) = redis.stop().await
    {
        note(&format!("warning: Redis: {}", error.chain()));
    }
    servers::stop(nodes).await;
    announced
}

async fn start(args: Args) -> Result<(Vec<Node>, Option<Redis>), Failure> {
    let nodes = servers::start(args.nodes).await?;
    if !args.redis {
        return Ok((nodes, None));
    }
    let control_url = nodes.first().map(Node::url).unwrap_or_default();
    let redis = servers::start_redis(&control_url).await?;
    Ok((nodes, Some(redis)))
}

async fn announce(context: &Context, nodes: &[Node], redis: Option<&Redis>) -> Result<(), Failure> {
    let ready = Ready {
        control_url: nodes.first().map(Node::url).unwrap_or_default(),
        redis_url: redis.map(Redis::url),
        nodes: nodes.iter().map(described).collect(),
    };
    let mut out = Out::new();
    if context.json {
        out.json(&ready)?;
    } else {
        for node in &ready.nodes {
            note(&format!("node {}: {}", node.node, node.url));
        }
        if let Some(url) = &ready.redis_url {
            note(&format!("Redis: {url}"));
        }
        note("Ready. Ctrl-C stops the servers and removes their data. In another terminal:");
        out.line(&format!("export SHARDMQ_URL={}", ready.control_url));
        if let Some(url) = &ready.redis_url {
            out.line(&format!("export SHARDMQ_REDIS_URL={url}"));
        }
    }
    out.flush().await
}

fn described(node: &Node) -> ReadyNode {
    ReadyNode {
        node: node.number,
        url: node.url(),
        pid: node.server.pid(),
        data_dir: node.server.data_dir(),
    }
}

/// Reports the end of the Redis. Never returns.
async fn watch_redis(redis: Option<&Redis>) -> Infallible {
    if let Some(redis) = redis {
        let status = redis.exited().await;
        let how = status.map_or_else(String::new, |status| format!(" ({status})"));
        note(&format!("Redis has ended{how}: messages come all the same, by looking"));
    }
    std::future::pending().await
}

/// Reports the server's ends, and that somebody started it again. Never returns.
async fn watch(node: &Node) {
    let number = node.number;
    let status = node.server.exited().await;
    let how = status.map_or_else(String::new, |status| format!(" ({status})"));
    note(&format!("node {number}: its server has ended{how}"));
    let mut was = None;
    loop {
        sleep(LOOK_EVERY).await;
        let pid = node.server.pid();
        match (was, pid) {
            (None, Some(pid)) => note(&format!("node {number}: a server runs again, pid {pid}")),
            (Some(_), None) => note(&format!("node {number}: its server has ended")),
            _ => {}
        }
        was = pid;
    }
}
