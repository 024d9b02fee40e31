//! Parked messages that are in hand, and reading those that are due.
//!
//! ```text
//! put aside ─> retry table ── due ─> claimed ─> its partition's lane ─> handed out
//!                  ^  ^                │                                  │
//!                  │  └──── dropped ───┘         done: deleted with the next commit of cursors
//!                  └─────────────── failed again: due later, or a dead letter
//! ```

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::consumer::holding::Holding;
use crate::consumer::member::Member;
use crate::consumer::{Event, lock};
use crate::error::Result;
use crate::failure::Past;
use crate::store::connect::refused;
use crate::store::failures::{self, Under};

/// How many parked messages a consumer may have in hand on a node.
const MOST: usize = 1_000;
/// The most of one fetch: messages, and bytes over the first.
const FETCH: (i32, i64) = (256, 1 << 20);
/// How soon more is fetched where there was more than one fetch brings, or may be in hand.
const MORE: Duration = Duration::from_millis(20);

/// Parked messages of one holding.
#[derive(Debug, Default)]
pub(super) struct InHand {
    ids: HashSet<Uuid>,
    /// Done, to be deleted.
    done: HashSet<Uuid>,
}

/// A parked message in hand: dropped, it may be fetched again.
#[derive(Debug)]
pub(super) struct Claim {
    holding: Arc<Holding>,
    pub(super) id: Uuid,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.holding.parked().ids.remove(&self.id);
    }
}

impl Claim {
    pub(super) fn is_done(&self) -> bool {
        self.holding.parked().done.contains(&self.id)
    }
}

/// A parked message that is in hand.
#[derive(Debug)]
pub(crate) struct Again {
    pub(super) claim: Claim,
    pub(super) past: Arc<Past>,
}

impl Holding {
    fn parked(&self) -> MutexGuard<'_, InHand> {
        lock(&self.in_hand)
    }

    /// Takes a parked message, unless it is in hand, or done.
    fn claim(self: &Arc<Self>, id: Uuid) -> Option<Claim> {
        let mut parked = self.parked();
        let free = !parked.done.contains(&id) && parked.ids.insert(id);
        drop(parked);
        free.then(|| Claim { holding: Arc::clone(self), id })
    }

    /// What statements about its messages must name.
    pub(super) fn under(&self) -> Under {
        Under { partition: self.partition, fence: self.fence, incarnation: self.incarnation() }
    }

    /// Something parked is done: it is deleted with the next commit.
    pub(super) fn end_parked(&self, id: Uuid) -> Result<()> {
        // Under this lock, as any acknowledgement: what is accepted here is seen by the flush that follows an
        // end.
        let tracker = self.tracker();
        self.accepts()?;
        self.parked().done.insert(id);
        self.note_acked();
        drop(tracker);
        Ok(())
    }

    /// What is done and not deleted yet.
    pub(super) fn parked_done(&self) -> Vec<Uuid> {
        self.parked().done.iter().copied().collect()
    }

    /// It is deleted.
    pub(super) fn parked_deleted(&self, id: Uuid) {
        self.parked().done.remove(&id);
    }

    /// Whether acknowledgements are not committed yet.
    pub(super) fn is_pending(&self) -> bool {
        self.tracker().pending().is_some() || !self.parked().done.is_empty()
    }

    fn parked_ids(&self) -> Vec<Uuid> {
        let parked = self.parked();
        parked.ids.union(&parked.done).copied().collect()
    }
}

impl Member {
    /// Something parked is due in so many seconds.
    pub(super) fn expect_parked(&mut self, secs: Option<f64>) {
        let Some(secs) = secs else { return };
        let wait = Duration::try_from_secs_f64(secs.clamp(0.0, 1e9)).unwrap_or_default();
        let at = Instant::now() + wait;
        self.parked_at = Some(self.parked_at.map_or(at, |before| before.min(at)));
    }

    /// Fetches what is due.
    pub(super) async fn fetch_parked(&mut self) -> Result<()> {
        self.parked_at = None;
        let held: Vec<Arc<Holding>> =
            self.holdings.values().filter(|holding| holding.may_go()).cloned().collect();
        let in_hand: Vec<Uuid> = held.iter().flat_map(|holding| holding.parked_ids()).collect();
        let partitions: Vec<i32> = held.iter().map(|holding| holding.partition.as_i32()).collect();
        if partitions.is_empty() {
            return Ok(());
        }
        if in_hand.len() >= MOST {
            self.expect_parked(Some(MORE.as_secs_f64()));
            return Ok(());
        }
        let connection = self.shared.connection(self.node).await?;
        let group = &self.shared.group;
        let what = || format!("read parked messages on node {}", self.node);
        let due = failures::parked(&connection, group, &partitions, &in_hand, FETCH)
            .await
            .map_err(|error| refused(error, &what()))?;
        drop(connection);
        self.expect_parked(due.next_secs);
        if !due.parked.is_empty() {
            self.expect_parked(Some(MORE.as_secs_f64()));
        }
        for parked in due.parked {
            let holding = held.iter().find(|holding| holding.partition == parked.partition);
            let Some(claim) = holding.and_then(|holding| holding.claim(parked.id)) else {
                continue;
            };
            let failures::Parked { row, attempts, first_seen, failures, .. } = parked;
            let past = Arc::new(Past { attempts, first_seen, failures });
            let holding = Arc::clone(&claim.holding);
            let again = Again { claim, past };
            self.shared.send(Event::Parked { holding, row: Arc::new(row), again });
        }
        Ok(())
    }
}
