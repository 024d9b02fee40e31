//! The last look: everything read again by a group that has never been there.

use shardmq::Cluster;
use tokio::time::{Instant, timeout_at};

use super::TOPIC;
use super::record::Record;
use super::workload::Order;
use crate::caught_up::CaughtUp;
use crate::failure::Failure;
use crate::output::progress;

const GROUP: &str = "demo-check";

/// Reads until nothing is left; returns what came, and how many a second.
pub(super) async fn read_all(cluster: &Cluster, messages: u32) -> Result<(Record, f64), Failure> {
    let mut record = Record::new(messages);
    let mut caught_up = CaughtUp::begin(cluster, TOPIC, GROUP).await?;
    let bar = progress(u64::from(messages), "read again");
    let began = Instant::now();
    let mut stream = cluster.consumer(TOPIC, GROUP).stream().await?;
    caught_up.joined(&stream.handle().member());
    while !caught_up.is_done() {
        let Ok(received) = timeout_at(caught_up.look_at(), stream.next()).await else {
            caught_up.look().await?;
            continue;
        };
        let Some(received) = received else { break };
        let delivery = received?;
        let order: Order = delivery.json()?;
        record.deliver(0, delivery.id(), order.number);
        caught_up.passed(delivery.id());
        bar.inc(1);
        delivery.ack()?;
    }
    let took = began.elapsed();
    bar.finish_and_clear();
    stream.shutdown(std::time::Duration::from_secs(5)).await?;
    #[allow(clippy::cast_precision_loss)]
    let per_s = record.distinct() as f64 / took.as_secs_f64();
    Ok((record, per_s))
}
