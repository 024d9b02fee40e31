//! Committing a member's cursors.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::consumer::holding::Holding;
use crate::consumer::member::Member;
use crate::error::{ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::failures::{self, Ending, Settle};
use crate::store::group::{self, Move, Moved};

/// How many parked messages one statement deletes.
const MOST_PARKED: usize = 256;

/// How long commits may be apart where each takes long.
const SLOWEST: Duration = Duration::from_secs(10);

/// When cursors are committed: each second, and less often where that takes long. A cursor is one row,
/// and a snapshot that somebody holds for long makes each update slower than the one before.
#[derive(Debug)]
pub(crate) struct Pace {
    interval: Duration,
    due: Instant,
}

impl Pace {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, due: Instant::now() + interval }
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// A commit took so long: a tenth of the time at most is spent on them.
    fn took(&mut self, time: Duration) {
        let apart = (time * 10).clamp(self.interval, SLOWEST.max(self.interval));
        self.due = Instant::now() + apart;
    }
}

impl Member {
    /// Keeps the lease while a flush waits.
    pub(super) async fn renew_if_due(&mut self) {
        let lease = self.shared.options.lease;
        if self.renewed.is_some_and(|at| at.elapsed() > lease * 3 / 10) {
            // Whether that succeeds is seen by the next flush.
            let _ = self.renew().await;
        }
    }

    /// Commits cursors: all that have changed, or those of some partitions. False: some rows were passed
    /// over, since a transaction has locked them, or since another server answered than the one that
    /// their messages were seen on.
    pub(super) async fn flush(&mut self, only: Option<&[PartitionId]>) -> Result<bool> {
        let begun = Instant::now();
        self.pace.took(Duration::ZERO);
        self.lose_void().await;
        let shared = Arc::clone(&self.shared);
        let journal = shared.journal.as_ref().filter(|_| only.is_none());
        let mark = journal.map(|journal| (journal, journal.mark(self.node)));
        let (moves, versions) = self.moves(only);
        let done = self.parked_done(only);
        if moves.is_empty() && done.is_empty() {
            return Ok(true);
        }
        let what = format!("commit cursors on node {}", self.node);
        let mut outcomes = Vec::new();
        if !moves.is_empty() {
            let connection = self.shared.connection(self.node).await?;
            outcomes = group::flush(connection, &self.shared.group, &moves)
                .await
                .map_err(|error| refused(error, &what))?;
        }
        let (mut result, left) = match self.delete_parked(done).await {
            Ok(left) => (Ok(true), left),
            // What was committed is, all the same.
            Err(error) => (Err(error), Vec::new()),
        };
        outcomes.extend(left);
        self.pace.took(begun.elapsed());
        for (partition, moved) in outcomes {
            let outcome = self.moved(partition, moved, &versions).await;
            result = match (result, outcome) {
                (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
                (Ok(all), Ok(this)) => Ok(all && this),
            };
        }
        if let Some((journal, mark)) = mark.filter(|_| matches!(result, Ok(true))) {
            journal.committed(self.node, mark);
        }
        result
    }

    /// Takes note of what became of a partition's cursor, or of something parked. False: next time.
    async fn moved(
        &mut self,
        partition: PartitionId,
        moved: Moved,
        versions: &HashMap<PartitionId, (u64, i64)>,
    ) -> Result<bool> {
        let Some(holding) = self.holdings.get(&partition).cloned() else { return Ok(true) };
        let refusal = match moved {
            Moved::Yes | Moved::Already => {
                let (version, acked_id) = versions.get(&partition).copied().unwrap_or((0, 0));
                holding.tracker().flushed(version);
                holding.committed(acked_id);
                ::metrics::counter!(names::FLUSHED).increment(1);
                return Ok(true);
            }
            Moved::Locked => return Ok(false),
            Moved::OtherServer if holding.is_held() => {
                holding.compare();
                return Ok(false);
            }
            // The next attempt ends it, and notes what is lost: once.
            Moved::OtherServer if holding.is_void() => return Ok(false),
            // Nobody reads it any more, who could compare.
            Moved::OtherServer => {
                self.shared.note_uncommitted(holding.refusal(ErrorKind::LeaseLost), &holding);
                return Ok(true);
            }
            Moved::LeaseLost => ErrorKind::LeaseLost,
            Moved::Reset => ErrorKind::Reset,
        };
        self.lose(&holding, refusal).await;
        Err(holding.refusal(refusal))
    }

    /// What was parked and is done, of all partitions or of some.
    fn parked_done(&self, only: Option<&[PartitionId]>) -> Vec<(Arc<Holding>, Uuid)> {
        let chosen = |partition| only.is_none_or(|only| only.contains(partition));
        let holdings = self.holdings.values().filter(|holding| chosen(&holding.partition));
        let done = |holding: &Arc<Holding>| {
            let ids = holding.parked_done().into_iter();
            ids.map(|id| (Arc::clone(holding), id)).collect::<Vec<_>>()
        };
        holdings.flat_map(done).collect()
    }

    /// Deletes what was parked and is done; what became of those that were not.
    async fn delete_parked(
        &self,
        done: Vec<(Arc<Holding>, Uuid)>,
    ) -> Result<Vec<(PartitionId, Moved)>> {
        if done.is_empty() {
            return Ok(Vec::new());
        }
        let settle = |(holding, id): &(Arc<Holding>, Uuid)| Settle {
            under: holding.under(),
            id: *id,
            ending: &Ending::Done,
        };
        let parked: Vec<Settle<'_>> = done.iter().map(settle).collect();
        let what = format!("delete what was parked on node {}", self.node);
        let mut outcomes = Vec::new();
        // The statement joins what it is given with itself: many in one take far longer than in several.
        for part in parked.chunks(MOST_PARKED) {
            let connection = self.shared.connection(self.node).await?;
            let settled = failures::settle_parked(connection, &self.shared.group, part).await;
            outcomes.extend(settled.map_err(|error| refused(error, &what))?);
        }
        let mut left = Vec::new();
        for ((holding, id), moved) in done.into_iter().zip(outcomes) {
            match moved {
                Moved::Yes | Moved::Already => holding.parked_deleted(id),
                other => left.push((holding.partition, other)),
            }
        }
        Ok(left)
    }

    /// Ends what a reader has found void, before its cursor is named in a flush.
    async fn lose_void(&mut self) {
        let void = self.holdings.values().filter(|holding| holding.is_void());
        let void: Vec<_> = void.map(|h| (h.partition, h.fence.owner)).collect();
        for (partition, owner) in void {
            self.lose_tail(partition, owner).await;
        }
    }

    fn moves(&self, only: Option<&[PartitionId]>) -> (Vec<Move>, HashMap<PartitionId, (u64, i64)>) {
        let mut moves = Vec::new();
        let mut versions = HashMap::new();
        let chosen = |partition| only.is_none_or(|only| only.contains(partition));
        for holding in self.holdings.values().filter(|h| chosen(&h.partition)) {
            let Some(pending) = holding.tracker().pending() else {
                continue;
            };
            moves.push(Move {
                partition: holding.partition,
                fence: holding.fence,
                incarnation: holding.incarnation(),
                acked_id: pending.acked_id,
                acked_ahead: pending.acked_ahead,
            });
            versions.insert(holding.partition, (pending.version, pending.acked_id));
        }
        (moves, versions)
    }
}
