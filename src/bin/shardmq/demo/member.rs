//! The member of the demo's group that is killed: a process of its own, which writes down what it got.

use std::time::Duration;

use clap::Parser;
use futures_util::FutureExt;
use shardmq::Delivery;
use tokio::io::AsyncReadExt;
use tokio::time::{MissedTickBehavior, interval};

use super::group::consumer;
use super::workload::Order;
use crate::context::Context;
use crate::failure::Failure;
use crate::output::Out;

/// How often it takes some messages.
const TURNS_PER_SECOND: u32 = 50;

/// A consumer that the demo kills.
#[derive(Parser)]
pub(crate) struct MemberArgs {
    /// How fast it works, so that it is killed in the middle.
    #[arg(long)]
    per_second: u32,
}

pub(crate) async fn run(context: &Context, args: MemberArgs) -> Result<(), Failure> {
    let mut stdin = tokio::io::stdin();
    tokio::select! {
        outcome = consume(context, args.per_second) => outcome,
        // The demo has gone.
        _ = stdin.read_u8() => Ok(()),
    }
}

/// Prints `ID NUMBER` of each message, then acknowledges it.
async fn consume(context: &Context, per_second: u32) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let mut messages = consumer(&cluster).stream().await?;
    let mut pace = interval(Duration::from_secs(1) / TURNS_PER_SECOND);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut out = Out::new();
    while let Some(first) = messages.next().await {
        let mut turn: Vec<Delivery> = first.into_iter().collect();
        while turn.len() < (per_second / TURNS_PER_SECOND).max(1) as usize {
            let Some(Some(Ok(delivery))) = messages.next().now_or_never() else {
                break;
            };
            turn.push(delivery);
        }
        for delivery in &turn {
            let order: Order = delivery.json()?;
            out.line(&format!("{} {}", delivery.id(), order.number));
        }
        out.flush().await?;
        for delivery in turn {
            // Refused where the partition was given to another member meanwhile: it is delivered there.
            let _ = delivery.ack();
        }
        pace.tick().await;
    }
    Ok(())
}
