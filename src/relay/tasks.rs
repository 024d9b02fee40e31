//! What a relay does beside its loop, each in a task: appending, reading large batches, asking for topics.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};

use super::deliver::{Outcome, deliver};
use super::{ASK, LEASE, Outlet};
use crate::deadline::{in_time, on_a_slow_line};
use crate::error::Result;
use crate::id::PartitionId;
use crate::message::MAX_PAYLOAD_LEN;
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::control;
use crate::store::outbox::{self, Frozen};
use crate::topology::Topology;

/// How many batches are read of the table at once, in bytes beyond the first.
const LOAD: u32 = 2 << 20;
/// How long the database may take to answer, beyond the time for its bytes.
const SILENT: Duration = Duration::from_secs(LEASE.as_secs() * 2);

/// What a task has found out.
pub(super) enum News {
    Delivered(Outcome),
    /// These names were asked for, and topics of those exist.
    Asked(Vec<String>, Result<HashSet<String>>),
    /// The map of a topic.
    Topic(String, Result<Topology>),
    /// The next batches of a partition.
    Loaded(PartitionId, Result<Vec<Frozen>>),
}

/// See the module. Dropped, it ends all of them.
pub(super) struct Tasks {
    outlet: Arc<Outlet>,
    running: JoinSet<News>,
}

impl Tasks {
    pub(super) fn new(outlet: &Arc<Outlet>) -> Self {
        Self { outlet: Arc::clone(outlet), running: JoinSet::new() }
    }

    /// What has been found out until now; an error where a task failed.
    pub(super) fn heard(&mut self) -> Option<Result<News, JoinError>> {
        self.running.try_join_next()
    }

    /// Waits for news; none where no task is under way. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Result<News, JoinError>> {
        self.running.join_next().await
    }

    /// Brings a batch into its partition.
    pub(super) fn deliver(&mut self, frozen: Frozen) {
        let outlet = Arc::clone(&self.outlet);
        self.running.spawn(async move { News::Delivered(deliver(&outlet, frozen).await) });
    }

    /// Reads the batches of a partition that follow one.
    pub(super) fn load(&mut self, partition: PartitionId, after: i64) {
        let outlet = Arc::clone(&self.outlet);
        self.running
            .spawn(async move { News::Loaded(partition, load(&outlet, partition, after).await) });
    }

    /// Asks which of these topics exist.
    pub(super) fn ask(&mut self, names: Vec<String>) {
        let outlet = Arc::clone(&self.outlet);
        self.running.spawn(async move {
            outlet.failpoint("asks").await;
            let existing = existing(&outlet, &names).await;
            News::Asked(names, existing)
        });
    }

    /// Reads the map of a topic.
    pub(super) fn read(&mut self, topic: String) {
        let outlet = Arc::clone(&self.outlet);
        self.running.spawn(async move {
            let found = match TopicName::new(&topic) {
                Ok(name) => outlet.context.topology.topic(&name).await,
                Err(error) => Err(error),
            };
            News::Topic(topic, found)
        });
    }
}

/// How long the outbox's database may take for an answer of so many bytes.
pub(super) fn time_for(bytes: usize) -> Duration {
    SILENT + on_a_slow_line(i32::try_from(bytes).unwrap_or(i32::MAX))
}

async fn existing(outlet: &Outlet, names: &[String]) -> Result<HashSet<String>> {
    let what = "look up topics of an outbox";
    let asking = async {
        let found = control::existing(&outlet.context.control.get().await?, names).await;
        found.map_err(|error| refused(error, what))
    };
    in_time(ASK, what, asking).await
}

/// The first batch may have a message of the largest size.
async fn load(outlet: &Outlet, partition: PartitionId, after: i64) -> Result<Vec<Frozen>> {
    let what = format!("relay from {}", outlet.name);
    let loading = async {
        let loaded = outbox::next(&outlet.get().await?, partition, after, i64::from(LOAD)).await;
        loaded.map_err(|error| refused(error, &what))
    };
    in_time(time_for(MAX_PAYLOAD_LEN + LOAD as usize), &what, loading).await
}
