//! `shardmq demo`: the main job on private servers, with a crash in the middle, checked to the last
//! message.
//!
//! ```text
//! start servers ─ produce ─ group of three consumes ──────────── send slowly ─ read all again ─ report
//!                            └ one, a process, gets SIGKILL        (latency)    (fresh group)
//! ```

mod check;
mod group;
mod member;
mod record;
mod report;
mod workload;

use std::sync::{Arc, Mutex};

use clap::Parser;
use shardmq::embedded::Redis;
use shardmq::{Cluster, TopicOptions};

use crate::context::Context;
use crate::failure::{FAILED, Failure};
use crate::output::{Out, counted, note};
use crate::servers::{self, Node};
use crate::signals::Interrupt;
pub(crate) use member::{MemberArgs, run as member};
use record::Record;
use report::Report;
use workload::Workload;

const TOPIC: &str = "demo";
const PARTITIONS_PER_NODE: usize = 4;

/// Show the main job on private servers: many messages, a crash in the middle, nothing lost.
///
/// Starts Postgres servers, which flush to disk as yours do, and removes them at the end.
#[derive(Parser)]
pub(crate) struct Args {
    /// How many nodes, each on a server of its own.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=99))]
    nodes: u8,
    /// How many messages.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    messages: u32,
    /// Start a Redis too, through which hints go in place of LISTEN/NOTIFY.
    #[arg(long)]
    redis: bool,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let stage = Stage { quiet: context.json };
    let servers = counted(args.nodes.into(), "private Postgres server");
    stage.enter(&format!("starting {servers}"));
    let nodes = tokio::select! {
        nodes = servers::start(args.nodes) => nodes?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    let worked = tokio::select! {
        worked = work(&nodes, &args, &stage) => worked,
        () = interrupt.caught() => Err(interrupted()),
    };
    servers::stop(nodes).await;
    let report = worked?;
    let mut out = Out::new();
    if context.json {
        out.json(&report)?;
    } else {
        report.print(&mut out);
    }
    out.flush().await?;
    report.verdict()
}

fn interrupted() -> Failure {
    Failure::new(FAILED, "interrupted before the end")
}

/// Tells people what happens.
struct Stage {
    quiet: bool,
}

impl Stage {
    fn enter(&self, what: &str) {
        if !self.quiet {
            note(&format!("- {what}"));
        }
    }
}

async fn work(nodes: &[Node], args: &Args, stage: &Stage) -> Result<Report, Failure> {
    let control_url = nodes.first().map(Node::url).unwrap_or_default();
    let mut redis = None;
    let mut cluster = Cluster::builder(&control_url);
    if args.redis {
        stage.enter("starting a private Redis");
        let started = servers::start_redis(&control_url).await?;
        cluster = cluster.redis_url(&started.url());
        redis = Some(started);
    }
    let cluster = cluster.connect().await?;
    let partitions = nodes.len() * PARTITIONS_PER_NODE;
    cluster.create_topic(TOPIC, TopicOptions::partitions(partitions)).await?;

    stage.enter(&format!("producing {} messages to {partitions} partitions", args.messages));
    let mut workload = Workload::new(&cluster, args.messages).await?;
    let produce_per_s = workload.send_bulk().await?;

    stage.enter("consuming in a group of three; one of them will be killed");
    let record = Arc::new(Mutex::new(Record::new(args.messages)));
    let redis_url = redis.as_ref().map(Redis::url);
    let urls = group::Urls { control: &control_url, redis: redis_url.as_deref() };
    let group = group::Group::join(&cluster, urls, &record, workload.bulk()).await?;
    let crashed = group.crash().await?;
    let of_dead = crashed.delivered_by_dead();
    stage.enter(&format!(
        "killed one after {of_dead} messages; the others take over when its lease ends"
    ));
    crashed.wait_for(u64::from(workload.bulk())).await;

    stage.enter("measuring the latency at 250 messages a second");
    workload.send_slowly().await?;
    crashed.wait_for(workload.acknowledged()).await;
    crashed.leave().await?;

    stage.enter("reading everything again with a fresh group");
    let (again, consume_per_s) = check::read_all(&cluster, args.messages).await?;
    workload.close().await?;
    cluster.shutdown().await;
    let in_group = record::lock(&record);
    Ok(Report::new(
        (nodes.len(), partitions),
        &workload,
        &in_group,
        &again,
        (produce_per_s, consume_per_s),
    ))
}
