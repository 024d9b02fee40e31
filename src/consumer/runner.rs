//! Hands messages to a handler, as many at a time as order allows, and repeats what it failed at.
//!
//! ```text
//!            ┌──────────────── done: acknowledged ──────────────┐
//!            v                                                  │
//! lanes ─> unit ─> handler ── failed ─> waits, longer each time ─> handler ..
//!   │                                   (its partition or key waits too)
//!   └─ its key is in hand: kept until that is done
//! ```
//!
//! A unit is one message, or a batch. Whoever waits to be repeated takes no place among those that are
//! worked on at a time: a message that always fails stops its own partition or key, and nothing else.

use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::{Id, JoinError, JoinSet};
use uuid::Uuid;

use crate::consumer::aside::Plan;
use crate::consumer::delivery::{Delivery, Origin};
use crate::consumer::holding::Hand;
use crate::consumer::keys::{Freed, Keys};
use crate::consumer::lanes::Unread;
use crate::consumer::member::Command;
use crate::consumer::messages::Messages;
use crate::consumer::pinned::Pinned;
use crate::consumer::{Event, Order, Shared, Verdict};
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;

/// Events that are taken in before units are started.
const TURN: usize = 256;

type Failed = Box<dyn StdError + Send + Sync>;

impl Messages {
    /// Calls a handler with each message, so many at a time (at least 1), and acknowledges those for
    /// which it returns `Ok`. Each call is a task of its own. The [order](crate::ConsumerBuilder::order)
    /// says what is never in hand at the same time: two messages of a partition, or of a key, or nothing.
    ///
    /// Where it returns an error, or panics, the message is handed to it again when the
    /// [policy](crate::ConsumerBuilder::retry_policy) says; after the last attempt it goes to the
    /// [dead letters](crate::Cluster::dead_letters). Ordered, its partition or key waits for that, others go
    /// on; but by key nothing new of a node is begun while the rows of what failed of it take as many bytes as may
    /// be [fetched ahead](crate::ConsumerBuilder::prefetch_bytes). Unordered, and without a key, it is parked on
    /// its node, and nothing waits while that is reached. [`Delivery::attempt`] counts. What a handler says itself
    /// ([`retry`](Delivery::retry), [`retry_after`](Delivery::retry_after), [`reject`](Delivery::reject),
    /// [`ack`](Delivery::ack)) goes before what it returns.
    ///
    /// Returns after a [`shutdown`](crate::ConsumerHandle::shutdown), which lets calls that are under way
    /// end, until its deadline; then they are aborted. To drop it aborts them at once; nothing else is
    /// lost, and what was not acknowledged is delivered again.
    ///
    /// ```no_run
    /// # async fn example(cluster: shardmq::Cluster) -> shardmq::Result<()> {
    /// use shardmq::{Delivery, Order};
    ///
    /// let messages = cluster.consumer("orders", "billing").order(Order::ByKey).stream().await?;
    /// let handle = messages.handle();
    /// tokio::spawn(async move {
    ///     tokio::signal::ctrl_c().await.ok();
    ///     handle.shutdown(std::time::Duration::from_secs(30)).await
    /// });
    /// messages.run(16, async |order: Delivery| bill(order.payload()).await).await;
    /// # Ok(())
    /// # }
    /// # async fn bill(_: &[u8]) -> Result<(), String> { Ok(()) }
    /// ```
    pub async fn run<H, F, E>(self, concurrency: usize, handler: H)
    where
        H: Fn(Delivery) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let one = move |mut unit: Vec<Delivery>| {
            let (handler, delivery) = (Arc::clone(&handler), unit.pop());
            async move {
                match delivery {
                    Some(delivery) => handler(delivery).await,
                    None => Ok(()),
                }
            }
        };
        self.run_batches(concurrency, 1, one).await;
    }

    /// The same with batches of up to so many messages, at least one, all of one partition and in its
    /// order. A batch is what is there, nothing waits for more. By key it has each key once, or many
    /// messages of one key. After an error those come again that the handler did not acknowledge itself.
    pub async fn run_batches<H, F, E>(self, concurrency: usize, most: usize, handler: H)
    where
        H: Fn(Vec<Delivery>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let mut messages = self;
        messages.put_back();
        let options = &messages.handle.shared.options;
        let runner = Runner {
            order: options.order,
            keys: Keys::new(options.prefetch_bytes),
            messages,
            handler: move |unit: Vec<Delivery>| {
                let handler = Arc::clone(&handler);
                async move { handler(unit).await.map_err(Into::into) }
            },
            concurrency: concurrency.max(1),
            most: most.max(1),
            working: JoinSet::new(),
            units: HashMap::new(),
            resting: JoinSet::new(),
            again: VecDeque::new(),
            failed: Pinned::default(),
            blocked: HashSet::new(),
        };
        // Boxed: whoever runs it carries it.
        Box::pin(runner.run()).await;
    }
}

/// Messages that are handled together.
struct Unit {
    owner: Uuid,
    deliveries: Vec<Delivery>,
    /// The keys that nobody else may have in hand.
    keys: Vec<Arc<str>>,
    /// Whether its partition waits for it.
    alone: bool,
    /// What it keeps in memory while it waits.
    pinned: Vec<Arc<Origin>>,
}

struct Runner<H> {
    messages: Messages,
    handler: H,
    order: Order,
    concurrency: usize,
    most: usize,
    working: JoinSet<Result<(), Failed>>,
    units: HashMap<Id, Unit>,
    /// Those that failed, until they are tried again, or until their partition is lost.
    resting: JoinSet<(Unit, bool)>,
    again: VecDeque<Unit>,
    /// What these keep in memory.
    failed: Pinned,
    keys: Keys,
    /// Acquisitions that can't go on since too much is kept.
    blocked: HashSet<Uuid>,
}

impl<H, F> Runner<H>
where
    H: Fn(Vec<Delivery>) -> F,
    F: Future<Output = Result<(), Failed>> + Send + 'static,
{
    async fn run(mut self) {
        self.read_anew(self.messages.failed.held_back().collect::<Vec<_>>());
        self.messages.failed.clear();
        loop {
            self.start_units();
            tokio::select! {
                event = self.messages.events.recv() => match event {
                    Some(event) => self.take_in(event),
                    None => break,
                },
                Some(done) = self.working.join_next_with_id() => self.finish(done),
                Some(Ok((mut unit, is_lost))) = self.resting.join_next() => {
                    if is_lost {
                        unit.deliveries.clear();
                    }
                    if unit.deliveries.is_empty() {
                        self.unpin(&mut unit);
                        self.free(unit);
                    } else {
                        self.again.push_back(unit);
                    }
                }
            }
        }
        if let Some(error) = self.messages.end() {
            let Shared { topology, group, .. } = &*self.messages.handle.shared;
            tracing::error!(
                topic = %topology.topic, %group, error = %error.chain(), "consuming has ended"
            );
        }
        // The shutdown has waited for them up to its deadline.
        self.working.shutdown().await;
    }

    /// An event, and what came with it.
    fn take_in(&mut self, event: Event) {
        self.absorb(event);
        for _ in 1..TURN {
            let Ok(event) = self.messages.events.try_recv() else { return };
            self.absorb(event);
        }
    }

    fn absorb(&mut self, event: Event) {
        match event {
            Event::Error(news) => tracing::warn!(news = %news.chain(), "consuming goes on"),
            Event::Turn(owner) => {
                self.keys.turn(owner);
                self.messages.absorb(Event::Turn(owner));
            }
            // Of what the stream has handed out before, in whatever hands. In an order the partition is read
            // anew: what must wait for it is begun by this runner then, and waits.
            Event::Failed(failed) => {
                self.read_anew(failed.holds());
                failed.let_go();
            }
            Event::Due(_) => {}
            event => self.messages.absorb(event),
        }
    }

    fn read_anew(&self, acquisitions: impl IntoIterator<Item = (PartitionId, Uuid)>) {
        for (partition, owner) in acquisitions {
            let anew = Command::Anew { partition, owner };
            self.messages.handle.shared.tell(partition.node(), anew);
        }
    }

    fn start_units(&mut self) {
        if self.messages.handle.is_shutting_down() {
            self.messages.lanes.clear();
            self.keys.clear();
            self.again.clear();
            return;
        }
        while self.working.len() < self.concurrency
            && let Some(unit) = self.next_unit()
        {
            ::metrics::counter!(names::DELIVERED).increment(unit.deliveries.len() as u64);
            let mut unit = unit;
            let twins = unit.deliveries.iter_mut().map(Delivery::twin).collect();
            let task = self.working.spawn((self.handler)(twins));
            self.units.insert(task.id(), unit);
        }
    }

    /// What is to be worked on next: what failed before, what waited for its key, what was fetched.
    fn next_unit(&mut self) -> Option<Unit> {
        if let Some(unit) = self.next_again() {
            return Some(unit);
        }
        while let Some(Freed { owner, key, deliveries }) = self.keys.next(self.most) {
            if !deliveries.is_empty() {
                return Some(Unit {
                    owner,
                    deliveries,
                    keys: vec![key],
                    alone: false,
                    pinned: vec![],
                });
            }
        }
        while let Some(mut batch) = self.messages.lanes.next() {
            let owner = batch.owner();
            if self.is_full_of_failed(batch.origin.holding.partition.node()) {
                self.messages.lanes.keep_busy(batch);
                self.blocked.insert(owner);
                continue;
            }
            let alone = self.order == Order::ByPartition;
            let mut unit =
                Unit { owner, deliveries: Vec::new(), keys: vec![], alone, pinned: vec![] };
            let end = self.fill(&mut unit, &mut batch);
            self.put_away(batch, end, unit.deliveries.is_empty());
            if !unit.deliveries.is_empty() {
                return Some(unit);
            }
        }
        None
    }

    /// A unit that failed before. It waits like what was not handed out yet where the lease has run out:
    /// another may work on it by then. Where the partition was lost while it waited, another does.
    fn next_again(&mut self) -> Option<Unit> {
        let is_lost = |unit: &Unit| unit.deliveries.first().is_some_and(Delivery::is_revoked);
        while let Some(lost) = self.again.iter().position(is_lost) {
            let Some(mut unit) = self.again.remove(lost) else { break };
            unit.deliveries.clear();
            self.unpin(&mut unit);
            self.free(unit);
        }
        let is_due = |unit: &Unit| unit.deliveries.first().is_none_or(|first| !first.is_lapsed());
        let next = self.again.iter().position(is_due)?;
        let mut unit = self.again.remove(next)?;
        self.unpin(&mut unit);
        Some(unit)
    }

    /// Takes messages of a batch; says why it stopped.
    fn fill(&mut self, unit: &mut Unit, batch: &mut Unread) -> End {
        while unit.deliveries.len() < self.most {
            let Some(id) = batch.peek() else { return End::Finished };
            let key = (self.order == Order::ByKey).then(|| batch.key(id)).flatten();
            if let Some(key) = &key
                && self.keys.is_busy(unit.owner, key)
            {
                if !self.keys.keep(batch, id, key) {
                    return End::Blocked;
                }
                batch.skip();
                continue;
            }
            match batch.hand_out() {
                Some(Ok(delivery)) => unit.deliveries.push(delivery),
                Some(Err(Hand::Wait)) => return End::Wait,
                Some(Err(_)) => return End::Left,
                None => return End::Finished,
            }
            if let Some(key) = key {
                unit.keys.push(self.keys.begin(unit.owner, key));
            }
        }
        End::Left
    }

    fn put_away(&mut self, batch: Unread, end: End, nothing: bool) {
        let (lanes, owner) = (&mut self.messages.lanes, batch.owner());
        let alone = self.order == Order::ByPartition && !nothing;
        match end {
            End::Finished if alone => lanes.finish_busy(batch),
            End::Finished => lanes.finish(batch),
            _ if alone => lanes.keep_busy(batch),
            End::Wait => lanes.park(batch),
            End::Left => lanes.give_back(batch),
            End::Blocked => {
                lanes.keep_busy(batch);
                self.blocked.insert(owner);
            }
        }
    }

    fn finish(&mut self, done: Result<(Id, Result<(), Failed>), JoinError>) {
        let policy = &self.messages.handle.shared.options.retry_policy;
        let (id, failed) = match done {
            Ok((id, Ok(()))) => (id, None),
            Ok((id, Err(error))) => {
                let dead = policy.is_final(error.as_ref());
                let error = crate::error::chain(error.as_ref());
                (id, Some(Verdict { dead, ..Verdict::failed(error) }))
            }
            Err(error) => (error.id(), Some(Verdict::failed("the handler panicked"))),
        };
        let Some(mut unit) = self.units.remove(&id) else { return };
        let mut left = Vec::new();
        for delivery in std::mem::take(&mut unit.deliveries) {
            let verdict = delivery.verdict().or_else(|| failed.clone());
            match verdict.filter(|_| !delivery.is_acked()) {
                Some(verdict) => left.push((delivery, verdict)),
                // Done, or acknowledged by the handler itself.
                None => unit.deliveries.push(delivery),
            }
        }
        // Refused where the partition is another's by now; the news say so.
        unit.deliveries.drain(..).for_each(|delivery| _ = delivery.ack());
        let lost = left.first().is_none_or(|(first, _)| first.revoked().is_cancelled());
        if lost { self.free(unit) } else { self.rest(unit, left) }
    }

    /// Puts aside what is not to be tried again in its place, and tries the rest again after a while; unless
    /// its partition is lost meanwhile.
    fn rest(&mut self, mut unit: Unit, failed: Vec<(Delivery, Verdict)>) {
        let shared = Arc::clone(&self.messages.handle.shared);
        let (mut asides, mut pause) = (Vec::new(), Duration::ZERO);
        for (mut delivery, verdict) in failed {
            let (id, attempt) = (delivery.id(), delivery.attempt());
            if !verdict.given_back {
                ::metrics::counter!(names::HANDLER_FAILED).increment(1);
                tracing::warn!(message = %id, attempt, error = verdict.error, "handler failed");
            }
            self.failed.pin(delivery.origin());
            unit.pinned.push(Arc::clone(delivery.origin()));
            match shared.plan(&mut delivery, &verdict) {
                Plan::Aside(after) => asides.push(shared.put_aside(delivery, after)),
                Plan::InPlace(delay) => {
                    pause = pause.max(delay);
                    unit.deliveries.push(delivery);
                }
            }
        }
        let revoked = unit.deliveries.first().map(Delivery::revoked);
        let stopping = shared.stopping.clone();
        self.resting.spawn(async move {
            // What is another's by now is delivered there.
            join_all(asides).await;
            let Some(revoked) = revoked else { return (unit, false) };
            let is_lost = tokio::select! {
                () = tokio::time::sleep(pause) => false,
                () = revoked.cancelled() => true,
                () = stopping.cancelled() => true,
            };
            (unit, is_lost)
        });
    }

    fn unpin(&mut self, unit: &mut Unit) {
        unit.pinned.drain(..).for_each(|origin| self.failed.unpin(&origin));
    }

    /// Whether nothing new of a node may be begun: what failed of it keeps as much in memory as may be
    /// fetched. By partition it is one unit of each, and those that do not fail must go on.
    fn is_full_of_failed(&self, node: NodeId) -> bool {
        let most = self.messages.handle.shared.options.prefetch_bytes;
        self.order != Order::ByPartition && self.failed.bytes_of(node) >= most
    }

    /// A unit is done, and what waited for it may go on.
    fn free(&mut self, unit: Unit) {
        let Unit { owner, keys, alone, .. } = unit;
        for key in keys {
            self.keys.end(owner, &key);
        }
        if alone {
            self.messages.lanes.free(owner);
        }
        for owner in self.blocked.drain() {
            self.messages.lanes.free(owner);
        }
    }
}

/// Why no more was taken of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// There is no more.
    Finished,
    /// It is enough.
    Left,
    /// Its partition waits.
    Wait,
    /// Its next message would have to be kept, and too much is kept already.
    Blocked,
}
