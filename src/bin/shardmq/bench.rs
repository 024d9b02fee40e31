//! `shardmq bench`: how fast the library is here, and how far that is from the bare loop under it.

use clap::{Parser, Subcommand, ValueEnum};
use shardmq::bench::{self, Bench, Options, Percentiles, Report};
use shardmq::embedded::Redis;
use shardmq::notifier::NotifierKind;
use uuid::Uuid;

use crate::context::Context;
use crate::failure::{FAILED, Failure};
use crate::output::{Out, note, table};
use crate::servers::{self, Node};
use crate::signals::Interrupt;

/// Private servers, however many nodes there are: each has processes and memory of its own.
const SERVERS: u8 = 3;

/// Measure this library, and the same SQL in a bare loop, in turns on the same machine.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Send, each message awaited until it is on disk.
    Produce(Args),
    /// Receive a backlog and acknowledge each message.
    Consume(Args),
    /// From when a message is due to when it was received, at a fixed rate.
    Latency(Args),
    /// Consume a small and a large backlog, and watch the memory.
    Backlog(Args),
}

/// On the cluster of --url, on a topic of its own; without --url on private servers.
#[derive(Parser)]
pub(crate) struct Args {
    /// Bytes of a payload, up to 64 KiB.
    #[arg(long, value_name = "B", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    size: u32,
    /// Partitions of the topic.
    #[arg(long, value_name = "P", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=9_801))]
    partitions: u16,
    /// Send N messages a call, from several tasks. Default: each message from a task of its own.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    batch: Option<u32>,
    /// How long to measure, library and floor together, in slices of a second each.
    #[arg(long, value_name = "S", default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Messages a second, for latency.
    #[arg(long, value_name = "R", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Messages of the backlog; for backlog of the small one, the large one has ten times as many.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    messages: Option<u64>,
    /// How consumers hear of messages.
    #[arg(long, value_enum, default_value_t = Notifier::Postgres)]
    notifier: Notifier,
    /// Nodes to use. Default: all of the cluster, or one private server. More than three are databases of
    /// three private servers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=99))]
    nodes: Option<u8>,
    /// Consumers in the group. With several, consume also compares them with one alone, for as long again.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    members: u16,
    /// Data connections to each node. Default: the library's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    connections: Option<u8>,
    /// Measure on private servers even if a control database is given. They flush to disk as yours do.
    #[arg(long)]
    embedded: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Notifier {
    Postgres,
    Redis,
    Both,
    None,
}

impl From<Notifier> for NotifierKind {
    fn from(notifier: Notifier) -> Self {
        match notifier {
            Notifier::Postgres => Self::Postgres,
            Notifier::Redis => Self::Redis,
            Notifier::Both => Self::Both,
            Notifier::None => Self::None,
        }
    }
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let (bench, args) = match command {
        Command::Produce(args) => (Bench::Produce, args),
        Command::Consume(args) => (Bench::Consume, args),
        Command::Latency(args) => (Bench::Latency, args),
        Command::Backlog(args) => (Bench::Backlog, args),
    };
    let options = args.options(context.redis_url.as_deref());
    let mut interrupt = Interrupt::new()?;
    let report = match &context.url {
        Some(url) if !args.embedded => measure(bench, url, options, &mut interrupt).await?,
        _ => on_private_servers(bench, options, &mut interrupt).await?,
    };
    let mut out = Out::new();
    if context.json {
        out.json(&report)?;
    } else {
        print(&report, &mut out);
    }
    out.flush().await
}

impl Args {
    fn options(&self, redis_url: Option<&str>) -> Options {
        Options {
            size: self.size as usize,
            partitions: self.partitions.into(),
            batch: self.batch.map(|batch| batch as usize),
            seconds: self.seconds,
            rate: self.rate,
            messages: self.messages,
            notifier: self.notifier.into(),
            redis_url: redis_url.map(str::to_owned),
            nodes: self.nodes.map(usize::from),
            members: self.members.into(),
            connections: self.connections.map(usize::from),
            data_dir: None,
        }
    }
}

async fn on_private_servers(
    bench: Bench,
    mut options: Options,
    interrupt: &mut Interrupt,
) -> Result<Report, Failure> {
    let connections = options.connections.unwrap_or(2);
    let count = options.nodes.and_then(|nodes| u8::try_from(nodes).ok()).unwrap_or(1);
    let nodes = tokio::select! {
        nodes = servers::start_on(count, SERVERS, connections) => nodes?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    let mut redis = None;
    if options.notifier.needs_redis() && options.redis_url.is_none() {
        let password = Uuid::new_v4().simple().to_string();
        redis = Some(Redis::builder().password(password).start().await?);
    }
    options.redis_url = redis.as_ref().map(Redis::url).or(options.redis_url);
    options.data_dir = nodes.first().map(|node| node.server.data_dir());
    let url = nodes.first().map(Node::url).unwrap_or_default();
    let measured = measure(bench, &url, options, interrupt).await;
    drop(redis);
    servers::stop(nodes).await;
    measured
}

async fn measure(
    bench: Bench,
    url: &str,
    options: Options,
    interrupt: &mut Interrupt,
) -> Result<Report, Failure> {
    note(&format!("measuring for about {} seconds", options.seconds));
    let report = bench::run(bench, url, options, interrupt.caught()).await?;
    report.ok_or_else(interrupted)
}

fn interrupted() -> Failure {
    Failure::new(FAILED, "interrupted before the end")
}

fn print(report: &Report, out: &mut Out) {
    let times = |name: &str, per_s: f64, times: Percentiles| {
        let Percentiles { p50, p99, p999 } = times;
        let times = [p50, p99, p999].map(|time| format!("{time:.2}"));
        [vec![name.to_owned(), format!("{per_s:.0}")], times.to_vec()].concat()
    };
    let rows = vec![
        times("library", report.per_s, report.latency_ms),
        times("floor", report.floor_per_s, report.floor_latency_ms),
    ];
    let header = ["", "MESSAGES/S", "P50 MS", "P99 MS", "P999 MS"];
    out.line(&table(&header, &[1, 2, 3, 4], rows));
    let spread = report.ratio_spread;
    out.line(&format!(
        "ratio {:.2} (quartiles {:.2} to {:.2}, all {:.2} to {:.2}, {} pairs), {:.1} MB/s, a flush {:.3} ms ({})",
        report.ratio, spread.q1, spread.q3, spread.min, spread.max, spread.pairs,
        report.mb_per_s, report.flush.flush_ms, report.flush.flush_is,
    ));
    if let Some(to_one) = report.to_one_member {
        out.line(&format!(
            "{} members to one alone {:.2} (quartiles {:.2} to {:.2}, all {:.2} to {:.2}, {} pairs)",
            report.options.members, to_one.median, to_one.q1, to_one.q3, to_one.min, to_one.max,
            to_one.pairs,
        ));
    }
    for drained in &report.backlogs {
        out.line(&format!(
            "backlog of {}: {:.0} messages/s, ratio {:.2}, memory {:.0} MiB before, {:.0} MiB at most",
            drained.messages, drained.per_s, drained.ratio, drained.rss_before_mib, drained.peak_rss_mib,
        ));
    }
    out.line(&format!(
        "topic made in {:.1} s, {:.0} MiB of memory at the end",
        report.topic_s, report.rss_mib,
    ));
    let machine = &report.machine;
    out.line(&format!(
        "on {} processors ({}), {} MiB, load {:.2} before",
        machine.cpus, machine.cpu, machine.memory_mib, machine.load_1m,
    ));
}
