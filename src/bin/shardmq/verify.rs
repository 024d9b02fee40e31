//! `shardmq verify`: a checked workload, while somebody else breaks the cluster.
//!
//! ```text
//! produce and consume for a while ─ nodes back? ─ group drained? ─ read all again ─ check
//!   (others stop, kill, cut;          (60 s)          (60 s)       (fresh clients)
//!    or --faults does)
//! ```

mod clock;
mod consuming;
mod faults;
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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Parser;
use serde::Serialize;
use shardmq::verify::{
    CheckOptions, Event, FaultKinds, FaultOptions, FaultPlan, History, Report, check,
};
use shardmq::{Cluster, PartitionId, TopicOptions};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::context::Context;
use crate::failure::{FAILED, Failure, TAIL_LOST, UNFINISHED, USAGE};
use crate::output::{Out, counted, note, or_dash};
use crate::servers::{self, Node};
use crate::signals::Interrupt;
use clock::Clock;
use faults::{FaultReport, Stage};
use group::{Here, Members};
use processes::Processes;
use producing::Producers;

pub(crate) use member::{MemberArgs, run as member};

const GROUP: &str = "verify";

/// Send and consume, then check that nothing was lost, skipped, repeated or reordered. Break the
/// cluster meanwhile.
///
/// On the cluster of --url, on a topic of its own; without --url on private servers, whose
/// addresses and data folders are shown so that you can break them, or which --faults breaks. A
/// signal ends the workload early; a second one ends it all.
///
/// Exits with 1 where something is wrong, with 2 where it could not be found out, and then says on
/// stderr what was measured. Exits with 5 where a server has lost the end of its log, and all else
/// is well. That is what the failover to an asynchronous standby costs: the report names for each
/// partition the first message that is gone, and how many acknowledged ones are (`lost_tails`).
/// With synchronous standbys it must not happen.
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
    /// Private servers to start where there is no control database. Default: 1, or 2 with --faults.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=99))]
    nodes: Option<u8>,
    /// Break private servers and processes of consumers meanwhile, and count the faults: all, or
    /// some of kill, pause, lock, roll, clock, topic (`kill,lock`).
    ///
    /// kill and pause: nodes and consumers, by SIGKILL and SIGSTOP. lock: a day table, against
    /// everybody. roll: a node's partitions, to the next day. clock: a node's, by up to 50 minutes.
    /// topic: another topic of the same nodes is deleted and made anew every 20 s.
    #[arg(long, value_name = "FAULTS")]
    faults: Option<FaultKinds>,
    /// What is broken, when and where: the same number plans the same. Default: another one each
    /// time.
    #[arg(long, value_name = "N", requires = "faults")]
    seed: Option<u64>,
    /// How long nodes may be away after the time, and the group may make no progress.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    wait: u64,
    /// Where the history is written: about 250 bytes a message, and as much again to check it.
    #[arg(long, value_name = "FOLDER")]
    history: Option<PathBuf>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Verified {
    #[serde(flatten)]
    report: Report,
    #[serde(flatten)]
    faults: Option<FaultReport>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let outcome = match &context.url {
        Some(_) if args.faults.is_some() => {
            let text = "--faults breaks private servers only: leave out --url and SHARDMQ_URL";
            return Err(Failure::new(USAGE, text));
        }
        Some(url) => verify(url, &[], &args, &mut interrupt).await,
        None => on_private_servers(&args, &mut interrupt).await,
    };
    let verified = outcome.map_err(Failure::unfinished)?;
    let mut out = Out::new();
    if context.json {
        out.json(&verified)?;
    } else {
        report::print(&verified.report, &mut out);
        if let Some(faults) = &verified.faults {
            out.line(&faults.text());
        }
    }
    out.flush().await?;
    verdict(&verified.report)
}

fn verdict(report: &Report) -> Result<(), Failure> {
    if report.violations > 0 {
        let found = counted(report.violations, "violation");
        return Err(Failure::new(FAILED, format!("{found} found")));
    }
    if report.tail_lost > 0 {
        let lost = counted(report.tail_lost, "acknowledged message");
        let text = format!("{lost} went with the end of a server's log; all else is well");
        return Err(Failure::new(TAIL_LOST, text));
    }
    Ok(())
}

async fn on_private_servers(args: &Args, interrupt: &mut Interrupt) -> Result<Verified, Failure> {
    let count = args.nodes.unwrap_or(if args.faults.is_some() { 2 } else { 1 });
    let nodes = tokio::select! {
        nodes = servers::start(count) => nodes?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    for Node { number, server } in &nodes {
        let (pid, data) = (or_dash(server.pid()), server.data_dir());
        note(&format!("- node {number}: process {pid}, data in {}", data.display()));
    }
    let url = nodes.first().map(Node::url).unwrap_or_default();
    let outcome = verify(&url, &nodes, args, interrupt).await;
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
    delivered: AtomicU64,
}

impl Run {
    fn new(url: &str, args: &Args) -> Result<Self, Failure> {
        let folder = args.history.clone().unwrap_or_else(std::env::temp_dir);
        Ok(Self {
            url: url.to_owned(),
            topic: format!("verify-{}", Uuid::now_v7().simple()),
            history: History::new(&folder)?,
            clock: Clock::start(),
            size: args.size as usize,
            keys: args.keys,
            patience: Duration::from_secs(args.wait),
            enough: CancellationToken::new(),
            delivered: AtomicU64::new(0),
        })
    }

    /// The time on the history's clock.
    fn now(&self) -> Duration {
        self.clock.now()
    }

    /// A process of the group was handed a message.
    fn note_delivered(&self) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
    }

    /// How many messages the group's processes were handed.
    fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }
}

/// On a cluster; faults are done to these nodes, if any are to be done.
async fn verify(
    url: &str,
    nodes: &[Node],
    args: &Args,
    interrupt: &mut Interrupt,
) -> Result<Verified, Failure> {
    let cluster = Cluster::connect(url).await?;
    let run = Arc::new(Run::new(url, args)?);
    let topic = cluster.create_topic(&run.topic, topic_options(args)).await?;
    let partitions: Vec<_> = topic.partitions.iter().map(|p| p.partition).collect();
    let (members, faults) = Box::pin(work(&cluster, &run, nodes, args, interrupt)).await?;
    let read = tokio::select! {
        read = look_back(&cluster, &run, members, &partitions) => read,
        () = interrupt.caught() => return Err(interrupted()),
    };
    let report = match read {
        Ok(()) => judge(&run).await?,
        Err(failure) => {
            // What was not written to its end is not worth another error.
            if let Ok(report) = judge(&run).await {
                note(&format!("- {}", report::measured(&report)));
            }
            return Err(failure);
        }
    };
    if report.violations == 0 {
        cluster.delete_topic(&run.topic, true).await?;
    } else {
        note(&format!("- topic {} is left for you to look at", run.topic));
    }
    cluster.shutdown().await;
    keep(run, &report);
    Ok(Verified { report, faults })
}

fn topic_options(args: &Args) -> TopicOptions {
    TopicOptions::partitions(args.partitions.into())
}

/// Sends and consumes for the time that was asked for, or until a signal. The group goes on.
async fn work(
    cluster: &Cluster,
    run: &Arc<Run>,
    nodes: &[Node],
    args: &Args,
    interrupt: &mut Interrupt,
) -> Result<(Members, Option<FaultReport>), Failure> {
    let members = tokio::select! {
        joined = join(cluster, run, args) => joined?,
        () = interrupt.caught() => return Err(interrupted()),
    };
    let producers = Producers::start(run, args.producers, args.rate).await?;
    let breaks = if args.faults.is_some() { "" } else { ": break what you like" };
    note(&format!(
        "- {} a second to {} for {}{breaks}",
        counted(args.rate.into(), "message"),
        counted(args.partitions.into(), "partition"),
        counted(args.seconds, "second"),
    ));
    let (stop, length) = (CancellationToken::new(), Duration::from_secs(args.seconds));
    let over = async {
        tokio::select! {
            () = tokio::time::sleep(length) => {}
            () = interrupt.caught() => {
                note("- stopping early");
                interrupt.forget();
            }
        }
        stop.cancel();
    };
    let breaking = break_it(run, nodes, &members, args, &stop);
    let ((), faults) = tokio::join!(over, breaking);
    run.enough.cancel();
    producers.finish().await?;
    Ok((members, faults?))
}

/// Does the faults that were asked for, up to the end of the time.
async fn break_it(
    run: &Run,
    nodes: &[Node],
    members: &Members,
    args: &Args,
    stop: &CancellationToken,
) -> Result<Option<FaultReport>, Failure> {
    let (Some(FaultKinds(kinds)), Members::Processes(processes)) = (&args.faults, members) else {
        return Ok(None);
    };
    let seed = args.seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0 >> 32);
    let length = Duration::from_secs(args.seconds);
    let plan = FaultPlan::new(&FaultOptions {
        seed,
        kinds: kinds.clone(),
        nodes: nodes.len(),
        members: args.consumers.into(),
        length,
    });
    note(&format!(
        "- {} planned; repeat them with --seed {seed}",
        counted(plan.len() as u64, "fault")
    ));
    let (began, stop) = (Instant::now(), stop.clone());
    let stage = Stage { run, nodes, members: processes.pids(), stop, began };
    Box::pin(stage.perform(&plan, seed, kinds)).await.map(Some)
}

/// Makes the group. Processes are waited for until each has its share: as they start they take
/// partitions from each other, and what is measured is to be what happens later.
async fn join(cluster: &Cluster, run: &Arc<Run>, args: &Args) -> Result<Members, Failure> {
    if !args.member_processes && args.faults.is_none() {
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
    let settled = settle(cluster, run, partitions).await;
    // In any case, so that the history has its end.
    let left = members.leave().await;
    settled.and(left)?;
    let mut recorder = run.history.recorder()?;
    for partition in partitions {
        let drained = Event::Drained { group: seen::GROUP_NUMBER, partition: *partition };
        recorder.record(run.now(), &drained)?;
    }
    recorder.close()?;
    note("- reading everything again");
    reading::read_all(run).await
}

async fn settle(cluster: &Cluster, run: &Run, partitions: &[PartitionId]) -> Result<(), Failure> {
    settling::topic_is_known(cluster, &run.topic, partitions).await?;
    settling::nodes_answer(cluster, &run.topic, run.patience).await?;
    Ok(settling::drain(cluster, &run.topic, partitions.len(), run.patience).await?)
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
