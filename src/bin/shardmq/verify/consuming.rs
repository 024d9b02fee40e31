//! The group: each member records what it is handed, acknowledges it, and says how far it committed.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use shardmq::verify::{Event, Holding, Payload, Recorder, Value};
use shardmq::{Cluster, ConsumerHandle, Delivery, MessageId, Messages, PartitionId, Result};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::{GROUP, Run};
use crate::failure::{Failure, UNFINISHED};

/// The group in the history.
pub(super) const GROUP_NUMBER: u16 = 1;
/// Between two commits whose end is recorded. The library commits by itself too.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
const SHUTDOWN: Duration = Duration::from_secs(10);

/// All members of the group.
pub(super) struct Members {
    handles: Vec<ConsumerHandle>,
    tasks: Vec<JoinHandle<Result<()>>>,
}

impl Members {
    pub(super) async fn join(run: &Arc<Run>, count: u16) -> Result<Self> {
        let (mut handles, mut tasks) = (Vec::new(), Vec::new());
        for number in 1..=u32::from(count) {
            let cluster = Cluster::connect(&run.url).await?;
            let messages = cluster.consumer(&run.topic, GROUP).stream().await?;
            handles.push(messages.handle());
            let member = Member {
                run: Arc::clone(run),
                recorder: run.history.recorder()?,
                number,
                acked: HashMap::new(),
            };
            tasks.push(tokio::spawn(async move {
                let consumed = member.work(messages).await;
                cluster.shutdown().await;
                consumed
            }));
        }
        Ok(Self { handles, tasks })
    }

    /// All commit and leave.
    pub(super) async fn leave(self) -> std::result::Result<(), Failure> {
        for left in join_all(self.handles.iter().map(|handle| handle.shutdown(SHUTDOWN))).await {
            if let Err(error) = left {
                // What was not committed is no violation: the history knows what was confirmed.
                tracing::debug!(error = %error.chain(), "a member left");
            }
        }
        let ended = try_join_all(self.tasks).await;
        let ended = ended.map_err(|e| Failure::new(UNFINISHED, format!("a consumer: {e}")))?;
        Ok(ended.into_iter().collect::<Result<()>>()?)
    }
}

/// How far a partition is acknowledged, and under which acquisition.
struct Position {
    holding: Holding,
    upto: MessageId,
    /// When that was acknowledged: from then on the library may commit it at any time, by itself or as
    /// it gives the partition back. Where a flush waits for another node, that is long before it is
    /// confirmed, and others may have the partition by then.
    acked: Duration,
}

type Positions = HashMap<PartitionId, Position>;
/// A commit under way: what it covers, and whether it was confirmed.
type Commit = Pin<Box<dyn Future<Output = (Positions, Result<()>)> + Send>>;

struct Member {
    run: Arc<Run>,
    recorder: Recorder,
    number: u32,
    acked: Positions,
}

impl Member {
    async fn work(mut self, mut messages: Messages) -> Result<()> {
        let mut pace = interval(COMMIT_EVERY);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let handle = messages.handle();
        let mut commit: Option<Commit> = None;
        loop {
            tokio::select! {
                received = messages.next() => match received {
                    Some(Ok(delivery)) => self.take(delivery)?,
                    Some(Err(news)) => tracing::debug!(news = %news.chain(), "the group's news"),
                    None => break,
                },
                _ = pace.tick(), if commit.is_none() => commit = self.commit(&handle),
                committed = async { commit.as_mut()?.await.into() }, if commit.is_some() => {
                    commit = None;
                    if let Some(committed) = committed {
                        self.committed(committed)?;
                    }
                }
            }
        }
        self.recorder.close()
    }

    fn take(&mut self, delivery: Delivery) -> Result<()> {
        let (id, uid) = (delivery.id(), delivery.uid());
        let holding =
            Holding { group: GROUP_NUMBER, member: self.number, token: delivery.fencing_token() };
        let delivered = Event::Delivered { holding, id, uid, value: value_of(&delivery) };
        let acked = self.run.now();
        self.recorder.record(acked, &delivered)?;
        self.recorder.record(acked, &Event::Acked { holding, id })?;
        // Refused where the partition went to another member meanwhile, which is handed it too.
        if delivery.ack().is_ok() {
            self.acked.insert(id.partition(), Position { holding, upto: id, acked });
        }
        Ok(())
    }

    /// Asks for a commit of what was acknowledged since the last one.
    fn commit(&mut self, handle: &ConsumerHandle) -> Option<Commit> {
        let (covered, handle) = (std::mem::take(&mut self.acked), handle.clone());
        (!covered.is_empty()).then(|| -> Commit {
            Box::pin(async move {
                let outcome = handle.flush().await;
                (covered, outcome)
            })
        })
    }

    fn committed(&mut self, (covered, outcome): (Positions, Result<()>)) -> Result<()> {
        if let Err(error) = outcome {
            // Of some partition; which others were committed is not known.
            tracing::debug!(error = %error.chain(), "a commit failed");
            return Ok(());
        }
        for Position { holding, upto, acked } in covered.into_values() {
            let committed = Event::CursorCommitted { holding, upto, asked: acked };
            self.recorder.record(self.run.now(), &committed)?;
        }
        Ok(())
    }
}

/// What a message carries; none where it is not what was sent.
pub(super) fn value_of(delivery: &Delivery) -> Option<Value> {
    let payload = Payload::decode(delivery.payload()).ok()?;
    (payload.key == delivery.key()).then_some(payload.value)
}
