//! The group: its members are tasks of this process, or processes of their own.

use std::future::{Future, ready};
use std::sync::Arc;

use futures_util::future::{join_all, try_join_all};
use shardmq::verify::Recorder;
use shardmq::{Cluster, ConsumerHandle};
use tokio::task::JoinHandle;

use super::consuming::{Log, Member, SHUTDOWN};
use super::processes::Processes;
use super::seen::Seen;
use super::{GROUP, Run};
use crate::failure::{Failure, UNFINISHED};

/// All members of the group.
pub(super) enum Members {
    Here(Here),
    Processes(Processes),
}

impl Members {
    /// All commit and leave.
    pub(super) async fn leave(self) -> Result<(), Failure> {
        match self {
            Self::Here(here) => here.leave().await,
            Self::Processes(processes) => processes.leave().await,
        }
    }
}

/// Members in this process.
pub(super) struct Here {
    handles: Vec<ConsumerHandle>,
    tasks: Vec<JoinHandle<Result<(), Failure>>>,
}

impl Here {
    pub(super) async fn join(run: &Arc<Run>, count: u16) -> Result<Self, Failure> {
        let (mut handles, mut tasks) = (Vec::new(), Vec::new());
        for number in 1..=u32::from(count) {
            let cluster = Cluster::connect(&run.url).await?;
            let messages = cluster.consumer(&run.topic, GROUP).stream().await?;
            handles.push(messages.handle());
            let log = Recorded { number, recorder: run.history.recorder()? };
            let member = Member::new(run.clock, log);
            tasks.push(tokio::spawn(async move {
                let consumed = member.work(messages).await;
                cluster.shutdown().await;
                Ok(consumed?.recorder.close()?)
            }));
        }
        Ok(Self { handles, tasks })
    }

    async fn leave(self) -> Result<(), Failure> {
        for left in join_all(self.handles.iter().map(|handle| handle.shutdown(SHUTDOWN))).await {
            if let Err(error) = left {
                // What was not committed is no violation: the history knows what was confirmed.
                tracing::debug!(error = %error.chain(), "a member left");
            }
        }
        let ended = try_join_all(self.tasks).await;
        let ended = ended.map_err(|e| Failure::new(UNFINISHED, format!("a consumer: {e}")))?;
        ended.into_iter().collect()
    }
}

/// The events of a member in this process, which they need not outlive.
struct Recorded {
    number: u32,
    recorder: Recorder,
}

impl Log for Recorded {
    fn note(&mut self, seen: Seen) -> Result<(), Failure> {
        Ok(seen.record(self.number, &mut self.recorder)?)
    }

    fn flush(&mut self) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }
}
