//! The final read: everything that is stored, by clients that have seen nothing before.

use std::collections::HashMap;
use std::time::Duration;

use shardmq::verify::{Event, Recorder};
use shardmq::{Cluster, Delivery, MessageId, PartitionId, Result};
use tokio::time::timeout;

use super::Run;
use super::consuming::value_of;
use crate::caught_up::CaughtUp;
use crate::failure::{Failure, UNFINISHED};

const GROUP: &str = "verify-final";
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Reads every partition from its beginning and records what is there.
pub(super) async fn read_all(run: &Run) -> std::result::Result<(), Failure> {
    let cluster = Cluster::connect(&run.url).await?;
    let mut caught_up = CaughtUp::begin(&cluster, &run.topic, GROUP).await?;
    let mut messages = cluster.consumer(&run.topic, GROUP).stream().await?;
    caught_up.joined(&messages.handle().member());
    let mut stored = Stored { run, partitions: HashMap::new() };
    while !caught_up.is_done() {
        let received = tokio::select! {
            received = timeout(run.patience, messages.next()) => received,
            () = tokio::time::sleep_until(caught_up.look_at()) => {
                caught_up.look().await?;
                continue;
            }
        };
        match received {
            Ok(Some(Ok(delivery))) => {
                caught_up.passed(delivery.id());
                stored.take(delivery)?;
            }
            // A server was restarted meanwhile: what it has comes again.
            Ok(Some(Err(news))) => tracing::debug!(news = %news.chain(), "the final read's news"),
            Ok(None) => break,
            Err(_) => {
                let text = "the final read does not come to its end";
                return Err(Failure::new(UNFINISHED, text));
            }
        }
    }
    stored.close()?;
    messages.shutdown(SHUTDOWN).await?;
    cluster.shutdown().await;
    Ok(())
}

struct Stored<'a> {
    run: &'a Run,
    partitions: HashMap<PartitionId, Reading>,
}

struct Reading {
    recorder: Recorder,
    /// The acquisition under which the last message came, and that message.
    last: Option<(u64, MessageId)>,
}

impl Stored<'_> {
    fn take(&mut self, delivery: Delivery) -> Result<()> {
        let (id, token) = (delivery.id(), delivery.fencing_token());
        let reading = match self.partitions.entry(id.partition()) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let recorder = self.run.history.recorder()?;
                entry.insert(Reading { recorder, last: None })
            }
        };
        // Read again after the partition was lost and taken again: no finding.
        let again = reading.last.is_some_and(|(holding, last)| holding != token && id <= last);
        if !again {
            let stored = Event::Stored {
                id,
                uid: delivery.uid(),
                value: value_of(&delivery),
                marked_duplicate: delivery.is_possible_duplicate(),
            };
            reading.recorder.record(self.run.now(), &stored)?;
            reading.last = Some((token, id));
        }
        // Whether that counts is of no interest: nobody goes on from there.
        let _ = delivery.ack();
        Ok(())
    }

    fn close(self) -> Result<()> {
        self.partitions.into_values().try_for_each(|reading| reading.recorder.close())
    }
}
