//! `shardmq group`: who consumes a topic, how far they are, and moving them.

use clap::Subcommand;
use serde::Serialize;
use shardmq::{
    GroupInfo, GroupName, GroupPartition, GroupSummary, MemberInfo, NodeId, PartitionId, Sought,
    Start, TopicName,
};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, note, or_dash, secs, table, time};
use crate::start::parse_start;

/// List, describe, move and delete groups.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the groups.
    List {
        /// Only of this topic.
        topic: Option<String>,
    },
    /// Show a group's consumers, and how far it is in each partition.
    Describe { topic: String, group: String },
    /// Move a group: it goes on at another place, also while it consumes.
    ///
    /// Exits with 4 where a server could not be reached, or another transaction had locked the group's
    /// place in a partition for 5 s; all other partitions are moved then, and it may be tried again.
    Seek {
        topic: String,
        group: String,
        /// To earliest, latest, a time (2026-11-22T08:00:00Z, or without a zone in UTC) or a message id:
        /// exactly there in its own partition, and at its time in the others.
        #[arg(long, value_parser = parse_start)]
        to: Start,
        /// Only in this partition, such as 10101. May be given several times.
        #[arg(long = "partition", value_name = "PARTITION")]
        partitions: Vec<PartitionId>,
    },
    /// Delete a group, which must have no live consumer. One of that name that comes later begins anew.
    Delete { topic: String, group: String },
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let mut out = Out::new();
    match command {
        Command::List { topic } => {
            list(context, &mut out, &cluster.groups(topic.as_deref()).await?)?;
        }
        Command::Describe { topic, group } => {
            describe(context, &mut out, &cluster.group(&topic, &group).await?)?;
        }
        Command::Seek { topic, group, to, partitions } => {
            let partitions = Some(partitions.as_slice()).filter(|named| !named.is_empty());
            let sought = cluster.seek(&topic, &group, to, partitions).await?;
            print_sought(context, &mut out, &sought)?;
        }
        Command::Delete { topic, group } => {
            cluster.delete_group(&topic, &group).await?;
            note(&format!("group {group} of topic {topic} is deleted"));
        }
    }
    cluster.shutdown().await;
    out.flush().await
}

/// A group in lists.
#[derive(Serialize)]
struct SummaryLine<'a> {
    topic: &'a TopicName,
    group: &'a GroupName,
    broadcast: bool,
    start_at: String,
    members: usize,
    partitions: usize,
    unknown: usize,
    lag: u64,
    lag_secs: Option<f64>,
}

impl<'a> From<&'a GroupSummary> for SummaryLine<'a> {
    fn from(group: &'a GroupSummary) -> Self {
        Self {
            topic: &group.topic,
            group: &group.group,
            broadcast: group.broadcast,
            start_at: time(group.start_at),
            members: group.members,
            partitions: group.partitions,
            unknown: group.unknown,
            lag: group.lag,
            lag_secs: group.lag_secs,
        }
    }
}

fn list(context: &Context, out: &mut Out, groups: &[GroupSummary]) -> Result<(), Failure> {
    if context.json {
        return groups.iter().try_for_each(|group| out.json(&SummaryLine::from(group)));
    }
    let row = |group: &GroupSummary| {
        vec![
            group.topic.to_string(),
            group.group.to_string(),
            if group.broadcast { "broadcast" } else { "shared" }.to_owned(),
            group.members.to_string(),
            group.partitions.to_string(),
            group.unknown.to_string(),
            group.lag.to_string(),
            secs(group.lag_secs),
        ]
    };
    let header = ["topic", "group", "kind", "members", "partitions", "unknown", "lag", "age"];
    out.line(&table(&header, &[3, 4, 5, 6, 7], groups.iter().map(row).collect()));
    Ok(())
}

/// A group by itself.
#[derive(Serialize)]
struct GroupLine<'a> {
    topic: &'a TopicName,
    group: &'a GroupName,
    broadcast: bool,
    start_at: String,
    members: Vec<MemberLine<'a>>,
    partitions: &'a [GroupPartition],
}

#[derive(Serialize)]
struct MemberLine<'a> {
    member: &'a str,
    host: &'a str,
    pid: i32,
    started_at: String,
    heartbeat_secs: f64,
    live: bool,
    partitions: &'a [PartitionId],
    unreachable: &'a [NodeId],
}

impl<'a> From<&'a MemberInfo> for MemberLine<'a> {
    fn from(member: &'a MemberInfo) -> Self {
        Self {
            member: &member.member,
            host: &member.host,
            pid: member.pid,
            started_at: time(member.started_at),
            heartbeat_secs: member.heartbeat_secs,
            live: member.live,
            partitions: &member.partitions,
            unreachable: &member.unreachable,
        }
    }
}

fn describe(context: &Context, out: &mut Out, group: &GroupInfo) -> Result<(), Failure> {
    let start_at = time(group.start_at);
    if context.json {
        return out.json(&GroupLine {
            topic: &group.topic,
            group: &group.group,
            broadcast: group.broadcast,
            start_at,
            members: group.members.iter().map(MemberLine::from).collect(),
            partitions: &group.partitions,
        });
    }
    let kind = if group.broadcast { ", of one consumer alone" } else { "" };
    let (topic, name) = (&group.topic, &group.group);
    out.line(&format!("group {name} of topic {topic}{kind}, started at {start_at}\n"));
    let header = ["member", "host", "pid", "started", "heartbeat", "partitions", "unreachable"];
    let members = group.members.iter().map(member_row).collect();
    out.line(&table(&header, &[2, 4, 5], members));
    let header =
        ["partition", "node", "state", "lag", "age", "acknowledged", "last", "epoch", "member"];
    let partitions = group.partitions.iter().map(partition_row).collect();
    out.line(&format!("\n{}", table(&header, &[3, 4, 7], partitions)));
    Ok(())
}

fn member_row(member: &MemberInfo) -> Vec<String> {
    let unreachable: Vec<String> = member.unreachable.iter().map(ToString::to_string).collect();
    let silent = if member.live { "" } else { ", silent" };
    vec![
        member.member.clone(),
        member.host.clone(),
        member.pid.to_string(),
        time(member.started_at),
        format!("{:.1} s{silent}", member.heartbeat_secs),
        member.partitions.len().to_string(),
        or_dash(Some(unreachable.join(", ")).filter(|nodes| !nodes.is_empty())),
    ]
}

fn partition_row(partition: &GroupPartition) -> Vec<String> {
    vec![
        partition.partition.to_string(),
        partition.node.to_string(),
        partition.state.to_string(),
        or_dash(partition.lag),
        secs(partition.lag_secs),
        or_dash(partition.acked_id),
        or_dash(partition.last_id),
        or_dash(partition.epoch),
        or_dash(partition.member.as_ref()),
    ]
}

fn print_sought(context: &Context, out: &mut Out, sought: &[Sought]) -> Result<(), Failure> {
    if context.json {
        return sought.iter().try_for_each(|sought| out.json(sought));
    }
    let row = |sought: &Sought| {
        let partition = sought.partition.to_string();
        vec![partition, or_dash(sought.before_id), or_dash(sought.acked_id)]
    };
    let header = ["partition", "acknowledged before", "acknowledged now"];
    out.line(&table(&header, &[], sought.iter().map(row).collect()));
    Ok(())
}
