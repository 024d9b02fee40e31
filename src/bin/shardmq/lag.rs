//! `shardmq lag`: how far the groups are.

use std::collections::BTreeMap;

use clap::Parser;
use serde::Serialize;
use shardmq::PartitionLag;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{Out, note, or_dash, secs, table};

/// Show how far the groups are.
#[derive(Parser)]
pub(crate) struct Args {
    /// Only of this topic.
    topic: Option<String>,
}

/// A group in a partition.
#[derive(Serialize)]
struct LagLine<'a> {
    topic: &'a str,
    #[serde(flatten)]
    lag: &'a PartitionLag,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let cluster = context.connect().await?;
    let topics = match args.topic {
        Some(topic) => vec![topic],
        None => cluster.topics().await?.iter().map(|topic| topic.topic.to_string()).collect(),
    };
    let mut out = Out::new();
    for topic in &topics {
        let lags = cluster.lag(topic).await?;
        if context.json {
            lags.iter().try_for_each(|lag| out.json(&LagLine { topic, lag }))?;
        } else if lags.is_empty() {
            note(&format!("no group consumes topic {topic}"));
        } else {
            print(&mut out, topic, &lags);
        }
    }
    cluster.shutdown().await;
    out.flush().await
}

fn print(out: &mut Out, topic: &str, lags: &[PartitionLag]) {
    let mut rows = Vec::new();
    for (group, lags) in by_group(lags) {
        rows.extend(lags.iter().map(|lag| row(lag)));
        let lag: u64 = lags.iter().map(|lag| lag.lag).sum();
        let oldest = lags.iter().filter_map(|lag| lag.lag_secs).reduce(f64::max);
        let total = [group, "total", &lag.to_string(), &secs(oldest), "", "", ""];
        rows.push(total.map(str::to_owned).to_vec());
    }
    let header = ["group", "partition", "lag", "age", "acknowledged", "last", "member"];
    out.line(&format!("topic {topic}\n"));
    out.line(&table(&header, &[2, 3], rows));
    out.line("");
}

fn by_group(lags: &[PartitionLag]) -> BTreeMap<&str, Vec<&PartitionLag>> {
    let mut groups: BTreeMap<&str, Vec<&PartitionLag>> = BTreeMap::new();
    for lag in lags {
        groups.entry(&lag.group).or_default().push(lag);
    }
    groups
}

fn row(lag: &PartitionLag) -> Vec<String> {
    vec![
        lag.group.clone(),
        lag.partition.to_string(),
        lag.lag.to_string(),
        secs(lag.lag_secs),
        or_dash(lag.acked_id),
        or_dash(lag.last_id),
        or_dash(lag.member.as_ref()),
    ]
}
