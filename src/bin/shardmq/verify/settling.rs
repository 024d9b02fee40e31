//! Before the work: has every member its share? After it: are all nodes back, and has the group
//! everything?

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use shardmq::{Cluster, ErrorKind, PartitionId, Result};
use tokio::time::{Instant, sleep};

use super::GROUP;
use crate::failure::{Failure, UNFINISHED};
use crate::output::note;

const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Waits until every partition is owned, and evenly. After a while it is left at that: to say what
/// is wrong is for the check.
pub(super) async fn share_out(
    cluster: &Cluster,
    topic: &str,
    members: usize,
    partitions: usize,
    patience: Duration,
) -> Result<()> {
    let until = Instant::now() + patience;
    loop {
        let late = Instant::now() > until;
        match shares(cluster, topic).await {
            Ok(shares) if is_even(&shares, members, partitions) => return Ok(()),
            Ok(_) if late => {
                note("warning: the members have no even shares");
                return Ok(());
            }
            Err(error) if late || !error.is_transient() => return Err(error),
            _ => {}
        }
        sleep(LOOK_EVERY).await;
    }
}

/// How many partitions each member of the group owns that owns some.
async fn shares(cluster: &Cluster, topic: &str) -> Result<Vec<usize>> {
    let mut shares = HashMap::new();
    for lag in cluster.lag(topic).await?.into_iter().filter(|lag| lag.group == GROUP) {
        if let Some(member) = lag.member {
            *shares.entry(member).or_default() += 1;
        }
    }
    Ok(shares.into_values().collect())
}

fn is_even(shares: &[usize], members: usize, partitions: usize) -> bool {
    let (least, most) = (shares.iter().min(), shares.iter().max());
    shares.len() == members.min(partitions)
        && shares.iter().sum::<usize>() == partitions
        && least.zip(most).is_some_and(|(least, most)| most - least <= 1)
}

/// Takes the topic back from its nodes where the control database has lost it, as one that was
/// restored from a backup has.
pub(super) async fn topic_is_known(
    cluster: &Cluster,
    topic: &str,
    partitions: &[PartitionId],
) -> std::result::Result<(), Failure> {
    match cluster.topic(topic).await {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        // Nodes that are away are waited for later.
        _ => return Ok(()),
    }
    note(&format!(
        "warning: the control database has lost topic {topic}: it is taken back from its nodes"
    ));
    cluster.repair().await?;
    let made = cluster.topic(topic).await?;
    let again: BTreeSet<_> = made.partitions.iter().map(|p| p.partition).collect();
    if again.iter().eq(partitions.iter().collect::<BTreeSet<_>>()) {
        return Ok(());
    }
    let text = "the control database has lost the topic, and taken back it has other partitions";
    Err(Failure::new(UNFINISHED, text))
}

/// Waits until every node of the topic answers.
pub(super) async fn nodes_answer(
    cluster: &Cluster,
    topic: &str,
    patience: Duration,
) -> std::result::Result<(), Failure> {
    let until = Instant::now() + patience;
    loop {
        let missing = match cluster.topic(topic).await {
            Ok(info) => {
                let away = info.partitions.iter().filter(|p| p.state == "unreachable");
                let mut nodes: Vec<_> = away.map(|p| p.node.to_string()).collect();
                nodes.dedup();
                if nodes.is_empty() {
                    return Ok(());
                }
                format!("of node {}", nodes.join(", "))
            }
            Err(error) => error.chain(),
        };
        if Instant::now() > until {
            let secs = patience.as_secs();
            let text = format!("nothing can be said: no answer within {secs} s: {missing}");
            return Err(Failure::new(UNFINISHED, text));
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Waits until the group has acknowledged everything, or makes no progress: that it lacks something
/// is for the check to say.
pub(super) async fn drain(
    cluster: &Cluster,
    topic: &str,
    partitions: usize,
    patience: Duration,
) -> Result<()> {
    let (mut least, mut since) = (u64::MAX, Instant::now());
    loop {
        let stalled = since.elapsed() > patience;
        match left(cluster, topic, partitions).await {
            Ok(0) => return Ok(()),
            Ok(left) if left < least => (least, since) = (left, Instant::now()),
            Ok(left) if stalled => {
                note(&format!("warning: the group makes no progress, {left} messages are left"));
                return Ok(());
            }
            Err(error) if stalled || !error.is_transient() => return Err(error),
            _ => {}
        }
        sleep(LOOK_EVERY).await;
    }
}

/// How many messages the group has not acknowledged. A partition that it never had counts as one.
async fn left(cluster: &Cluster, topic: &str, partitions: usize) -> Result<u64> {
    let lags = cluster.lag(topic).await?;
    let lags: Vec<u64> = lags.iter().filter(|l| l.group == GROUP).map(|l| l.lag).collect();
    let unseen = partitions.saturating_sub(lags.len()) as u64;
    Ok(lags.into_iter().sum::<u64>() + unseen)
}
