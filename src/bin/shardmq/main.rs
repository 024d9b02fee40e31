//! The `shardmq` command: administration, lines in and out, and servers to try it all on.
//!
//! Each command is a file with its arguments and a `run`. Data goes to stdout, everything else to
//! stderr. Only the library's public API is used.

mod bench;
mod caught_up;
mod cluster;
mod consume;
mod context;
mod dead;
mod demo;
mod dev;
mod failure;
mod group;
mod lag;
mod lines;
mod look;
mod migrate;
mod node;
mod notifier;
mod outbox;
mod output;
mod produce;
mod servers;
mod signals;
mod start;
mod topic;
mod verify;

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use context::Context;
use failure::Failure;

/// A business message queue that lives in the Postgres you already run.
#[derive(Parser)]
#[command(name = "shardmq", version, after_help = EXIT_CODES)]
struct Cli {
    /// The control database, a libpq URL. Its password may come from PGPASSWORD or ~/.pgpass.
    #[arg(long, global = true, env = "SHARDMQ_URL", hide_env_values = true, help_heading = GLOBAL)]
    url: Option<String>,
    /// Keep the topology in this file, and start from it while the control database is away.
    #[arg(long, value_name = "PATH", global = true, env = "SHARDMQ_TOPOLOGY_FILE", help_heading = GLOBAL)]
    topology_file: Option<PathBuf>,
    /// Where the Redis is through which hints go. Default: the cluster's setting.
    #[arg(long, value_name = "URL", global = true, env = "SHARDMQ_REDIS_URL", hide_env_values = true, help_heading = GLOBAL)]
    redis_url: Option<String>,
    /// Print JSON, one object per line.
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// Say more on stderr; twice for still more. `RUST_LOG` has the last word.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = GLOBAL)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

const GLOBAL: &str = "For all commands";

const EXIT_CODES: &str = "\
Exit codes:
  0  done; also when the reader of the output went away, or a signal ended what runs until then
  1  the operation failed, a check found violations, or a line could not be sent
  2  wrong arguments, or a value outside of its limits; or verify could not finish its check
  3  no such topic, group, message, node or program
  4  a server could not be reached, or something was not done in time: it may be tried again
  5  verify found that a server has lost the end of its log, and nothing else";

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Dev(dev::Args),
    Migrate(migrate::Args),
    #[command(subcommand)]
    Node(node::Command),
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Make partitions again that a node has lost, and put topics back that the control database
    /// has lost. For a database that was restored, or promoted without its end.
    Repair,
    #[command(subcommand)]
    Notifier(notifier::Command),
    #[command(subcommand)]
    Outbox(outbox::Command),
    #[command(subcommand)]
    Topic(topic::Command),
    #[command(subcommand)]
    Group(group::Command),
    #[command(subcommand)]
    Dead(dead::Command),
    Produce(produce::Args),
    Consume(consume::Args),
    Peek(look::PeekArgs),
    Message(look::MessageArgs),
    Lag(lag::Args),
    #[command(subcommand)]
    Bench(bench::Command),
    Verify(verify::Args),
    #[command(hide = true)]
    DemoMember(demo::MemberArgs),
    #[command(hide = true)]
    VerifyMember(verify::MemberArgs),
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let redis_url_is_argument =
        matches.value_source("redis_url") == Some(clap::parser::ValueSource::CommandLine);
    log_to_stderr(cli.verbose);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(error).report(),
    };
    let Cli { url, topology_file, redis_url, json, .. } = cli;
    let redis_url = redis_url.filter(|url| !url.is_empty());
    let context = Context { url, topology_file, redis_url, redis_url_is_argument, json };
    let outcome = runtime.block_on(run(cli.command, context));
    // A read of stdin or a write to a full pipe may still be waiting; nobody waits for it.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(command: Command, context: Context) -> Result<(), Failure> {
    match command {
        Command::Demo(args) => demo::run(&context, args).await,
        Command::Dev(args) => dev::run(&context, args).await,
        Command::Migrate(args) => migrate::run(&context, args).await,
        Command::Node(command) => node::run(&context, command).await,
        Command::Cluster(command) => cluster::run(&context, command).await,
        Command::Repair => cluster::repair(&context).await,
        Command::Notifier(command) => notifier::run(&context, command).await,
        Command::Outbox(command) => outbox::run(&context, command).await,
        Command::Topic(command) => topic::run(&context, command).await,
        Command::Group(command) => group::run(&context, command).await,
        Command::Dead(command) => dead::run(&context, command).await,
        Command::Produce(args) => produce::run(&context, args).await,
        Command::Consume(args) => consume::run(&context, args).await,
        Command::Peek(args) => look::peek(&context, args).await,
        Command::Message(args) => look::message(&context, args).await,
        Command::Lag(args) => lag::run(&context, args).await,
        Command::Bench(command) => Box::pin(bench::run(&context, command)).await,
        Command::Verify(args) => Box::pin(verify::run(&context, args)).await,
        Command::DemoMember(args) => demo::member(&context, args).await,
        Command::VerifyMember(args) => verify::member(&context, args).await,
    }
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "warn,shardmq=info",
        _ => "info,shardmq=debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
}
