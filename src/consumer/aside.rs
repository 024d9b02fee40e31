//! Puts messages aside that a handler failed at: to be tried again later, or as dead letters.
//!
//! ```text
//! failed ─> waiting ─> one statement for all of a node ─> there: acknowledged, in memory too
//!              ^                     │
//!              └── no answer, locked ┘        another's by now: delivered there
//! ```
//!
//! A copy and the acknowledgement are committed together: nothing is acknowledged that is not kept,
//! and nothing is kept twice. What waits is bounded by whoever hands it over.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::consumer::delivery::Delivery;
use crate::consumer::member::{Command, STATEMENT};
use crate::consumer::retry::Decision;
use crate::consumer::{Order, Shared, Verdict, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::failure::Past;
use crate::id::NodeId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::failures::{self, Ending, Settle, Tried};
use crate::store::group::Moved;
use crate::supervise::supervised;
use crate::trouble::Trouble;

/// The most of one statement: messages, and bytes over the first.
const MOST: (usize, usize) = (256, 4 << 20);
/// Between attempts at one.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// After how often a row was found locked it is waited for.
const PATIENCE: u32 = 5;
const REMIND: Duration = Duration::from_mins(1);

/// What waits to be put aside, by node.
#[derive(Default)]
pub(super) struct Aside(Mutex<HashMap<NodeId, Queue>>);

#[derive(Default)]
struct Queue {
    waiting: Vec<Request>,
    working: bool,
    /// Told when something more waits.
    more: Arc<Notify>,
}

struct Request {
    delivery: Delivery,
    tried: Tried,
    /// Dropped unanswered where it is another's by now.
    done: oneshot::Sender<()>,
    /// When it is tried next, how long after that, and how often a transaction had locked its row.
    next: Instant,
    backoff: Duration,
    locked: u32,
}

impl Request {
    fn again_later(mut self) -> Self {
        self.next = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        self
    }
}

/// What follows when a message failed.
pub(super) enum Plan {
    /// It comes again after this time, and what follows it in its order waits.
    InPlace(Duration),
    /// It is put aside: until after this time, or for good.
    Aside(Option<Duration>),
}

impl Shared {
    /// What becomes of a message that failed; it is told of that attempt.
    pub(super) fn plan(&self, delivery: &mut Delivery, verdict: &Verdict) -> Plan {
        if verdict.given_back {
            return Plan::InPlace(Duration::ZERO);
        }
        if verdict.dropped && !self.drop_said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                group = %self.group, message = %delivery.id(), dropped = true,
                "a delivery was dropped without an answer: it counts as failed, as all that follow"
            );
        }
        let past = Arc::new(delivery.past().failed(&verdict.error));
        let decision = match self.options.retry_policy.after(past.attempts) {
            _ if verdict.dead => Decision::Dead,
            Decision::Again(delay) => Decision::Again(verdict.after.unwrap_or(delay)),
            Decision::Dead => Decision::Dead,
        };
        delivery.set_past(past);
        let in_order = match self.options.order {
            Order::ByPartition => true,
            Order::ByKey => delivery.key().is_some(),
            Order::Unordered => false,
        };
        match decision {
            Decision::Dead => Plan::Aside(None),
            Decision::Again(delay) if in_order && !delivery.is_parked() => Plan::InPlace(delay),
            Decision::Again(delay) => Plan::Aside(Some(delay)),
        }
    }

    /// Puts a message aside that has failed. The receiver hears when it is there; it is closed
    /// where the partition is another's by now.
    pub(super) fn put_aside(
        self: &Arc<Self>,
        delivery: Delivery,
        after: Option<Duration>,
    ) -> oneshot::Receiver<()> {
        let Past { attempts, first_seen, failures } = (*delivery.past()).clone();
        let due_secs = after.map(|after| after.as_secs_f64());
        let tried = Tried { attempts, first_seen, failures, due_secs };
        let node = delivery.partition().node();
        let (done, receiver) = oneshot::channel();
        let (next, backoff) = (Instant::now(), BACKOFF.0);
        let mut queues = lock(&self.aside.0);
        let queue = queues.entry(node).or_default();
        queue.waiting.push(Request { delivery, tried, done, next, backoff, locked: 0 });
        queue.more.notify_one();
        if !std::mem::replace(&mut queue.working, true) {
            let shared = Arc::clone(self);
            self.cluster.inner.tasks.spawn(async move {
                // What it had in hand is nobody's; what waits since is worked off.
                let failed = |_: &Error| shared.read_anew(Some(node));
                let work = || Arc::clone(&shared).work_off(node);
                supervised("keeper of failed messages", shared.left.clone(), work, failed).await;
            });
        }
        receiver
    }

    /// Until nothing waits. Each has its own time: one that can't be put aside yet keeps no other
    /// waiting.
    async fn work_off(self: Arc<Self>, node: NodeId) {
        let mut left: Vec<Request> = Vec::new();
        let mut trouble = Trouble::new(REMIND);
        loop {
            let more = {
                let mut queues = lock(&self.aside.0);
                let queue = queues.entry(node).or_default();
                left.append(&mut queue.waiting);
                // What is another's by now is delivered there.
                left.retain(|request| request.delivery.holding().accepts().is_ok());
                if left.is_empty() {
                    queue.working = false;
                    return;
                }
                Arc::clone(&queue.more)
            };
            let now = Instant::now();
            let (mut due, later): (Vec<_>, Vec<_>) =
                left.into_iter().partition(|request| request.next <= now);
            left = later;
            if due.is_empty() {
                let next = left.iter().map(|request| request.next).min().unwrap_or(now);
                tokio::select! {
                    () = sleep_until(next) => {}
                    () = more.notified() => {}
                }
                continue;
            }
            left.extend(due.split_off(fitting(&due)));
            match Box::pin(self.attempt_aside(node, due, &mut left)).await {
                Ok(()) => _ = trouble.end(),
                Err(error) if trouble.meet(Instant::now()) => tracing::warn!(
                    %node, group = %self.group, error = %error.chain(),
                    "messages that failed can't be put aside yet"
                ),
                Err(_) => {}
            }
        }
    }

    /// What is to be tried again is left.
    async fn attempt_aside(
        &self,
        node: NodeId,
        due: Vec<Request>,
        left: &mut Vec<Request>,
    ) -> Result<()> {
        let (parked, fresh): (Vec<Request>, Vec<Request>) =
            due.into_iter().partition(|request| request.delivery.is_parked());
        // Some transaction always has the row: it is waited for, a while.
        let (stuck, fresh): (Vec<Request>, Vec<Request>) =
            fresh.into_iter().partition(|request| request.locked >= PATIENCE);
        // What is dropped by the time limit is the statement, and none of the requests.
        let put = self.in_time(node, &fresh, Box::pin(self.put(node, &fresh, false))).await;
        let mut outcome = self.take_note(fresh, put, left);
        // One partition at a time, so that what is new elsewhere waits for one at most.
        let first = stuck.first().map(|request| request.delivery.partition());
        let (stuck, others): (Vec<Request>, Vec<Request>) =
            stuck.into_iter().partition(|request| Some(request.delivery.partition()) == first);
        left.extend(others);
        let put = self.in_time(node, &stuck, Box::pin(self.put(node, &stuck, true))).await;
        outcome = outcome.and(self.take_note(stuck, put, left));
        let settled = self.in_time(node, &parked, Box::pin(self.settle(node, &parked))).await;
        let settled = self.take_note(parked, settled, left);
        outcome.and(settled)
    }

    /// Within a time that is enough for so many bytes on a slow line.
    async fn in_time(
        &self,
        node: NodeId,
        requests: &[Request],
        asking: impl Future<Output = Result<Vec<Moved>>>,
    ) -> Result<Vec<Moved>> {
        let bytes: usize = requests.iter().map(|request| request.delivery.payload().len()).sum();
        let limit = STATEMENT + Duration::from_secs(bytes as u64 >> 20);
        let late = || Error::new(ErrorKind::Unavailable, format!("node {node}: no answer in time"));
        timeout(limit, asking).await.unwrap_or_else(|_| Err(late()))
    }

    async fn put(&self, node: NodeId, requests: &[Request], waits: bool) -> Result<Vec<Moved>> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let messages: Vec<failures::Aside<'_>> = requests
            .iter()
            .map(|Request { delivery, tried, .. }| failures::Aside {
                under: delivery.holding().under(),
                row: &delivery.origin().row,
                index: delivery.index(),
                tried,
            })
            .collect();
        let connection = self.connection(node).await?;
        let what = format!("put messages aside on node {node}");
        let names = (&self.topology.topic, &self.group);
        let outcomes = failures::put_aside(connection, names, &messages, waits).await;
        self.failpoint("put aside").await;
        outcomes.map_err(|error| refused(error, &what))
    }

    async fn settle(&self, node: NodeId, requests: &[Request]) -> Result<Vec<Moved>> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let endings: Vec<Ending> =
            requests.iter().map(|request| Ending::Failed(request.tried.clone())).collect();
        let parked = requests.iter().zip(&endings).filter_map(|(request, ending)| {
            let id = request.delivery.origin().parked.as_ref()?.claim.id;
            Some(Settle { under: request.delivery.holding().under(), id, ending })
        });
        let parked: Vec<Settle<'_>> = parked.collect();
        let connection = self.connection(node).await?;
        let what = format!("put messages aside again on node {node}");
        let outcomes = failures::settle_parked(connection, &self.group, &parked).await;
        self.failpoint("settle parked").await;
        outcomes.map_err(|error| refused(error, &what))
    }

    /// What was put aside is done; the rest is to be tried again.
    fn take_note(
        &self,
        requests: Vec<Request>,
        outcomes: Result<Vec<Moved>>,
        left: &mut Vec<Request>,
    ) -> Result<()> {
        let outcomes = match outcomes {
            Ok(outcomes) => outcomes,
            Err(error) => {
                left.extend(requests.into_iter().map(Request::again_later));
                return Err(error);
            }
        };
        for (mut request, outcome) in requests.into_iter().zip(outcomes) {
            match outcome {
                Moved::Yes => self.is_aside(request, true),
                Moved::Already => self.is_aside(request, false),
                Moved::Locked => {
                    request.locked += 1;
                    left.push(request.again_later());
                }
                Moved::OtherServer => {
                    request.delivery.holding().compare();
                    left.push(request.again_later());
                }
                // Whoever has it delivers it.
                Moved::LeaseLost | Moved::Reset => {
                    self.tell(request.delivery.partition().node(), Command::Renew);
                }
            }
        }
        Ok(())
    }

    /// It is there: now, or since an earlier attempt.
    fn is_aside(&self, request: Request, is_new: bool) {
        let Request { mut delivery, tried, done, .. } = request;
        delivery.put_aside(tried.due_secs.is_some());
        if let Some(secs) = tried.due_secs {
            ::metrics::counter!(names::PARKED).increment(is_new.into());
            self.tell(delivery.partition().node(), Command::Parked { secs });
        } else if is_new {
            ::metrics::counter!(names::DEAD_LETTERS).increment(1);
            let error = tried.failures.last().map_or("", |failure| failure.error.as_str());
            tracing::error!(
                message = %delivery.id(), topic = %self.topology.topic, group = %self.group,
                attempts = tried.attempts, error, alert = "dead_letter",
                "a message is given up: it is a dead letter now"
            );
        }
        // Whoever waited may be gone.
        let _ = done.send(());
    }
}

/// How many of them one statement takes.
fn fitting(requests: &[Request]) -> usize {
    let mut bytes = 0;
    let more = requests.iter().take(MOST.0).skip(1).take_while(|request| {
        bytes += request.delivery.payload().len();
        bytes <= MOST.1
    });
    (1 + more.count()).min(requests.len())
}
