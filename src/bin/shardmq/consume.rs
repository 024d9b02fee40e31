//! `shardmq consume`: a group's messages out, one line each. A line is flushed before it is
//! acknowledged, so that what the reader did not get is delivered again.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use futures_util::FutureExt;
use indicatif::ProgressBar;
use shardmq::{Delivery, ErrorKind, Filter, Messages, Start};
use tokio::time::{sleep, sleep_until};

use crate::caught_up::CaughtUp;
use crate::context::Context;
use crate::failure::Failure;
use crate::output::{MessageLine, Out, counted, counter, note};
use crate::produce::parse_header;
use crate::signals::Interrupt;
use crate::start::parse_start;

/// Lines that are flushed and acknowledged together: so many messages or bytes.
const MOST_LINES: usize = 1_000;
const MOST_BYTES: usize = 1 << 20;
/// How long the reader may take to take lines that it was given before a signal.
const PATIENCE_AFTER_SIGNAL: Duration = Duration::from_secs(1);
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Print a group's messages, one JSON object per line, and acknowledge what was printed.
///
/// Ends when the group has consumed what was there at the start, or with `--follow` at a signal.
#[derive(Parser)]
pub(crate) struct Args {
    topic: String,
    /// The group, which remembers what was acknowledged.
    #[arg(long)]
    group: String,
    /// Where a group begins that has not consumed the topic before: earliest, latest, a time
    /// (2026-11-22T08:00:00Z, or without a zone in UTC) or a message id.
    #[arg(long, default_value = "earliest", value_parser = parse_start)]
    from: Start,
    /// End after so many messages.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Wait for more when all is consumed.
    #[arg(long)]
    follow: bool,
    /// Print messages with this header alone, which may be repeated: all must match. The others
    /// count as consumed.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header)]
    header: Vec<(String, String)>,
    /// Print messages alone whose key begins so. The others count as consumed.
    #[arg(long, value_name = "TEXT")]
    key_prefix: Option<String>,
    /// Keep acknowledgements in this directory until they are committed: they survive when this
    /// process is killed.
    #[arg(long, value_name = "FOLDER")]
    journal: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let mut interrupt = Interrupt::new()?;
    let cluster = context.connect().await?;
    let mut caught_up = None;
    if !args.follow {
        caught_up = Some(CaughtUp::begin(&cluster, &args.topic, &args.group).await?);
    }
    let mut consumer = cluster.consumer(&args.topic, &args.group);
    if let Some(folder) = args.journal {
        consumer = consumer.journal(folder);
    }
    let headers = args.header.into_iter().map(|(name, value)| Filter::header(name, value));
    let prefix = args.key_prefix.map(Filter::key_prefix);
    if let Some(filter) = headers.chain(prefix).reduce(Filter::and) {
        consumer = consumer.filter(filter);
    }
    let messages = consumer.start(args.from).stream().await?;
    if let Some(caught_up) = &mut caught_up {
        caught_up.joined(&messages.handle().member());
    }
    let mut session = Session {
        messages,
        caught_up,
        rest: args.count.unwrap_or(u64::MAX),
        out: Out::new(),
        refused: 0,
        ended: None,
        counter: counter(),
    };
    let outcome = session.print(&mut interrupt).await;
    session.counter.finish_and_clear();
    let ended = session.messages.shutdown(SHUTDOWN).await;
    cluster.shutdown().await;
    if session.refused > 0 {
        let again = counted(session.refused, "message");
        note(&format!("delivered to another member of the group too: {again}"));
    }
    outcome.and(ended.or_else(tolerate_lost_lease).map_err(Failure::from))
}

/// What was acknowledged too late is delivered again elsewhere, which is no failure of ours.
fn tolerate_lost_lease(error: shardmq::Error) -> shardmq::Result<()> {
    match error.kind() {
        ErrorKind::LeaseLost | ErrorKind::Reset => {
            note(&format!("warning: {}", error.chain()));
            Ok(())
        }
        _ => Err(error),
    }
}

/// Consuming until it is over.
struct Session {
    messages: Messages,
    /// None to wait for more.
    caught_up: Option<CaughtUp>,
    /// How many messages may still be printed.
    rest: u64,
    out: Out,
    refused: u64,
    /// Why the stream ends by itself.
    ended: Option<shardmq::Error>,
    counter: ProgressBar,
}

impl Session {
    /// Prints until nothing is left to print, or a signal comes.
    async fn print(&mut self, interrupt: &mut Interrupt) -> Result<(), Failure> {
        while self.rest > 0 && !self.caught_up.as_ref().is_some_and(CaughtUp::is_done) {
            let first = tokio::select! {
                biased;
                () = interrupt.caught() => return Ok(()),
                first = self.messages.next() => first,
                () = time_to_look(self.caught_up.as_ref()) => {
                    if let Some(caught_up) = &mut self.caught_up {
                        caught_up.look().await?;
                    }
                    continue;
                }
            };
            let Some(first) = first else {
                return self.ended.take().map_or(Ok(()), |error| Err(error.into()));
            };
            let batch = self.batch(first);
            self.print_batch(batch, interrupt).await?;
        }
        Ok(())
    }

    /// The next message, and what else is there without waiting.
    fn batch(&mut self, first: shardmq::Result<Delivery>) -> Vec<Delivery> {
        let most = MOST_LINES.min(usize::try_from(self.rest).unwrap_or(usize::MAX));
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let mut next = Some(first);
        while let Some(received) = next {
            match received {
                Ok(delivery) => {
                    bytes += delivery.payload().len();
                    batch.push(delivery);
                }
                // The last word of a stream whose topic is gone.
                Err(error) if error.kind() == ErrorKind::NotFound => self.ended = Some(error),
                Err(error) => note(&format!("warning: {}", error.chain())),
            }
            let full = batch.len() >= most || bytes >= MOST_BYTES;
            next = if full { None } else { self.messages.next().now_or_never().flatten() };
        }
        batch
    }

    /// Writes, flushes, then acknowledges.
    async fn print_batch(
        &mut self,
        batch: Vec<Delivery>,
        interrupt: &mut Interrupt,
    ) -> Result<(), Failure> {
        for delivery in &batch {
            self.out.json(&MessageLine::from(delivery))?;
        }
        let flushed = tokio::select! {
            flushed = self.out.flush() => flushed.map(|()| true),
            // The reader is stuck, and gets these lines again.
            () = at_last(interrupt) => Ok(false),
        };
        if !matches!(flushed, Ok(true)) {
            batch.into_iter().for_each(Delivery::give_back);
            return flushed.map(drop);
        }
        self.counter.inc(batch.len() as u64);
        self.rest -= batch.len() as u64;
        for delivery in batch {
            if let Some(caught_up) = &mut self.caught_up {
                caught_up.passed(delivery.id());
            }
            // The only refusal: the partition is another member's by now.
            self.refused += u64::from(delivery.ack().is_err());
        }
        Ok(())
    }
}

/// Returns when the nodes are to be asked; never where nobody asks.
async fn time_to_look(caught_up: Option<&CaughtUp>) {
    match caught_up {
        Some(caught_up) => sleep_until(caught_up.look_at()).await,
        None => std::future::pending().await,
    }
}

/// Returns a while after a signal.
async fn at_last(interrupt: &mut Interrupt) {
    interrupt.caught().await;
    sleep(PATIENCE_AFTER_SIGNAL).await;
}
