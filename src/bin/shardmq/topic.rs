//! `shardmq topic`: named queues and their partitions.

use clap::Subcommand;
use serde::Serialize;
use shardmq::{
    Cluster, MAX_PARTITIONS, NodeId, PartitionInfo, Retention, TopicInfo, TopicName, TopicOptions,
    TopicSummary,
};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, note, or_dash, table, time};

/// Make, list, describe and delete topics.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a topic.
    Create {
        name: String,
        /// How many, 1 to 9801. Each takes up to 99,999,999 messages a day.
        #[arg(long, value_parser = partition_count)]
        partitions: usize,
        /// Take a topic of that name that is there already.
        #[arg(long)]
        if_missing: bool,
        /// Only on these nodes, such as 1,2.
        #[arg(long, value_delimiter = ',')]
        nodes: Option<Vec<NodeId>>,
        /// How many days a day's messages are kept after its end, 1 to 3650.
        #[arg(long, default_value_t = Retention::default().days, value_name = "DAYS")]
        retention_days: u16,
        /// Drop days also that some group has not finished.
        #[arg(long)]
        drop_unread: bool,
        /// How many days dead letters are kept, 1 to 3650.
        #[arg(long, default_value_t = Retention::default().dead_letter_days, value_name = "DAYS")]
        dead_letter_days: u16,
    },
    /// List the topics.
    List,
    /// Show a topic's partitions.
    Describe { name: String },
    /// Delete a topic with all its messages.
    Delete {
        name: String,
        /// Also where a group has messages left to consume.
        #[arg(long)]
        force: bool,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let mut out = Out::new();
    match command {
        Command::Create {
            name,
            partitions,
            if_missing,
            nodes,
            retention_days,
            drop_unread,
            dead_letter_days,
        } => {
            let retention = Retention { days: retention_days, drop_unread, dead_letter_days };
            let options = options(partitions, if_missing, nodes).retention(retention);
            let topic = cluster.create_topic(&name, options).await?;
            print_topic(context, &mut out, &topic)?;
        }
        Command::List => list(context, &cluster, &mut out).await?,
        Command::Describe { name } => {
            print_topic(context, &mut out, &cluster.topic(&name).await?)?;
        }
        Command::Delete { name, force } => {
            cluster.delete_topic(&name, force).await?;
            note(&format!("topic {name} is deleted"));
        }
    }
    cluster.shutdown().await;
    out.flush().await
}

fn options(partitions: usize, if_missing: bool, nodes: Option<Vec<NodeId>>) -> TopicOptions {
    let mut options = TopicOptions::partitions(partitions);
    if let Some(nodes) = nodes {
        options = options.nodes(nodes);
    }
    if if_missing { options.if_missing() } else { options }
}

/// A topic in lists.
#[derive(Serialize)]
struct SummaryLine<'a> {
    topic: &'a TopicName,
    partitions: usize,
    generation: i32,
    created_at: String,
}

/// A topic by itself.
#[derive(Serialize)]
struct TopicLine<'a> {
    topic: &'a TopicName,
    generation: i32,
    created_at: String,
    partitions: &'a [PartitionInfo],
}

async fn list(context: &Context, cluster: &Cluster, out: &mut Out) -> Result<(), Failure> {
    let topics = cluster.topics().await?;
    if context.json {
        return topics.iter().try_for_each(|topic| {
            out.json(&SummaryLine {
                topic: &topic.topic,
                partitions: topic.partitions,
                generation: topic.generation,
                created_at: time(topic.created_at),
            })
        });
    }
    let row = |topic: &TopicSummary| {
        let partitions = topic.partitions.to_string();
        vec![
            topic.topic.to_string(),
            partitions,
            topic.generation.to_string(),
            time(topic.created_at),
        ]
    };
    let header = ["topic", "partitions", "generation", "created"];
    out.line(&table(&header, &[1, 2], topics.iter().map(row).collect()));
    Ok(())
}

fn print_topic(context: &Context, out: &mut Out, topic: &TopicInfo) -> Result<(), Failure> {
    let created_at = time(topic.created_at);
    if context.json {
        return out.json(&TopicLine {
            topic: &topic.topic,
            generation: topic.generation,
            created_at,
            partitions: &topic.partitions,
        });
    }
    let (name, generation) = (&topic.topic, topic.generation);
    out.line(&format!("topic {name}, generation {generation}, created {created_at}\n"));
    let row = |info: &PartitionInfo| {
        let (partition, node) = (info.partition.to_string(), info.node.to_string());
        let messages = info.messages.to_string();
        vec![partition, node, info.state.clone(), messages, or_dash(info.last_id)]
    };
    let header = ["partition", "node", "state", "messages", "last id"];
    out.line(&table(&header, &[3], topic.partitions.iter().map(row).collect()));
    Ok(())
}

fn partition_count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=MAX_PARTITIONS).contains(count));
    count.ok_or_else(|| format!("it is not between 1 and {MAX_PARTITIONS}"))
}
