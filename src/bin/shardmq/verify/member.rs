//! A member of the group that is a process: it writes what it sees to stdout, one line each.
//!
//! What was delivered is in the pipe before it is acknowledged, so that whoever reads the pipe to its end
//! knows all that the member has acknowledged, however it ended. A line on stdin tells it to leave; where
//! stdin ends, whoever started it has gone, and it ends at once.

use std::future::Future;
use std::time::Duration;

use clap::Parser;
use shardmq::{Cluster, Messages};
use tokio::io::AsyncReadExt;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::GROUP;
use super::clock::Clock;
use super::consuming::{Log, Member, SHUTDOWN};
use super::seen::Seen;
use crate::context::Context;
use crate::failure::Failure;
use crate::output::Out;
use crate::signals::Interrupt;

/// Between two attempts to join.
const AGAIN: Duration = Duration::from_millis(250);

/// A consumer of a checked workload.
#[derive(Parser)]
pub(crate) struct MemberArgs {
    /// The topic of the workload.
    #[arg(long)]
    topic: String,
    /// When the history's clock showed zero, in nanoseconds of the wall clock.
    #[arg(long)]
    zero: u64,
}

pub(crate) async fn run(context: &Context, args: MemberArgs) -> Result<(), Failure> {
    let (clock, interrupt) = (Clock::of(args.zero), Interrupt::new()?);
    let leave = CancellationToken::new();
    tokio::select! {
        outcome = consume(context.url()?, &args.topic, clock, &leave) => outcome,
        () = hear(interrupt, &leave) => Ok(()),
    }
}

/// Passes on that it is to leave, by a signal or by a line on stdin. Returns when stdin has ended.
async fn hear(mut interrupt: Interrupt, leave: &CancellationToken) {
    let mut stdin = tokio::io::stdin();
    loop {
        tokio::select! {
            () = interrupt.caught(), if !leave.is_cancelled() => {}
            told = stdin.read_u8() => if told.is_err() { return },
        }
        leave.cancel();
    }
}

/// Consumes until it is to leave, and has.
async fn consume(
    url: &str,
    topic: &str,
    clock: Clock,
    leave: &CancellationToken,
) -> Result<(), Failure> {
    let (cluster, messages) = tokio::select! {
        joined = join(url, topic) => joined?,
        () = leave.cancelled() => return Ok(()),
    };
    let handle = messages.handle();
    let leaving = async {
        leave.cancelled().await;
        if let Err(error) = handle.shutdown(SHUTDOWN).await {
            // What was not committed is no violation: the history knows what was confirmed.
            tracing::debug!(error = %error.chain(), "the member left");
        }
    };
    let working = Member::new(clock, Lines(Out::new())).work(messages);
    tokio::pin!(working);
    let worked = tokio::select! {
        worked = &mut working => worked,
        () = leaving => working.await,
    };
    cluster.shutdown().await;
    worked.map(drop)
}

async fn join(url: &str, topic: &str) -> shardmq::Result<(Cluster, Messages)> {
    let cluster = patiently(|| Cluster::connect(url)).await?;
    let messages = patiently(|| cluster.consumer(topic, GROUP).stream()).await?;
    Ok((cluster, messages))
}

/// Calls until it succeeds, or fails for good: it may be started while a server is away.
async fn patiently<T, F>(call: impl Fn() -> F) -> shardmq::Result<T>
where
    F: Future<Output = shardmq::Result<T>>,
{
    loop {
        match call().await {
            Err(error) if error.is_transient() => sleep(AGAIN).await,
            outcome => return outcome,
        }
    }
}

/// Events as lines.
struct Lines(Out);

impl Log for Lines {
    fn note(&mut self, seen: Seen) -> Result<(), Failure> {
        self.0.json(&seen)
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        self.0.flush().await
    }
}
