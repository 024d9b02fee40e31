//! Sends hints and canaries, one pipeline at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::{ANSWER, BACKOFF, LAST_HINTS, Wire};
use crate::error::Result;
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::notifier::channel::{lock, payload};

/// Partitions of one pipeline.
const MAX_PARTITIONS: usize = 10_000;

/// Sends what is pending until it is told to stop, and then the rest, if the server answers soon.
pub(super) async fn run(wire: Arc<Wire>, stop: CancellationToken) {
    let too_late = async {
        stop.cancelled().await;
        tokio::time::sleep(LAST_HINTS).await;
    };
    let sending = async {
        let mut sender = Sender { wire: &wire, connection: None, backoff: BACKOFF.0 };
        loop {
            tokio::select! {
                biased;
                () = wire.pending.added() => {}
                () = stop.cancelled() => return,
            }
            let until = sender.send_all().await;
            // What comes meanwhile is merged.
            tokio::select! {
                () = sleep_until(until) => {}
                () = stop.cancelled() => {}
            }
        }
    };
    tokio::select! {
        () = sending => {}
        () = too_late => {}
    }
}

struct Sender<'a> {
    wire: &'a Wire,
    connection: Option<MultiplexedConnection>,
    backoff: Duration,
}

impl Sender<'_> {
    /// Sends all there is. Returns until when to wait, where that failed.
    async fn send_all(&mut self) -> Instant {
        loop {
            let partitions = self.wire.pending.take(MAX_PARTITIONS);
            let canary = lock(&self.wire.canary).take();
            if partitions.is_empty() && canary.is_none() {
                return Instant::now();
            }
            if let Err(error) = self.send(&partitions, canary.as_deref()).await {
                // Consumers look by themselves.
                ::metrics::counter!(names::NOTIFY_FAILED).increment(1);
                tracing::debug!(error = %error.chain(), "hints were not sent to Redis");
                let until = Instant::now() + self.backoff;
                self.backoff = (self.backoff * 2).min(BACKOFF.1);
                return until;
            }
            self.backoff = BACKOFF.0;
        }
    }

    /// Sends once; where that fails on a connection that was open, once more on another.
    async fn send(&mut self, partitions: &[PartitionId], canary: Option<&str>) -> Result<()> {
        let pipeline = self.pipeline(partitions, canary);
        if let Some(mut connection) = self.connection.take()
            && publish(&pipeline, &mut connection).await.is_ok()
        {
            self.connection = Some(connection);
            return Ok(());
        }
        let client = self.wire.address.client().await?;
        let what = || self.wire.address.what("send hints to");
        let mut connection =
            connect(&client).await.map_err(|error| self.wire.address.refused(&what(), error))?;
        let sent = publish(&pipeline, &mut connection).await;
        sent.map_err(|error| self.wire.address.refused(&what(), error))?;
        self.connection = Some(connection);
        Ok(())
    }

    fn pipeline(&self, partitions: &[PartitionId], canary: Option<&str>) -> redis::Pipeline {
        let mut by_node: BTreeMap<NodeId, Vec<PartitionId>> = BTreeMap::new();
        for partition in partitions {
            by_node.entry(partition.node()).or_default().push(*partition);
        }
        let mut pipeline = redis::pipe();
        for (node, partitions) in by_node {
            pipeline
                .cmd("PUBLISH")
                .arg(self.wire.channel_name(node))
                .arg(payload(&partitions))
                .ignore();
        }
        if let Some(canary) = canary {
            pipeline.cmd("PUBLISH").arg(&self.wire.own).arg(canary).ignore();
        }
        pipeline
    }
}

async fn connect(client: &Client) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER))
        .set_response_timeout(Some(ANSWER));
    client.get_multiplexed_async_connection_with_config(&config).await
}

async fn publish(
    pipeline: &redis::Pipeline,
    connection: &mut MultiplexedConnection,
) -> RedisResult<()> {
    match timeout(ANSWER, pipeline.query_async::<()>(connection)).await {
        Ok(published) => published,
        Err(_) => Err((redis::ErrorKind::Io, "no answer in time").into()),
    }
}
