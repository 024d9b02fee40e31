//! `shardmq verify`: a checked workload, while somebody else breaks the cluster.
//!
//! ```text
//! produce and consume for a while ─ nodes back? ─ group drained? ─ read all again ─ check
//!   (others stop, kill, cut)          (60 s)          (60 s)       (fresh clients)
//! ```

mod clock;
mod consuming;
mod group;
mod member;
mod processes;
mod producing;
mod reading;
mod report;
mod seen;
mod settling;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use shardmq::verify::{CheckOptions, Event, History, Report, check};
use shardmq::{Cluster, PartitionId, TopicOptions};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::context::Context;
use crate::failure::{FAILED, Failure, UNFINISHED};
use crate::output::{Out, counted, note, or_dash};
use crate::servers::{self, Node};
use crate::signals::Interrupt;
use clock::Clock;
use group::{Here, Members};
use processes::Processes;
use producing::Producers;

pub(crate) use member::{MemberArgs, run as member};

const GROUP: &str = "verify";

/// Send and consume, then check that nothing was lost, skipped, repeated or reordered. Break the
/// cluster meanwhile.
///
/// On the cluster of --url, on a topic of its own; without --url on private servers, whose addresses
/// and data folders are shown so that you can break them. A signal ends the workload early; a second
/// one ends it all. Exits with 1 where something is wrong, with 2 where it could not be found out.
#[derive(Parser)]
pub(crate) struct Args {
    /// How long to send and consume.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    seconds: u64,
    /// Producers, each with connections of its own.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    producers: u16,
    /// Consumers of one group, each with connections of its own.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    consumers: u16,
    /// Run each consumer as a process of its own, whose id is shown, so that you can kill, stop and
    /// restart it. One that ends is replaced by a new one.
    #[arg(long)]
    member_processes: bool,
    /// Different keys, which half of the messages have; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(0..=100_000_000))]
    keys: u32,
    /// Messages a second, of all producers together.
    #[arg(long, value_name = "R", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Bytes of a payload, up to 64 KiB.
    #[arg(long, value_name = "B", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    size: u32,
    /// Partitions of the topic.
    #[arg(long, value_name = "P", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    partitions: u16,
    /// Private servers to start where there is no control database.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=99))]
    nodes: u8,
    /// How long nodes may be away after the time, and the group may make no progress.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    wait: u64,
    /// Where the history is written: about 250 bytes a message, and as much again to check it.
    #[arg(long, value_name = "FOLDER")]
    history: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let outcome = match &context.url {
        Some(url) => verify(url, &args, &mut interrupt).await,
        None => on_private_servers(&args, &mut interrupt).await,
    };
    let report = outcome.map_err(Failure::unfinished)?;
    let mut out = Out::new();
    if context.json {
        out.json(&report)?;
    } else {
        report::print(&report, &mut out);
    }
    out.flush().await?;
    if report.violations == 0 {
        return Ok(());
    }
    let found = counted(report.violations, "violation");
    Err(Failure::new(FAILED, format!("{found} found")))
}

async fn on_private_servers(args: &Args, interrupt: &mut Interrupt) -> Result<Report, Failure> {
    let nodes = tokio::select! {
        nodes = servers::start(args.nodes) => nodes?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    for Node { number, server } in &nodes {
        let (pid, data) = (or_dash(server.pid()), server.data_dir());
        note(&format!("- node {number}: process {pid}, data in {}", data.display()));
    }
    let url = nodes.first().map(Node::url).unwrap_or_default();
    let outcome = verify(&url, args, interrupt).await;
    servers::stop(nodes).await;
    outcome
}

fn interrupted() -> Failure {
    Failure::new(UNFINISHED, "interrupted before the check")
}

/// What all workers of a run share.
struct Run {
    url: String,
    topic: String,
    history: History,
    /// The one clock of all its events.
    clock: Clock,
    size: usize,
    keys: u32,
    patience: Duration,
    /// No more messages are to be sent.
    enough: CancellationToken,
}

impl Run {
    /// The time on the history's clock.
    fn now(&self) -> Duration {
        self.clock.now()
    }
}

async fn verify(url: &str, args: &Args, interrupt: &mut Interrupt) -> Result<Report, Failure> {
    let cluster = Cluster::connect(url).await?;
    let folder = args.history.clone().unwrap_or_else(std::env::temp_dir);
    let run = Arc::new(Run {
        url: url.to_owned(),
        topic: format!("verify-{}", Uuid::now_v7().simple()),
        history: History::new(&folder)?,
        clock: Clock::start(),
        size: args.size as usize,
        keys: args.keys,
        patience: Duration::from_secs(args.wait),
        enough: CancellationToken::new(),
    });
    let options = TopicOptions::partitions(args.partitions.into());
    let topic = cluster.create_topic(&run.topic, options).await?;
    let partitions: Vec<_> = topic.partitions.iter().map(|p| p.partition).collect();
    let members = work(&cluster, &run, args, interrupt).await?;
    tokio::select! {
        read = look_back(&cluster, &run, members, &partitions) => read?,
        () = interrupt.caught() => return Err(interrupted()),
    }
    let report = judge(&run).await?;
    if report.violations == 0 {
        cluster.delete_topic(&run.topic, true).await?;
    } else {
        note(&format!("- topic {} is left for you to look at", run.topic));
    }
    cluster.shutdown().await;
    keep(run, &report);
    Ok(report)
}

/// Sends and consumes for the time that was asked for, or until a signal. The group goes on.
async fn work(
    cluster: &Cluster,
    run: &Arc<Run>,
    args: &Args,
    interrupt: &mut Interrupt,
) -> Result<Members, Failure> {
    let members = tokio::select! {
        joined = join(cluster, run, args) => joined?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    let producers = Producers::start(run, args.producers, args.rate).await?;
    note(&format!(
        "- {} a second to {} for {}: break what you like",
        counted(args.rate.into(), "message"),
        counted(args.partitions.into(), "partition"),
        counted(args.seconds, "second"),
    ));
    tokio::select! {
        () = tokio::time::sleep(Duration::from_secs(args.seconds)) => {}
        () = interrupt.caught() => {
            note("- stopping early");
            interrupt.forget();
        }
    }
    run.enough.cancel();
    producers.finish().await?;
    Ok(members)
}

/// Makes the group. Processes are waited for until each has its share: as they start they take partitions
/// from each other, and what is measured is to be what happens later.
async fn join(cluster: &Cluster, run: &Arc<Run>, args: &Args) -> Result<Members, Failure> {
    if !args.member_processes {
        return Here::join(run, args.consumers).await.map(Members::Here);
    }
    let processes = Processes::start(run, args.consumers);
    let (members, partitions) = (args.consumers.into(), args.partitions.into());
    settling::share_out(cluster, &run.topic, members, partitions, run.patience).await?;
    Ok(Members::Processes(processes))
}

/// Waits until the nodes are back and the group has everything, and reads it all again.
async fn look_back(
    cluster: &Cluster,
    run: &Run,
    members: Members,
    partitions: &[PartitionId],
) -> Result<(), Failure> {
    note("- waiting until all nodes answer and the group has everything");
    settling::nodes_answer(cluster, &run.topic, run.patience).await?;
    settling::drain(cluster, &run.topic, partitions.len(), run.patience).await?;
    members.leave().await?;
    let mut recorder = run.history.recorder()?;
    for partition in partitions {
        let drained = Event::Drained { group: seen::GROUP_NUMBER, partition: *partition };
        recorder.record(run.now(), &drained)?;
    }
    recorder.close()?;
    note("- reading everything again");
    reading::read_all(run).await
}

async fn judge(run: &Arc<Run>) -> Result<Report, Failure> {
    note("- checking the history");
    let run = Arc::clone(run);
    let checked = spawn_blocking(move || check(&run.history, &CheckOptions::default())).await;
    let report = checked.map_err(|error| Failure::new(UNFINISHED, format!("check: {error}")))?;
    Ok(report?)
}

/// A history that shows something is kept.
fn keep(run: Arc<Run>, report: &Report) {
    if report.violations > 0
        && let Some(run) = Arc::into_inner(run)
    {
        note(&format!("- the history is kept in {}", run.history.keep().display()));
    }
}
