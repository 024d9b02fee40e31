//! Parked messages that are in hand, and reading those that are due.
//!
//! ```text
//! put aside ─> retry table ── due ─> claimed ─> its partition's lane ─> handed out
//!                  ^  ^                │                                  │
//!                  │  └──── dropped ───┘         done: deleted with the next commit of cursors
//!                  └─────────────── failed again: due later, or a dead letter
//! ```
//!
//! They count for what may be fetched ahead, like all that is read.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::consumer::holding::Holding;
use crate::consumer::member::Member;
use crate::consumer::{Event, Shared, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::failure::Past;
use crate::id::NodeId;
use crate::store::connect::refused;
use crate::store::failures::{self, Due, Under};

/// How many parked messages of a partition may be in hand.
const MOST: usize = 1_000;
/// The most messages of one fetch.
const FETCH: i32 = 256;
/// How long one fetch may take: the largest message over a slow line.
const FETCH_TIME: Duration = Duration::from_mins(1);
/// How soon more is fetched where there was more than one fetch brings.
const MORE: f64 = 0.005;
/// How often everything is looked at that is due, and not only what was not due the last time: a transaction
/// that parks something may commit long after it was due.
const FULL_LOOK: Duration = Duration::from_mins(1);

/// Parked messages of one holding, and what its node keeps instead of it.
#[derive(Debug, Default)]
pub(super) struct InHand {
    ids: HashSet<Uuid>,
    /// Done, to be deleted.
    done: HashSet<Uuid>,
    /// The last fetch left its partition out.
    left_out: bool,
    entrusted: Entrusted,
}

/// What this holding has acknowledged only since its node has it in a row of its own: a copy that was put
/// aside, or what a user's transaction did.
#[derive(Debug, Default)]
struct Entrusted {
    any: bool,
    /// Above the watermark that was committed last.
    ids: BTreeSet<i64>,
    committed: i64,
}

/// A parked message in hand: dropped, it may be fetched again.
#[derive(Debug)]
pub(super) struct Claim {
    holding: Arc<Holding>,
    pub(super) id: Uuid,
    done: AtomicBool,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut parked = self.holding.parked();
        parked.ids.remove(&self.id);
        let has_room = parked.left_out && parked.ids.len() <= MOST / 2;
        parked.left_out &= !has_room;
        drop(parked);
        // If it is not done it may be due.
        if has_room || !self.is_done() {
            self.holding.wake_parked.notify_one();
        }
    }
}

impl Claim {
    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Its row has gone.
    pub(super) fn is_settled(&self) {
        self.done.store(true, Ordering::Release);
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
        free.then(|| Claim { holding: Arc::clone(self), id, done: AtomicBool::new(false) })
    }

    /// Whether parked messages are to be fetched. If not, its member is woken when they are.
    fn has_room(&self) -> bool {
        let mut parked = self.parked();
        // In this order: whoever opens it looks at this afterwards.
        parked.left_out = true;
        let is_full = parked.ids.len() >= MOST;
        parked.left_out = is_full || !self.may_go() || self.is_crowded_out();
        !parked.left_out
    }

    /// It may be handed out again.
    pub(super) fn wake_what_is_parked(&self) {
        if std::mem::take(&mut self.parked().left_out) {
            self.wake_parked.notify_one();
        }
    }

    /// What statements about its messages must name.
    pub(super) fn under(&self) -> Under {
        Under { partition: self.partition, fence: self.fence, incarnation: self.incarnation() }
    }

    /// Something parked is done: it is deleted with the next commit.
    pub(super) fn end_parked(&self, claim: &Claim) -> Result<()> {
        // Under this lock, as any acknowledgement: what is accepted here is seen by the flush that follows an
        // end.
        let tracker = self.tracker();
        self.accepts()?;
        if !claim.done.swap(true, Ordering::AcqRel) {
            self.parked().done.insert(claim.id);
        }
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

    /// The node has a row instead of this message.
    pub(super) fn entrust(&self, id: i64) {
        let mut parked = self.parked();
        parked.entrusted.any = true;
        parked.entrusted.ids.insert(id);
    }

    /// The watermark was committed: what is below was committed before.
    pub(super) fn committed(&self, acked_id: i64) {
        let entrusted = &mut self.parked().entrusted;
        if entrusted.any {
            entrusted.committed = entrusted.committed.max(acked_id);
            entrusted.ids = entrusted.ids.split_off(&(acked_id + 1));
        }
    }

    /// Whether the node must have rows of this holding.
    pub(super) fn has_entrusted(&self) -> bool {
        self.parked().entrusted.any
    }

    /// Whether a server that says that this is acknowledged has all of them.
    pub(super) fn is_kept_by(&self, acked_id: i64, ahead: &[(i64, i64)]) -> bool {
        let entrusted = &self.parked().entrusted;
        let is_there = |id: &i64| {
            *id <= acked_id || ahead.iter().any(|(first, last)| first <= id && id <= last)
        };
        acked_id >= entrusted.committed && entrusted.ids.iter().all(is_there)
    }
}

/// What a member knows of what is parked on its node. Pure.
///
/// Whatever is asked for while a fetch is under way is for the next one: that one may not have seen it.
#[derive(Debug)]
pub(super) struct Expected {
    /// When something is due.
    at: Option<Instant>,
    /// What was due before is known, by the node's clock.
    since: Option<SystemTime>,
    /// Everything is to be looked at, whenever it was due.
    all: bool,
    looked_at_all: Instant,
}

impl Default for Expected {
    fn default() -> Self {
        Self { at: None, since: None, all: true, looked_at_all: Instant::now() }
    }
}

impl Expected {
    /// When a fetch is due.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// From when on a look is worth its while: from the beginning where there is no time.
    pub(super) fn since(&self) -> Option<SystemTime> {
        self.since.filter(|_| !self.all)
    }

    /// Something is due in so many seconds.
    pub(super) fn expect(&mut self, secs: Option<f64>) {
        let Some(secs) = secs else { return };
        let wait = Duration::try_from_secs_f64(secs.clamp(0.0, 1e9)).unwrap_or_default();
        self.expect_at(Instant::now() + wait);
    }

    fn expect_at(&mut self, at: Instant) {
        self.at = Some(self.at.map_or(at, |before| before.min(at)));
    }

    /// All that is due is to be looked at, whenever it was.
    pub(super) fn look_at_all(&mut self) {
        self.all = true;
        self.expect(Some(0.0));
    }

    /// A fetch begins; returns from when on it looks.
    fn begin(&mut self) -> Option<SystemTime> {
        self.at = None;
        self.all |= self.looked_at_all.elapsed() >= FULL_LOOK;
        let since = self.since();
        if since.is_none() {
            self.looked_at_all = Instant::now();
        }
        self.all = false;
        since
    }

    /// It has ended; none where it failed.
    fn end(&mut self, fetched: Option<&Fetched>) {
        let was_all = fetched.is_none_or(|fetched| fetched.since.is_none());
        match fetched {
            Some(fetched) if fetched.complete => self.since = fetched.complete_to,
            // What it has left out may have been due long ago.
            _ => self.all |= was_all,
        }
        // Whether anything else is expected or not.
        self.expect_at(self.looked_at_all + FULL_LOOK);
        match fetched {
            Some(fetched) => {
                self.expect(fetched.next_secs);
                self.expect(fetched.more.then_some(MORE));
            }
            None => self.expect(Some(1.0)),
        }
    }
}

/// How a fetch went.
#[derive(Debug)]
pub(super) struct Fetched {
    next_secs: Option<f64>,
    /// From when on it has looked.
    since: Option<SystemTime>,
    /// By the node's clock: what was due before is known, if it is complete.
    complete_to: Option<SystemTime>,
    /// Nothing was left out.
    complete: bool,
    more: bool,
}

impl Shared {
    /// Wakes a node's member where something parked may be due again.
    pub(super) fn parked_waker(&self, node: NodeId) -> Arc<Notify> {
        Arc::clone(lock(&self.parked_wakers).entry(node).or_default())
    }

    /// Fetches what is due in these partitions of a node.
    async fn fetch_parked(
        self: Arc<Self>,
        node: NodeId,
        held: Vec<Arc<Holding>>,
        since: Option<SystemTime>,
    ) -> Result<Fetched> {
        let mut room = self.budget.reserve().await;
        let (mut partitions, mut in_hand) = (Vec::new(), Vec::new());
        for holding in held.iter().filter(|holding| holding.has_room()) {
            let parked = holding.parked();
            partitions.push(holding.partition.as_i32());
            in_hand.extend(parked.ids.union(&parked.done));
        }
        let all = partitions.len() == held.len();
        let bounds = (FETCH, i64::try_from(room.size()).unwrap_or(i64::MAX));
        let asking = async {
            let connection = self.connection(node).await?;
            let due =
                failures::parked(&connection, &self.group, &partitions, &in_hand, bounds, since);
            let what = || format!("read parked messages on node {node}");
            due.await.map_err(|error| refused(error, &what()))
        };
        let late = || Error::new(ErrorKind::Unavailable, format!("node {node}: no answer in time"));
        let mut due: Due = timeout(FETCH_TIME, asking).await.map_err(|_| late())??;
        let more = !due.parked.is_empty();
        for parked in std::mem::take(&mut due.parked) {
            let holding = held.iter().find(|holding| holding.partition == parked.partition);
            let Some(claim) = holding.and_then(|holding| holding.claim(parked.id)) else {
                continue;
            };
            let failures::Parked { row, attempts, first_seen, failures, .. } = parked;
            let room = room.split(self.weight(&row));
            let past = Arc::new(Past { attempts, first_seen, failures });
            let holding = Arc::clone(&claim.holding);
            let (row, again) = (Arc::new(row), Again { claim, past });
            self.send(Event::Parked { holding, row, again, room });
        }
        let Due { next_secs, complete_to, .. } = due;
        Ok(Fetched { next_secs, since, complete_to, complete: all && !more, more })
    }
}

impl Member {
    /// Begins to fetch what is due, beside all else: a large message over a slow line takes long.
    pub(super) fn begin_to_fetch(&mut self) {
        let since = self.parked.begin();
        let held = self.holdings.values().filter(|holding| holding.is_held());
        let (shared, held) = (Arc::clone(&self.shared), held.cloned().collect());
        self.fetching.spawn(shared.fetch_parked(self.node, held, since));
    }

    pub(super) fn fetched(&mut self, fetched: &Result<Fetched>) {
        if let Err(error) = fetched {
            tracing::debug!(node = %self.node, error = %error.chain(), "parked messages later");
        }
        self.parked.end(fetched.as_ref().ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(secs)
    }

    fn fetched(since: Option<SystemTime>, complete: bool) -> Fetched {
        let complete_to = Some(at(100));
        Fetched { next_secs: None, since, complete_to, complete, more: false }
    }

    #[tokio::test]
    async fn what_is_asked_for_while_a_fetch_is_under_way_is_for_the_next_one() {
        let mut expected = Expected::default();
        let since = expected.begin();
        assert_eq!(since, None);
        // Another partition was taken, say, of which the fetch knows nothing.
        expected.look_at_all();
        expected.end(Some(&fetched(since, true)));
        assert!(expected.at().is_some());
        assert_eq!((expected.since(), expected.begin()), (None, None));
        expected.end(Some(&fetched(None, true)));
        assert_eq!((expected.since(), expected.begin()), (Some(at(100)), Some(at(100))));
    }

    #[tokio::test]
    async fn a_look_at_all_that_left_something_out_or_failed_is_made_again() {
        for ended in [Some(fetched(None, false)), None] {
            let mut expected = Expected::default();
            expected.begin();
            expected.end(Some(&fetched(None, true)));
            expected.look_at_all();
            assert_eq!(expected.begin(), None);
            expected.end(ended.as_ref());
            assert_eq!(expected.begin(), None, "{ended:?}");
        }
        // One that began later is no worse than before.
        let mut expected = Expected::default();
        expected.begin();
        expected.end(Some(&fetched(None, true)));
        let since = expected.begin();
        expected.end(Some(&fetched(since, false)));
        assert_eq!(expected.begin(), Some(at(100)));
    }

    /// A row that becomes visible after its time is between the looks: no renewal tells of it.
    #[tokio::test(start_paused = true)]
    async fn with_nothing_else_to_fetch_all_is_looked_at_each_minute() {
        let mut expected = Expected::default();
        expected.look_at_all();
        for _ in 0..3 {
            assert_eq!(expected.begin(), None);
            expected.end(Some(&fetched(None, true)));
            // Something else in between changes nothing.
            tokio::time::advance(FULL_LOOK / 2).await;
            expected.expect(Some(0.0));
            assert_eq!(expected.begin(), Some(at(100)));
            expected.end(Some(&fetched(Some(at(100)), true)));
            let next = expected.at().unwrap();
            assert_eq!(next - Instant::now(), FULL_LOOK / 2);
            tokio::time::advance(FULL_LOOK / 2).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn now_and_then_all_is_looked_at() {
        let mut expected = Expected::default();
        expected.begin();
        expected.end(Some(&fetched(None, true)));
        tokio::time::advance(FULL_LOOK + MS).await;
        assert_eq!(expected.begin(), None);
        expected.end(Some(&fetched(None, true)));
        assert_eq!(expected.begin(), Some(at(100)));
    }

    const MS: Duration = Duration::from_millis(1);
}
