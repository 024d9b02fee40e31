//! `shardmq dead`: messages that a group has given up.

use clap::{Args, Subcommand};
use serde::Serialize;
use shardmq::{
    Cluster, DeadLetter, DeadLetterFilter, DeadLetterId, DeadLettersMoved, FailedAttempt,
    GroupName, NodeId, PartitionId, TopicName,
};

use crate::context::Context;
use crate::failure::{Failure, NOT_FOUND, UNAVAILABLE, USAGE};
use crate::output::{MessageLine, Out, counted, note, progress_of, table, time};

/// List, show, send again and drop dead letters: messages that a group has given up.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List dead letters by node and number.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Begin behind this one.
        #[arg(long, value_name = "ID")]
        after: Option<DeadLetterId>,
        /// How many at most.
        #[arg(long, default_value_t = 100)]
        count: u32,
    },
    /// Show one with its message and all its errors.
    Show { id: DeadLetterId },
    /// Give dead letters to their group again, and to no other.
    ///
    /// May be ended at any time, and called again for the rest. Exits with 4 where a node could not be
    /// reached.
    Retry(Chosen),
    /// Drop dead letters for good.
    Drop(Chosen),
}

#[derive(Args)]
pub(crate) struct Filter {
    /// Only of this topic.
    #[arg(long)]
    topic: Option<TopicName>,
    /// Only of this group.
    #[arg(long)]
    group: Option<GroupName>,
    /// Only of this partition, such as 10101.
    #[arg(long)]
    partition: Option<PartitionId>,
    /// Only those whose last error has this text in it.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
}

#[derive(Args)]
pub(crate) struct Chosen {
    /// These, such as 01-42.
    ids: Vec<DeadLetterId>,
    #[command(flatten)]
    filter: Filter,
    /// All there are.
    #[arg(long)]
    all: bool,
}

impl Filter {
    fn of(self, ids: Vec<DeadLetterId>) -> DeadLetterFilter {
        let Self { topic, group, partition, error } = self;
        let ids = Some(ids).filter(|ids| !ids.is_empty());
        DeadLetterFilter { ids, topic, group, partition, error }
    }
}

impl Chosen {
    /// Nobody means all of them without saying so.
    fn filter(self) -> Result<DeadLetterFilter, Failure> {
        let all = self.all;
        let filter = self.filter.of(self.ids);
        if filter == DeadLetterFilter::default() && !all {
            let text =
                "which dead letters? name some, or a topic, group, partition or error, or --all";
            return Err(Failure::new(USAGE, text.to_owned()));
        }
        Ok(filter)
    }
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let mut out = Out::new();
    let cluster = context.connect().await?;
    let outcome = match command {
        Command::List { filter, after, count } => {
            list(context, &cluster, &mut out, &filter.of(Vec::new()), (after, count)).await
        }
        Command::Show { id } => show(context, &cluster, &mut out, id).await,
        Command::Retry(chosen) => {
            let filter = chosen.filter()?;
            let bar = progress_of("dead letters sent again");
            let moved = cluster.retry_dead_letters(&filter, |count| bar.set_position(count)).await;
            bar.finish_and_clear();
            report(context, &mut out, &moved?, "sent again")
        }
        Command::Drop(chosen) => {
            let filter = chosen.filter()?;
            let bar = progress_of("dead letters dropped");
            let moved = cluster.drop_dead_letters(&filter, |count| bar.set_position(count)).await;
            bar.finish_and_clear();
            report(context, &mut out, &moved?, "dropped")
        }
    };
    cluster.shutdown().await;
    out.flush().await?;
    outcome
}

/// A dead letter in lists.
#[derive(Serialize)]
struct Line<'a> {
    dead_letter: String,
    group: &'a GroupName,
    died_at: String,
    first_seen: String,
    attempts: u32,
    error: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unread: bool,
    message: MessageLine<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failures: Option<Vec<FailureLine<'a>>>,
}

#[derive(Serialize)]
struct FailureLine<'a> {
    attempt: u32,
    at: String,
    error: &'a str,
}

impl<'a> From<&'a DeadLetter> for Line<'a> {
    fn from(letter: &'a DeadLetter) -> Self {
        Self {
            dead_letter: letter.id.to_string(),
            group: &letter.group,
            died_at: time(letter.died_at),
            first_seen: time(letter.first_seen),
            attempts: letter.attempts,
            error: last_error(letter),
            unread: letter.unread,
            message: MessageLine::from(&letter.message),
            failures: None,
        }
    }
}

fn last_error(letter: &DeadLetter) -> &str {
    letter.failures.last().map_or("", |failure| failure.error.as_str())
}

async fn list(
    context: &Context,
    cluster: &Cluster,
    out: &mut Out,
    filter: &DeadLetterFilter,
    (after, count): (Option<DeadLetterId>, u32),
) -> Result<(), Failure> {
    let list = cluster.dead_letters(filter, after, count).await?;
    if context.json {
        list.letters.iter().try_for_each(|letter| out.json(&Line::from(letter)))?;
    } else {
        let row = |letter: &DeadLetter| {
            vec![
                letter.id.to_string(),
                letter.message.topic.to_string(),
                letter.group.to_string(),
                letter.message.id.to_string(),
                time(letter.died_at),
                letter.attempts.to_string(),
                shortened(last_error(letter)),
            ]
        };
        let header = ["dead letter", "topic", "group", "message", "died at", "attempts", "error"];
        out.line(&table(&header, &[5], list.letters.iter().map(row).collect()));
    }
    if let Some(last) = list.letters.last().filter(|_| list.more) {
        note(&format!("there are more: --after {}", last.id));
    }
    unreachable(&list.unreachable)
}

/// One line, of a width that a table bears.
fn shortened(error: &str) -> String {
    let line: String = error.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

async fn show(
    context: &Context,
    cluster: &Cluster,
    out: &mut Out,
    id: DeadLetterId,
) -> Result<(), Failure> {
    let letter = cluster.dead_letter(id).await?;
    let none = || Failure::new(NOT_FOUND, format!("there is no dead letter {id}"));
    let letter = letter.ok_or_else(none)?;
    if context.json {
        let failure = |failure: &'_ FailedAttempt| (failure.attempt, time(failure.at));
        let lines = letter.failures.iter().map(|failed| {
            let (attempt, at) = failure(failed);
            FailureLine { attempt, at, error: &failed.error }
        });
        let failures = Some(lines.collect());
        return out.json(&Line { failures, ..Line::from(&letter) });
    }
    out.line(&format!("dead letter {} of group {}", letter.id, letter.group));
    out.line(&format!("first seen {}", time(letter.first_seen)));
    let attempts = counted(u64::from(letter.attempts), "attempt");
    out.line(&format!("given up   {} after {attempts}", time(letter.died_at)));
    for FailedAttempt { attempt, at, error } in &letter.failures {
        out.line(&format!("  {attempt:>3}  {}  {}", time(*at), printable(error)));
    }
    if letter.unread {
        out.line("could not be read: without key, headers and payload");
    }
    crate::look::print_readable(out, &letter.message);
    Ok(())
}

/// What controls a terminal is shown, not done.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn report(
    context: &Context,
    out: &mut Out,
    moved: &DeadLettersMoved,
    done: &str,
) -> Result<(), Failure> {
    if context.json {
        out.json(moved)?;
    } else {
        out.line(&format!("{} {done}", counted(moved.moved, "dead letter")));
    }
    if moved.unread > 0 {
        let stay = counted(moved.unread, "dead letter");
        note(&format!(
            "{stay} without payload: the message still can't be read; they can be dropped"
        ));
    }
    unreachable(&moved.unreachable)
}

fn unreachable(nodes: &[NodeId]) -> Result<(), Failure> {
    if nodes.is_empty() {
        return Ok(());
    }
    let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    let text = format!("node {} could not be reached", nodes.join(", "));
    Err(Failure::new(UNAVAILABLE, text))
}
