//! Finding out that there is something to read: by hints, and by looking.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::consumer::holding::Holding;
use crate::consumer::member::{Member, Work};
use crate::consumer::status::ConsumerEvent;
use crate::error::Result;
use crate::id::PartitionId;
use crate::metrics as names;
use crate::notifier::Hint;
use crate::store::connect::refused;
use crate::store::fetch;

/// For how long one consumer looks at a node while the others of the process wait.
const TURN: Duration = Duration::from_secs(1);

impl Member {
    /// Looks, unless somebody else of this process looks at the node.
    pub(super) async fn look_in_turn(&mut self) {
        let turn = self.shared.cluster.inner.nodes.turn(self.node);
        if turn.is_none() && self.looks.busy(Instant::now()) {
            return;
        }
        // Whoever hangs keeps the others for a second, and no longer.
        let hand_on = async {
            sleep(TURN).await;
            drop(turn);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = self.attempt(Work::Look) => {}
            () = hand_on => {}
        }
        self.looks.looked(Instant::now());
        self.observe_notifier();
    }

    /// How hints arrive: tells of news, and looks more often while they do not.
    pub(super) fn observe_notifier(&mut self) {
        let health = self.shared.cluster.inner.notifier.health(self.node);
        // Each time: other consumers of the process have the same gauge.
        self.notifier_gauge().set(f64::from(health.state.code()));
        if self.looks.observe(health.state, Instant::now()) {
            self.shared.told.tell(ConsumerEvent::Notifier { node: self.node, health });
        }
    }

    pub(super) fn notifier_gauge(&self) -> ::metrics::Gauge {
        ::metrics::gauge!(names::NOTIFIER_STATE, "node" => self.node.to_string())
    }

    /// Asks all partitions at once whether they have something, and wakes the readers of those.
    pub(super) async fn look(&mut self) -> Result<()> {
        let (mut known, mut found) = (Vec::new(), HashMap::new());
        let nodes = Arc::clone(&self.shared.cluster.inner.nodes);
        let stuck = nodes.stuck();
        // Who is paused is woken when it is resumed, and its day may be gone by then.
        let read = |holding: &&Arc<Holding>| holding.is_held() && !holding.is_paused();
        for holding in self.holdings.values().filter(read) {
            match holding.position() {
                (Some(day), position) if !stuck.has(holding.partition) => {
                    known.push((holding.partition, day, position));
                }
                // Its reader looks for itself.
                _ => holding.wake.notify_one(),
            }
        }
        for part in known.chunks(fetch::MAX_LOOK) {
            let connection = self.shared.connection(self.node).await?;
            let looked = fetch::look(&connection, part)
                .await
                .map_err(|error| refused(error, &format!("look at node {}", self.node)))?;
            for (partition, error) in looked.stuck {
                if stuck.add(partition) {
                    let error = refused(error, &format!("look at partition {partition}"));
                    tracing::debug!(error = %error.chain(), "left to its reader");
                }
            }
            let changed = looked.changed;
            let position = |partition: &PartitionId| {
                part.iter().find(|known| known.0 == *partition).map(|known| (known.0, known.2))
            };
            found.extend(changed.iter().filter_map(position));
            self.wake(&changed);
        }
        self.looks.found(found);
        Ok(())
    }

    /// Something was appended, or a partition given back; true where that is one that it lacks.
    pub(super) fn hear(&mut self, hint: Hint) -> bool {
        let lacks = |partition: &PartitionId| {
            !self.holdings.contains_key(partition) && self.shared.wants(*partition)
        };
        match hint {
            Hint::Partitions(partitions) => {
                self.wake(&partitions);
                partitions.iter().any(lacks)
            }
            Hint::Look => {
                self.observe_notifier();
                self.wake_all();
                false
            }
            Hint::Interrupted => {
                self.observe_notifier();
                false
            }
        }
    }
}
