//! Committing a member's cursors.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::consumer::member::Member;
use crate::error::{ErrorKind, Result};
use crate::id::PartitionId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::group::{self, Move, Moved};

/// Between two attempts at a flush that is waited for.
pub(super) const AGAIN: Duration = Duration::from_millis(20);

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
    /// Flushes until the node has answered and no row was passed over because a transaction had locked
    /// it.
    pub(super) async fn flush_through(&mut self) -> Result<()> {
        loop {
            match self.flush(None).await {
                Ok(false) => {}
                Err(error) if error.kind() == ErrorKind::Unavailable => {}
                other => return other.map(drop),
            }
            tokio::time::sleep(AGAIN).await;
            self.renew_if_due().await;
        }
    }

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
        if moves.is_empty() {
            return Ok(true);
        }
        let connection = self.shared.connection(self.node).await?;
        let what = format!("commit cursors on node {}", self.node);
        let outcomes = group::flush(connection, &self.shared.group, &moves)
            .await
            .map_err(|error| refused(error, &what))?;
        self.pace.took(begun.elapsed());
        let mut result = Ok(true);
        for (partition, moved) in outcomes {
            let Some(holding) = self.holdings.get(&partition).cloned() else {
                continue;
            };
            let refusal = match moved {
                Moved::Yes => {
                    let version = versions.get(&partition).copied().unwrap_or(0);
                    holding.tracker().flushed(version);
                    ::metrics::counter!(names::FLUSHED).increment(1);
                    continue;
                }
                Moved::Locked => {
                    result = result.and(Ok(false));
                    continue;
                }
                Moved::OtherServer if holding.is_held() => {
                    holding.compare();
                    result = result.and(Ok(false));
                    continue;
                }
                // Nobody reads it any more, who could compare.
                Moved::OtherServer => {
                    self.shared.note_uncommitted(holding.refusal(ErrorKind::LeaseLost), &holding);
                    continue;
                }
                Moved::LeaseLost => ErrorKind::LeaseLost,
                Moved::Reset => ErrorKind::Reset,
            };
            result = Err(holding.refusal(refusal));
            self.lose(&holding, refusal).await;
        }
        if let Some((journal, mark)) = mark.filter(|_| matches!(result, Ok(true))) {
            journal.committed(self.node, mark);
        }
        result
    }

    /// Ends what a reader has found void, before its cursor is named in a flush.
    async fn lose_void(&mut self) {
        let void = self.holdings.values().filter(|holding| holding.is_void());
        let void: Vec<_> = void.map(|h| (h.partition, h.fence.owner)).collect();
        for (partition, owner) in void {
            self.lose_tail(partition, owner).await;
        }
    }

    fn moves(&self, only: Option<&[PartitionId]>) -> (Vec<Move>, HashMap<PartitionId, u64>) {
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
            versions.insert(holding.partition, pending.version);
        }
        (moves, versions)
    }
}
