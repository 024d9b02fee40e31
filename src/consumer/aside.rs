//! Puts messages aside that a handler failed at: to be tried again later, or as dead letters.
//!
//! ```text
//! failed ─> waiting ─> one statement for all of a node ─> there: acknowledged, in memory too
//!              ^                     │
//!              └── no answer, locked ┘        another's by now: delivered there
//! ```
//!
//! A copy and the acknowledgement are committed together: nothing is acknowledged that is not kept, and
//! nothing is kept twice. What waits is bounded by whoever hands it over.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::consumer::delivery::Delivery;
use crate::consumer::member::{Command, STATEMENT};
use crate::consumer::retry::Decision;
use crate::consumer::trouble::Trouble;
use crate::consumer::{Order, Shared, Verdict, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::failure::Past;
use crate::id::NodeId;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::failures::{self, Ending, Settle, Tried};
use crate::store::group::Moved;

/// The most of one statement: messages, and bytes over the first.
const MOST: (usize, usize) = (256, 4 << 20);
/// Between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
const REMIND: Duration = Duration::from_mins(1);

/// What waits to be put aside, by node.
#[derive(Default)]
pub(super) struct Aside(Mutex<HashMap<NodeId, Queue>>);

#[derive(Default)]
struct Queue {
    waiting: Vec<Request>,
    working: bool,
}

struct Request {
    delivery: Delivery,
    tried: Tried,
    /// Dropped unanswered where it is another's by now.
    done: oneshot::Sender<()>,
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

    /// Puts a message aside that has failed. The receiver hears when it is there; it is closed where the
    /// partition is another's by now.
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
        let mut queues = lock(&self.aside.0);
        let queue = queues.entry(node).or_default();
        queue.waiting.push(Request { delivery, tried, done });
        if !std::mem::replace(&mut queue.working, true) {
            let shared = Arc::clone(self);
            self.cluster.inner.tasks.spawn(async move { shared.work_off(node).await });
        }
        receiver
    }

    /// Until nothing waits.
    async fn work_off(self: Arc<Self>, node: NodeId) {
        let (mut left, mut backoff) = (Vec::new(), BACKOFF.0);
        let mut trouble = Trouble::new(REMIND);
        loop {
            {
                let mut queues = lock(&self.aside.0);
                let queue = queues.entry(node).or_default();
                left.append(&mut queue.waiting);
                // What is another's by now is delivered there.
                left.retain(|request: &Request| request.delivery.holding().accepts().is_ok());
                if left.is_empty() {
                    queue.working = false;
                    return;
                }
            }
            let mut part = left;
            left = part.split_off(fitting(&part));
            let count = part.len();
            let (outcome, again) = self.attempt_aside(node, part).await;
            match outcome {
                Ok(()) => _ = trouble.end(),
                Err(error) if trouble.meet(Instant::now()) => tracing::warn!(
                    %node, group = %self.group, error = %error.chain(),
                    "messages that failed can't be put aside yet"
                ),
                Err(_) => {}
            }
            if again.len() < count {
                backoff = BACKOFF.0;
            }
            if !again.is_empty() {
                // Locked by a transaction, or without an answer: the others come first.
                left.extend(again);
                sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF.1);
            }
        }
    }

    /// Returns what is to be tried again.
    async fn attempt_aside(&self, node: NodeId, part: Vec<Request>) -> (Result<()>, Vec<Request>) {
        let (parked, fresh): (Vec<Request>, Vec<Request>) =
            part.into_iter().partition(|request| request.delivery.is_parked());
        let mut again = Vec::new();
        // What is dropped by the time limit is the statement, and none of the requests.
        let put = self.in_time(node, self.put(node, &fresh)).await;
        let put = self.take_note(fresh, put, &mut again);
        let settled = self.in_time(node, self.settle(node, &parked)).await;
        let settled = self.take_note(parked, settled, &mut again);
        (put.and(settled), again)
    }

    async fn in_time(
        &self,
        node: NodeId,
        asking: impl Future<Output = Result<Vec<Moved>>>,
    ) -> Result<Vec<Moved>> {
        let late = || Error::new(ErrorKind::Unavailable, format!("node {node}: no answer in time"));
        timeout(STATEMENT, asking).await.unwrap_or_else(|_| Err(late()))
    }

    async fn put(&self, node: NodeId, requests: &[Request]) -> Result<Vec<Moved>> {
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
        let outcomes = failures::put_aside(connection, names, &messages).await;
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
        failures::settle_parked(connection, &self.group, &parked)
            .await
            .map_err(|error| refused(error, &what))
    }

    /// What was put aside is done; the rest is to be tried again.
    fn take_note(
        &self,
        requests: Vec<Request>,
        outcomes: Result<Vec<Moved>>,
        again: &mut Vec<Request>,
    ) -> Result<()> {
        let outcomes = match outcomes {
            Ok(outcomes) => outcomes,
            Err(error) => {
                again.extend(requests);
                return Err(error);
            }
        };
        for (request, outcome) in requests.into_iter().zip(outcomes) {
            match outcome {
                Moved::Yes => self.is_aside(request),
                Moved::Locked => again.push(request),
                Moved::OtherServer => {
                    request.delivery.holding().compare();
                    again.push(request);
                }
                // The next renewal finds that too; whoever has it delivers it.
                Moved::LeaseLost | Moved::Reset => drop(request),
            }
        }
        Ok(())
    }

    fn is_aside(&self, request: Request) {
        let Request { mut delivery, tried, done } = request;
        delivery.put_aside();
        if let Some(secs) = tried.due_secs {
            ::metrics::counter!(names::PARKED).increment(1);
            self.tell(delivery.partition().node(), Command::Parked { secs });
        } else {
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
