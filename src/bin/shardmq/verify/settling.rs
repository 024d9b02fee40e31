//! After the work: are all nodes back, and has the group everything?

use std::time::Duration;

use shardmq::{Cluster, Result};
use tokio::time::{Instant, sleep};

use super::GROUP;
use crate::failure::{Failure, UNFINISHED};
use crate::output::note;

const LOOK_EVERY: Duration = Duration::from_millis(250);

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

/// Waits until the group has acknowledged everything, or makes no progress: that it lacks something is
/// for the check to say.
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
