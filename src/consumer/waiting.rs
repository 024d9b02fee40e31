//! Flushes and handovers that wait for a cursor which somebody's open transaction has locked.
//!
//! ```text
//!                        ┌─ everything is committed ───> a flush is answered
//! flush, handover ─> attempt ─ committed ──────────────> a partition is released
//!                     ^  └─ a cursor is locked ─┐   at its own deadline: an error
//!                     └──── a little later ─────┘
//! ```
//!
//! They are a state of the member, which does all of its other work meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::consumer::holding::Holding;
use crate::consumer::member::{Member, STATEMENT};
use crate::error::{Error, ErrorKind, Result};
use crate::id::PartitionId;

/// Between two attempts at what waits: longer each time.
const AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// What waits on one node.
#[derive(Default)]
pub(super) struct Waiting {
    flushes: Vec<Flush>,
    handovers: Vec<Handover>,
    /// When it is tried next.
    at: Option<Instant>,
    pause: Duration,
}

/// A caller that waits until all is committed that was acknowledged before.
struct Flush {
    reply: oneshot::Sender<Result<()>>,
    until: Instant,
}

/// A partition that is to be given back once its acknowledgements are committed.
struct Handover {
    holding: Arc<Holding>,
    until: Instant,
}

impl Waiting {
    /// When an attempt is due.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    pub(super) fn flush(&mut self, reply: oneshot::Sender<Result<()>>) {
        self.flushes.push(Flush { reply, until: Instant::now() + STATEMENT });
        self.begin();
    }

    fn hand_over(&mut self, holding: Arc<Holding>) {
        self.handovers.push(Handover { holding, until: Instant::now() + STATEMENT });
        self.begin();
    }

    fn begin(&mut self) {
        (self.at, self.pause) = (Some(Instant::now()), AGAIN.0);
    }

    /// Plans the next attempt at what is left.
    fn plan(&mut self) {
        let nothing = self.flushes.is_empty() && self.handovers.is_empty();
        self.at = (!nothing).then(|| Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(AGAIN.1);
    }

    /// Answers all callers.
    pub(super) fn answer(&mut self, outcome: &Result<()>) {
        for flush in self.flushes.drain(..) {
            let _ = flush.reply.send(outcome.clone());
        }
    }
}

/// Whether a flush goes on after this error.
fn may_wait(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unknown)
}

impl Member {
    pub(super) async fn attempt_what_waits(&mut self) {
        if !self.waiting.flushes.is_empty() {
            self.attempt_flushes().await;
        }
        if !self.waiting.handovers.is_empty() {
            self.attempt_handovers().await;
        }
        if self.holdings.is_empty() {
            // What of them was lost is told from elsewhere.
            self.waiting.answer(&Ok(()));
        }
        self.waiting.plan();
    }

    /// All callers had come when this began.
    async fn attempt_flushes(&mut self) {
        let what = format!("commit cursors on node {}: no answer in time", self.node);
        let mut late = Error::new(ErrorKind::Timeout, what);
        match timeout(STATEMENT, self.flush(None)).await {
            Ok(Ok(false)) => {
                let what = format!(
                    "commit cursors on node {}: an open transaction keeps one locked",
                    self.node
                );
                late = Error::new(ErrorKind::Timeout, what);
            }
            // A commit that no standby has is made again, and waits.
            Ok(Err(error)) if may_wait(&error) => {}
            Ok(outcome) => return self.waiting.answer(&outcome.map(drop)),
            Err(_) => {}
        }
        let now = Instant::now();
        let over = self.waiting.flushes.extract_if(.., |flush| flush.until <= now);
        for flush in over {
            let _ = flush.reply.send(Err(late.clone()));
        }
    }

    /// Gives partitions back that are answered, or that were waited for long enough.
    pub(super) fn give_back(&mut self, answered: Vec<Arc<Holding>>) {
        let answered: Vec<_> = answered.into_iter().filter(|holding| self.has(holding)).collect();
        for holding in answered {
            // What is acknowledged from now on would never be committed.
            holding.end(ErrorKind::LeaseLost);
            self.waiting.hand_over(holding);
        }
    }

    async fn attempt_handovers(&mut self) {
        let mut handovers = std::mem::take(&mut self.waiting.handovers);
        let all: Vec<_> = handovers.iter().map(|handover| Arc::clone(&handover.holding)).collect();
        let partitions: Vec<_> = all.iter().map(|holding| holding.partition).collect();
        let attempt = timeout(STATEMENT, self.hand_over(&all, Some(&partitions))).await;
        let outcome = attempt.unwrap_or_else(|_| Err(self.not_given_back(all.len())));
        handovers.retain(|handover| self.has(&handover.holding));
        let now = Instant::now();
        // A commit that no standby has is made again, and waits.
        let waits = outcome.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::Unknown);
        for Handover { holding, until } in handovers {
            if waits && now < until {
                self.waiting.handovers.push(Handover { holding, until });
                continue;
            }
            if holding.is_pending() {
                let error = outcome.clone().err();
                let error = error.unwrap_or_else(|| self.not_given_back(1));
                self.shared.note_uncommitted(error, &holding);
            }
            self.forget(&holding);
        }
        self.note(outcome);
    }

    fn not_given_back(&self, count: usize) -> Error {
        let what = format!(
            "give {count} partitions of node {} back: no answer, or an open transaction keeps a cursor \
             locked",
            self.node
        );
        Error::new(ErrorKind::Timeout, what)
    }

    /// Commits all of these partitions, and releases those of which nothing is left to be
    /// committed.
    async fn hand_over(
        &mut self,
        holdings: &[Arc<Holding>],
        only: Option<&[PartitionId]>,
    ) -> Result<()> {
        let all = match self.flush(only).await {
            Ok(all) => all,
            // One of them is another's already, and the others are not.
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::Reset) => false,
            Err(error) => return Err(error),
        };
        let done: Vec<_> =
            holdings.iter().filter(|holding| all || !holding.is_pending()).cloned().collect();
        self.release(&done).await?;
        for holding in &done {
            self.forget(holding);
        }
        Ok(())
    }

    /// Commits and releases all that is left, and waits for what is locked.
    pub(super) async fn hand_all_over(&mut self) -> Result<()> {
        let mut pause = AGAIN.0;
        loop {
            let left: Vec<_> = self.holdings.values().cloned().collect();
            match self.hand_over(&left, None).await {
                Ok(()) if self.holdings.is_empty() => return Ok(()),
                Err(error) if !may_wait(&error) => return Err(error),
                _ => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
            self.renew_if_due().await;
        }
    }

    /// Whether this is the partition's present acquisition.
    fn has(&self, holding: &Arc<Holding>) -> bool {
        let current = self.holdings.get(&holding.partition);
        current.is_some_and(|current| Arc::ptr_eq(current, holding))
    }
}
