//! Nodes that fail: found, gone around, probed, and used again.
//!
//! ```text
//! append fails ─> again fails too, or no answer ─> down ─> what waits without a key: to other nodes
//!                                                   │      what was under way: ask, then to others
//!                                                   └────> probed until it is back
//! ```
//!
//! A lane's batch that is under way is the business of [`settle`](crate::producer::settle); here is what
//! concerns a node as a whole.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::Instrument;

use crate::deadline::in_time;
use crate::error::{Error, ErrorKind};
use crate::producer::KeyFailover;
use crate::producer::batch::{Batch, Kind};
use crate::producer::health::NodeState;
use crate::producer::lane::Lane;
use crate::producer::shared::Shared;
use crate::producer::status::ProducerEvent;
use crate::producer::writer::Writer;
use crate::store::append;

/// How often nodes are compared with the clock: a fraction of what makes one slow.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks after the nodes of a producer until it has ended.
pub(super) async fn watch(shared: Arc<Shared>) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.ended.cancelled() => return,
        }
        // A partition that was full is open again after midnight.
        shared.look_anew();
        for writer in shared.writers.values() {
            if writer.health.look() {
                shared.note_change();
            }
            if writer.health.state() != NodeState::Up {
                shared.evacuate(writer);
            }
            if writer.health.is_probe_due() {
                let (shared, writer) = (Arc::clone(&shared), Arc::clone(writer));
                let span = tracing::debug_span!("probe", node = %writer.node);
                let tasks = shared.cluster.inner.tasks.clone();
                tasks.spawn(async move { probe(&shared, &writer).await }.instrument(span));
            }
        }
    }
}

/// Asks a node that is down to write something to its log.
async fn probe(shared: &Shared, writer: &Writer) {
    let limit = shared.options.append_timeout;
    let answer = match shared.cluster.inner.nodes.connect(writer.node, limit).await {
        Ok(connection) => {
            let what = format!("probe node {}", writer.node);
            in_time(limit, &what, append::probe(connection, writer.node)).await
        }
        Err(error) => Err(error),
    };
    match answer {
        Ok(()) => shared.is_back(writer, writer.health.answered()),
        Err(error) if error.is_own_pool() => writer.health.unasked(),
        Err(error) => {
            writer.health.unanswered(&error);
            tracing::debug!(error = %error.chain(), "the node is still away");
        }
    }
}

impl Shared {
    pub(super) fn tell(&self, event: ProducerEvent) {
        // There need not be anybody who reads.
        self.events.tell(event);
    }

    /// A node is in trouble: what may go elsewhere does.
    pub(super) fn node_failed(&self, writer: &Writer, error: &Error) {
        if !writer.health.failed(error) {
            return;
        }
        let node = writer.node;
        tracing::warn!(%node, topic = %self.topology.topic, error = %error.chain(), "node down");
        self.tell(ProducerEvent::NodeDown { node, error: error.clone() });
        self.note_change();
        self.evacuate(writer);
    }

    /// An append worked.
    pub(super) fn node_worked(&self, writer: &Writer) {
        self.is_back(writer, writer.health.worked());
    }

    fn is_back(&self, writer: &Writer, after: Option<Duration>) {
        if let Some(after) = after {
            let node = writer.node;
            tracing::info!(%node, topic = %self.topology.topic, ?after, "node up");
            self.tell(ProducerEvent::NodeUp { node, after });
            self.note_change();
        }
    }

    /// Whether a batch may go to another node.
    pub(super) fn is_free(&self, batch: &Batch) -> bool {
        match batch.kind {
            Kind::Free => true,
            Kind::Keyed => self.options.key_failover == KeyFailover::Divert,
            Kind::Once => false,
        }
    }

    /// Whether a batch is to fail, rather than wait for a node that is down.
    pub(super) fn is_impatient(&self, batch: &Batch) -> bool {
        batch.kind != Kind::Free && self.options.key_failover == KeyFailover::Fail
    }

    /// Sends what waits for a node and is not under way elsewhere, if there is a better node.
    fn evacuate(&self, writer: &Writer) {
        let ours = self.lanes.iter().filter(|lane| lane.writer.node == writer.node);
        for lane in ours.filter(|lane| !lane.is_idle()) {
            let _moving = self.moving();
            if writer.health.state() == NodeState::Down {
                for batch in lane.take_free(|batch| self.is_impatient(batch)) {
                    self.answer(&batch, Err(Self::away(writer)));
                }
            }
            if self.better_lane(lane).is_some() {
                for batch in lane.take_free(|batch| self.is_free(batch)) {
                    self.forward(lane, batch.fresh());
                }
            }
        }
        self.maybe_end();
    }

    /// Hands a batch to a better lane, or back to this one where there is none any more.
    pub(super) fn forward(&self, lane: &Arc<Lane>, batch: Batch) {
        self.hand(self.better_lane(lane).unwrap_or(lane), batch);
    }

    /// The error of a message that may not wait for its node.
    pub(super) fn away(writer: &Writer) -> Error {
        let what = format!("node {} is down", writer.node);
        match writer.health.detail().1 {
            Some(cause) => Error::with_source(ErrorKind::Unavailable, what, cause.chain()),
            None => Error::new(ErrorKind::Unavailable, what),
        }
    }

    /// Why there is no node to send to, where that is so: each node, and what is wrong with it.
    pub(super) fn no_node_left(&self) -> Option<String> {
        let down = |writer: &Writer| {
            let (since, why) = writer.health.detail();
            let why = why.map_or_else(|| "no answer".to_owned(), |error| error.chain());
            format!("node {} (for {:.1} s): {why}", writer.node, since.elapsed().as_secs_f32())
        };
        let writers = || self.writers.values();
        let none = writers().all(|writer| writer.health.state() == NodeState::Down);
        none.then(|| writers().map(|w| down(w)).collect::<Vec<_>>().join("; "))
    }
}

/// Errors that say something about a node, rather than about one partition or batch.
pub(super) fn is_of_node(error: &Error) -> bool {
    let kinds = matches!(
        error.kind(),
        ErrorKind::Unavailable
            | ErrorKind::Unknown
            | ErrorKind::Timeout
            | ErrorKind::Conflict
            | ErrorKind::Incompatible
    );
    kinds && !error.is_own_pool()
}
