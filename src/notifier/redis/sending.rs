//! Sends hints and canaries, one pipeline at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::address::Address;
use super::{ANSWER, BACKOFF, LAST_HINTS, REMIND, Wire};
use crate::deadline::jitter;
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::notifier::channel::{lock, payload};
use crate::notifier::task::Running;
use crate::trouble::Trouble;

/// Partitions of one pipeline.
const MAX_PARTITIONS: usize = 10_000;

/// Sends what is pending until it is told to stop, and then the rest, if the server answers soon.
pub(super) async fn run(wire: Arc<Wire>, mut running: Running, stop: CancellationToken) {
    let too_late = async {
        stop.cancelled().await;
        sleep(LAST_HINTS).await;
    };
    let sending = async {
        let mut sender = Sender::new(&wire);
        loop {
            tokio::select! {
                biased;
                () = wire.pending.added() => {}
                () = stop.cancelled() => {}
            }
            while let Err(pause) = sender.send_all().await {
                // What comes meanwhile is merged. At a shutdown it is tried once more at once.
                if stop.is_cancelled() {
                    sleep(BACKOFF.0).await;
                } else {
                    stop.run_until_cancelled(sleep(jitter(pause))).await;
                }
            }
            if stop.is_cancelled() && running.end_if(|| wire.pending.is_empty()) {
                return;
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
    /// Which of the servers comes next.
    nth: usize,
    backoff: Duration,
    trouble: Trouble,
}

impl<'a> Sender<'a> {
    fn new(wire: &'a Wire) -> Self {
        let trouble = Trouble::new(REMIND);
        Self { wire, connection: None, nth: 0, backoff: BACKOFF.0, trouble }
    }

    /// Sends all there is. Where that fails, what was not sent waits, for so long.
    async fn send_all(&mut self) -> Result<(), Duration> {
        loop {
            let partitions = self.wire.pending.take(MAX_PARTITIONS);
            let canary = lock(&self.wire.canary).take();
            if partitions.is_empty() && canary.is_none() {
                return Ok(());
            }
            let Err(error) = self.send(&partitions, canary.as_deref()).await else {
                self.backoff = BACKOFF.0;
                if self.trouble.end() {
                    tracing::info!("hints are sent to Redis again");
                }
                continue;
            };
            ::metrics::counter!(names::NOTIFY_FAILED).increment(1);
            if self.trouble.meet(Instant::now()) {
                tracing::warn!(
                    error = %error.chain(),
                    "hints can't be sent to Redis: consumers find messages by looking"
                );
            }
            self.wire.pending.add(&partitions);
            let mut waiting = lock(&self.wire.canary);
            *waiting = waiting.take().or(canary);
            let pause = self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
            return Err(pause);
        }
    }

    /// Sends once on the connection that is open, unless what is sent there comes back nowhere; where that fails, to
    /// each of the servers in turn.
    async fn send(
        &mut self,
        partitions: &[PartitionId],
        canary: Option<&str>,
    ) -> crate::Result<()> {
        let pipeline = self.pipeline(partitions, canary);
        let astray = self.wire.astray.swap(false, Ordering::Relaxed);
        if let Some(mut connection) = self.connection.take().filter(|_| !astray)
            && publish(&pipeline, &mut connection).await.is_ok()
        {
            self.connection = Some(connection);
            return Ok(());
        }
        let mut outcome = Ok(());
        for _ in 0..self.wire.address.count() {
            self.nth = self.nth.wrapping_add(1);
            match self.send_to(self.nth, &pipeline).await {
                Ok(connection) => {
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    async fn send_to(
        &self,
        nth: usize,
        pipeline: &redis::Pipeline,
    ) -> crate::Result<MultiplexedConnection> {
        let what = self.wire.address.what("send hints to");
        let client = self.wire.address.client(nth).await?;
        let refused = |error| Address::refused(&what, error);
        let mut connection = connect(&client).await.map_err(refused)?;
        publish(pipeline, &mut connection).await.map_err(refused)?;
        Ok(connection)
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
