//! Messages that the stream has handed out and that failed: held until they come again.
//!
//! ```text
//! failed ─> rests ─ its time ─> due ─> handed out again, before what was held back for it
//!    │        │
//!    │        └─ by partition: it waits; by key: what has its key is kept aside
//!    └─> put aside, where it needs no place of its own, or is given up
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use uuid::Uuid;

use crate::consumer::aside::Plan;
use crate::consumer::delivery::{Delivery, Origin};
use crate::consumer::holding::{FAILED, Hand, Holding};
use crate::consumer::keys::{Freed, Keys};
use crate::consumer::lanes::Unread;
use crate::consumer::pinned::Pinned;
use crate::consumer::{Event, Order, Shared, Verdict};
use crate::error::Error;
use crate::id::{NodeId, PartitionId};
use crate::supervise::supervised;

/// What waits for a message that failed.
#[derive(Debug, Clone)]
enum Hold {
    Nothing,
    Partition,
    Key(Uuid, Arc<str>),
}

/// A message that failed.
#[derive(Debug)]
pub(crate) struct Resting {
    /// None: it needs no holding back any more.
    delivery: Option<Delivery>,
    hold: Hold,
    origin: Arc<Origin>,
}

impl Resting {
    /// The acquisition of which others wait for it.
    pub(super) fn holds(&self) -> Option<(PartitionId, Uuid)> {
        let Origin { holding, .. } = &*self.origin;
        (!matches!(self.hold, Hold::Nothing)).then(|| (holding.partition, holding.owner()))
    }

    /// Nobody waits for it any more.
    pub(super) fn let_go(&self) {
        self.origin.holding.pass_failed();
    }

    /// To say that it has failed.
    fn clone_empty(&self) -> Self {
        Self { delivery: None, hold: self.hold.clone(), origin: Arc::clone(&self.origin) }
    }
}

/// Those of a stream.
pub(super) struct Failed {
    order: Order,
    count: usize,
    /// Those whose time has come.
    due: VecDeque<Resting>,
    /// How many are of each key.
    held: HashMap<(Uuid, Arc<str>), usize>,
    keys: Keys,
    /// Acquisitions of which something was held back since there was none.
    held_back: HashSet<(PartitionId, Uuid)>,
    /// Acquisitions that can't go on since too much is kept.
    blocked: HashSet<Uuid>,
    /// What these keep in memory.
    pinned: Pinned,
    most_bytes: usize,
}

impl Failed {
    pub(super) fn new(order: Order, most_bytes: usize) -> Self {
        Self {
            order,
            count: 0,
            due: VecDeque::new(),
            held: HashMap::new(),
            keys: Keys::new(most_bytes),
            held_back: HashSet::new(),
            blocked: HashSet::new(),
            pinned: Pinned::default(),
            most_bytes,
        }
    }

    /// Whether there is none, and nothing waits for one.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0 && self.keys.is_empty()
    }

    /// Whether nothing new of a node may be handed out: what failed of it keeps as much in memory as may be
    /// fetched. By partition it is what was handed out of each, and those that do not fail must go on.
    pub(super) fn is_full(&self, node: NodeId) -> bool {
        self.order != Order::ByPartition && self.pinned.bytes_of(node) >= self.most_bytes
    }

    /// This acquisition can't go on for now.
    pub(super) fn block(&mut self, owner: Uuid) {
        self.blocked.insert(owner);
    }

    /// A message failed: what must wait for it does from now on.
    pub(super) fn hold(&mut self, failed: &Resting) {
        if self.is_empty() {
            self.held_back.clear();
        }
        self.count += 1;
        if !matches!(failed.hold, Hold::Nothing) {
            let Origin { holding, .. } = &*failed.origin;
            self.held_back.insert((holding.partition, holding.owner()));
        }
        self.pinned.pin(&failed.origin);
        match &failed.hold {
            // It is held until this one is handed out again.
            Hold::Partition => return,
            Hold::Nothing => {}
            Hold::Key(owner, key) => {
                let held = self.held.entry((*owner, Arc::clone(key))).or_default();
                *held += 1;
                if *held == 1 {
                    self.keys.hold(*owner, key);
                }
            }
        }
        failed.origin.holding.pass_failed();
    }

    /// The time of one has come, or it is put aside.
    pub(super) fn absorb(&mut self, resting: Resting) {
        if resting.delivery.is_none() {
            self.release(&resting);
        } else {
            self.due.push_back(resting);
        }
    }

    /// The next that is due, or that waited for its key.
    pub(super) fn next(&mut self) -> Option<Delivery> {
        let mut waiting = VecDeque::new();
        let mut next = None;
        while next.is_none()
            && let Some(mut resting) = self.due.pop_front()
        {
            match resting.origin.holding.hand_out_again() {
                Hand::Wait => waiting.push_back(resting),
                hand => {
                    next = resting.delivery.take().filter(|_| hand == Hand::Out);
                    next.iter_mut().for_each(Delivery::take_up);
                    self.release(&resting);
                }
            }
        }
        waiting.append(&mut self.due);
        self.due = waiting;
        next.or_else(|| self.next_of_key())
    }

    fn next_of_key(&mut self) -> Option<Delivery> {
        while let Some(Freed { owner, key, mut deliveries }) = self.keys.next(1) {
            let Some(delivery) = deliveries.pop() else { continue };
            // The stream hands out ahead: the next of its key need not wait for it.
            self.keys.end(owner, &key);
            return Some(delivery);
        }
        None
    }

    /// Keeps the next message of a batch aside, if its key waits for one that failed. `None`: it need not
    /// wait; false: too much is kept already of its node.
    pub(super) fn keep(&mut self, batch: &mut Unread) -> Option<bool> {
        if self.is_full(batch.origin.holding.partition.node()) {
            return Some(false);
        }
        if self.order != Order::ByKey {
            return None;
        }
        let id = batch.peek()?;
        let key = batch.key(id)?;
        if !self.keys.is_busy(batch.owner(), &key) {
            return None;
        }
        let kept = self.keys.keep(batch, id, &key);
        if kept {
            batch.skip();
        }
        Some(kept)
    }

    /// Lanes that could not go on since too much was kept, and may try again.
    pub(super) fn unblocked(&mut self) -> Vec<Uuid> {
        self.blocked.drain().collect()
    }

    /// Whether messages of an acquisition may be handed out has changed.
    pub(super) fn turn(&mut self, owner: Uuid) {
        self.keys.turn(owner);
    }

    /// Of which acquisitions something may be held back.
    pub(super) fn held_back(&self) -> impl Iterator<Item = (PartitionId, Uuid)> {
        self.held_back.iter().copied().filter(|_| !self.is_empty())
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.order, self.most_bytes);
    }

    fn release(&mut self, resting: &Resting) {
        self.count = self.count.saturating_sub(1);
        self.pinned.unpin(&resting.origin);
        match &resting.hold {
            Hold::Nothing => {}
            Hold::Partition => resting.origin.holding.pass_failed(),
            Hold::Key(owner, key) => {
                let place = (*owner, Arc::clone(key));
                let Some(held) = self.held.get_mut(&place) else { return };
                *held -= 1;
                if *held == 0 {
                    self.held.remove(&place);
                    self.keys.end(*owner, key);
                }
            }
        }
    }
}

impl Holding {
    /// Messages that fail come again in this order, and are told here.
    pub(super) fn in_order(
        mut self,
        order: Order,
        failures: Option<mpsc::WeakUnboundedSender<(Delivery, Verdict)>>,
        wake_parked: Arc<Notify>,
    ) -> Self {
        (self.order, self.failures, self.wake_parked) = (order, failures, wake_parked);
        self
    }

    /// A message that was handed out has failed: in an order, nothing is handed out until the stream knows
    /// what must wait for it.
    pub(super) fn fail(&self, delivery: Delivery, verdict: Verdict) {
        if self.order != Order::Unordered {
            self.gate.fetch_add(FAILED, Ordering::SeqCst);
        }
        if let Some(failures) = self.failures.as_ref().and_then(mpsc::WeakUnboundedSender::upgrade)
        {
            let _ = failures.send((delivery, verdict));
        }
    }

    /// It is known, or handed out again: others may go on.
    pub(super) fn pass_failed(&self) {
        if self.order != Order::Unordered {
            self.gate.fetch_sub(FAILED, Ordering::SeqCst);
            self.tell_stream();
            self.wake_what_is_parked();
        }
    }
}

impl Shared {
    /// Sees to what the stream's deliveries were not handled, whether anybody reads the stream or not.
    pub(super) async fn keep_watching_failures(
        self: Arc<Self>,
        failures: mpsc::UnboundedReceiver<(Delivery, Verdict)>,
    ) {
        let failures = tokio::sync::Mutex::new(failures);
        let watch = || async {
            let mut failures = failures.lock().await;
            self.watch_failures(&mut failures).await;
        };
        // The message that it had in hand is nobody's.
        let failed = |_: &Error| self.read_anew(None);
        supervised("watch over failures", self.stopping.clone(), watch, failed).await;
    }

    async fn watch_failures(
        self: &Arc<Self>,
        failures: &mut mpsc::UnboundedReceiver<(Delivery, Verdict)>,
    ) {
        while let Some((mut delivery, verdict)) = failures.recv().await {
            let origin = Arc::clone(delivery.origin());
            let hold = match (self.options.order, delivery.key()) {
                _ if delivery.is_parked() => Hold::Nothing,
                (Order::ByPartition, _) => Hold::Partition,
                (Order::ByKey, Some(key)) => Hold::Key(origin.holding.owner(), Arc::from(key)),
                _ => Hold::Nothing,
            };
            let resting = Resting { delivery: None, hold, origin };
            self.send(Event::Failed(resting.clone_empty()));
            let plan = self.plan(&mut delivery, &verdict);
            self.rest(delivery, resting, &plan);
        }
    }

    /// Tells the stream when a message that failed is to come again, or needs no holding back.
    fn rest(self: &Arc<Self>, mut delivery: Delivery, mut resting: Resting, plan: &Plan) {
        let (revoked, stopping) = (delivery.revoked(), self.stopping.clone());
        let shared = Arc::clone(self);
        match *plan {
            Plan::InPlace(delay) => {
                delivery.lay_down();
                self.cluster.inner.tasks.spawn(async move {
                    tokio::select! {
                        () = sleep(delay) => {}
                        () = revoked.cancelled() => {}
                        () = stopping.cancelled() => return,
                    }
                    resting.delivery = Some(delivery);
                    shared.send(Event::Due(resting));
                });
            }
            Plan::Aside(after) => {
                let aside = self.put_aside(delivery, after);
                self.cluster.inner.tasks.spawn(async move {
                    // Either way nobody waits for it here any more.
                    let _ = aside.await;
                    shared.send(Event::Due(resting));
                });
            }
        }
    }
}
