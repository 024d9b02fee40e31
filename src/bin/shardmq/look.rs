//! `shardmq peek` and `shardmq message`: messages for people, without moving a cursor.

use clap::Parser;
use futures_util::{StreamExt, TryStreamExt, stream};
use shardmq::{Cluster, MessageId, PartitionId, StoredMessage};

use crate::context::Context;
use crate::failure::{Failure, NOT_FOUND, USAGE};
use crate::output::{MessageLine, Out, or_dash, time};

/// Partitions that are asked at once.
const AT_ONCE: usize = 8;

/// Look at messages without consuming them.
#[derive(Parser)]
pub(crate) struct PeekArgs {
    topic: String,
    /// Only this partition, such as 10101. Without, all of them by the time of appending.
    #[arg(long)]
    partition: Option<PartitionId>,
    /// Begin behind this message, in its partition.
    #[arg(long, value_name = "ID")]
    after: Option<MessageId>,
    /// How many messages at most.
    #[arg(long, default_value_t = 10)]
    count: u32,
}

/// Show one message.
#[derive(Parser)]
pub(crate) struct MessageArgs {
    /// 19 digits.
    id: MessageId,
}

pub(crate) async fn peek(context: &Context, args: PeekArgs) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let topic = cluster.topic(&args.topic).await?;
    let all: Vec<PartitionId> = topic.partitions.iter().map(|info| info.partition).collect();
    let partitions = match chosen(&args)? {
        Some(partition) if !all.contains(&partition) => {
            let text = format!("partition {partition} is not one of topic {}", args.topic);
            return Err(Failure::new(NOT_FOUND, text));
        }
        Some(partition) => vec![partition],
        None => all,
    };
    let mut found: Vec<StoredMessage> = stream::iter(partitions)
        .map(|partition| cluster.peek(partition, args.after, args.count))
        .buffered(AT_ONCE)
        .try_concat()
        .await?;
    cluster.shutdown().await;
    found.sort_by_key(|message| (message.appended_at, message.id));
    found.truncate(usize::try_from(args.count).unwrap_or(usize::MAX));
    print(context, &found).await
}

/// The partition that is asked for, by its number or by a message in it.
fn chosen(args: &PeekArgs) -> Result<Option<PartitionId>, Failure> {
    let after = args.after.map(MessageId::partition);
    match (args.partition, after) {
        (Some(partition), Some(after)) if partition != after => {
            let text = format!("message {} is not in partition {partition}", or_dash(args.after));
            Err(Failure::new(USAGE, text))
        }
        (partition, after) => Ok(partition.or(after)),
    }
}

pub(crate) async fn message(context: &Context, args: MessageArgs) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let found = find(&cluster, args.id).await;
    cluster.shutdown().await;
    print(context, &[found?]).await
}

async fn find(cluster: &Cluster, id: MessageId) -> Result<StoredMessage, Failure> {
    let found = cluster.message(id).await?;
    found.ok_or_else(|| Failure::new(NOT_FOUND, format!("there is no message {id}")))
}

async fn print(context: &Context, messages: &[StoredMessage]) -> Result<(), Failure> {
    let mut out = Out::new();
    for message in messages {
        if context.json {
            out.json(&MessageLine::from(message))?;
        } else {
            print_readable(&mut out, message);
        }
    }
    out.flush().await
}

pub(crate) fn print_readable(out: &mut Out, message: &StoredMessage) {
    let (id, at) = (message.id, time(message.appended_at));
    let key = message.key.as_ref().map_or_else(String::new, |key| format!("  key {key:?}"));
    out.line(&format!("{id}  {at}{key}"));
    for (name, value) in &message.headers {
        out.line(&format!("    {name}: {value:?}"));
    }
    // What controls a terminal is shown, not done.
    let text = String::from_utf8_lossy(&message.payload);
    let shown: String =
        text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect();
    out.line(&format!("    {shown}"));
}
