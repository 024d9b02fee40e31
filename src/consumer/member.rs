//! What a consumer does on one node: keeps its lease, takes and gives partitions, commits cursors,
//! looks for what no hint told.
//!
//! ```text
//!         something is wanted here                     acquire             drain (another's, shutdown)
//! asleep ─────────────────────────> at work     free ───────────> held ──────────────> flush, release
//!        <─────────────────────────                                │
//!         nothing wanted, nothing held                             └── another took it (lease over):
//!                                                                      lost, acks and flushes refused
//! ```
//!
//! Asleep it has no lease, no listener, no statement: a consumer may have nothing on most nodes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use crate::cluster::Place;
use crate::consumer::Shared;
use crate::consumer::commit::Pace;
use crate::consumer::expiry::Expiry;
use crate::consumer::holding::Holding;
use crate::consumer::looks::Looks;
use crate::consumer::lost::Lost;
use crate::consumer::parked::{Expected, Fetched};
use crate::consumer::waiting::Waiting;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::notifier::Hints;
use crate::store::connect::refused;
use crate::store::group;
use crate::supervise::supervised;
use crate::trouble::Trouble;

/// What a member is told.
pub(crate) enum Command {
    /// Commit what is acknowledged.
    Flush(oneshot::Sender<Result<()>>),
    /// What is wanted has changed.
    Rebalance,
    /// Look whether cursors were moved.
    Renew,
    /// Others do not reach the node: find out whether this one does.
    Probe,
    /// A reader found that the server lacks what it has read.
    TailLost { partition: PartitionId, owner: Uuid },
    /// Read this acquisition's partition anew, from the committed cursor.
    Anew { partition: PartitionId, owner: Uuid },
    /// Something was parked that is due in so many seconds.
    Parked { secs: f64 },
    /// Give everything back: when all is answered, or at the deadline.
    Stop { until: Instant, reply: oneshot::Sender<Result<()>> },
}

/// How long a statement of a member may take.
pub(super) const STATEMENT: Duration = Duration::from_secs(5);
/// How often a member that lacks something tries for it, at first and after a while. A hint tells
/// when something was given back.
const ACQUIRE_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// How soon after it tried it tries again where a hint came.
const AFTER_HINT: Duration = Duration::from_millis(50);
/// How long it tries often.
const EAGER: Duration = Duration::from_secs(15);
/// How soon a renewal that failed is tried again.
const RENEW_AGAIN: Duration = Duration::from_millis(500);
/// How soon a member tries again to renew, after it found another server.
const UNSETTLED: Duration = Duration::from_millis(100);
/// How often to say that a node is still in trouble.
const REMIND: Duration = Duration::from_mins(1);

pub(super) struct Member {
    pub(super) shared: Arc<Shared>,
    pub(super) node: NodeId,
    /// All of the topic on this node.
    pub(super) partitions: Vec<PartitionId>,
    pub(super) holdings: HashMap<PartitionId, Arc<Holding>>,
    /// Partitions being given up, until they are answered.
    pub(super) draining: JoinSet<Arc<Holding>>,
    /// When the lease was renewed last.
    pub(super) renewed: Option<Instant>,
    pub(super) expiry: Arc<Expiry>,
    /// Since when it was renewed in time.
    pub(super) kept_since: Option<Instant>,
    /// The server whose log all partitions were last seen on: when it was started.
    pub(super) incarnation: Option<SystemTime>,
    /// Another server has answered, and not all partitions were looked at there.
    pub(super) other_server: bool,
    /// The node knows where the group starts.
    pub(super) started: bool,
    pub(super) pace: Pace,
    pub(super) waiting: Waiting,
    pub(super) parked: Expected,
    pub(super) fetching: JoinSet<Result<Fetched>>,
    pub(super) lost: Lost,
    /// Something that is wanted may be lacking: to be found out.
    pub(super) lacks: bool,
    /// Since when something is wanted that is not held.
    lacking_since: Option<Instant>,
    trouble: Trouble,
    pub(super) looks: Looks,
    stop: Option<(Instant, oneshot::Sender<Result<()>>)>,
}

/// Works until it is told to stop. A member that panics is told, and a new one takes its place:
/// what it held is given up, and taken anew from the committed cursors.
pub(crate) async fn keep(
    shared: Arc<Shared>,
    node: NodeId,
    partitions: Vec<PartitionId>,
    commands: mpsc::UnboundedReceiver<Command>,
) {
    let commands = tokio::sync::Mutex::new(commands);
    let work = || async {
        let mut commands = commands.lock().await;
        run(Arc::clone(&shared), node, partitions.clone(), &mut commands).await;
    };
    let failed = |error: &Error| shared.give_up_all(node, error);
    supervised("member", shared.stopping.clone(), work, failed).await;
}

async fn run(
    shared: Arc<Shared>,
    node: NodeId,
    partitions: Vec<PartitionId>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
) {
    let pace = Pace::new(shared.options.flush_interval);
    let looks = Looks::new(shared.options.poll_interval, Instant::now());
    let mut member = Member {
        partitions,
        shared,
        node,
        holdings: HashMap::new(),
        draining: JoinSet::new(),
        renewed: None,
        expiry: Arc::default(),
        kept_since: None,
        incarnation: None,
        other_server: false,
        started: false,
        pace,
        waiting: Waiting::default(),
        parked: Expected::default(),
        fetching: JoinSet::new(),
        lost: Lost::new(REMIND),
        lacks: false,
        lacking_since: None,
        trouble: Trouble::new(REMIND),
        looks,
        stop: None,
    };
    let cluster_ends = member.shared.cluster.inner.shutdown.clone();
    loop {
        member.sleep(commands).await;
        let mut outcome = Ok(());
        if member.stop.is_none() && !cluster_ends.is_cancelled() {
            let shared = Arc::clone(&member.shared);
            let hints = shared.cluster.inner.notifier.subscribe(&member.partitions);
            let expiry = Arc::clone(&member.expiry);
            tokio::select! {
                () = member.work(commands, hints) => {}
                never = expiry.watch(&shared, node) => match never {},
            }
            outcome = member.leave().await;
            member.waiting.answer(&outcome);
            // Nobody is told any more if it changes.
            member.notifier_gauge().set(0.0);
        }
        if let Some((_, reply)) = member.stop.take() {
            let _ = reply.send(outcome);
            return;
        }
        if cluster_ends.is_cancelled() {
            return;
        }
        member.note(outcome);
    }
}

impl Member {
    /// Until something is wanted here. Where the node did not answer, it is asked now and then:
    /// others take its partitions as long as this one does not reach it.
    async fn sleep(&mut self, commands: &mut mpsc::UnboundedReceiver<Command>) {
        let cluster_ends = self.shared.cluster.inner.shutdown.clone();
        let mut probe_at = Instant::now();
        while self.stop.is_none() && self.wanted().is_empty() {
            let probes = self.shared.reach.is_failing(self.node);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Probe) => self.probe().await,
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                () = sleep_until(probe_at), if probes => {
                    self.probe().await;
                    probe_at = Instant::now() + self.shared.options.lease / 3;
                }
                () = cluster_ends.cancelled() => return,
            }
        }
    }

    async fn probe(&mut self) {
        let connected = timeout(STATEMENT, self.shared.connection(self.node)).await;
        match connected {
            // This process' own work has the connections, which says nothing about the node.
            Ok(Err(error)) if error.is_own_pool() => {}
            connected => self.shared.reach.note(self.node, matches!(connected, Ok(Ok(_)))),
        }
    }

    /// What it should have here.
    pub(super) fn wanted(&self) -> BTreeSet<PartitionId> {
        self.shared.wanted_of(&self.partitions)
    }

    /// Until nothing is wanted and nothing held, or the consumer stops.
    async fn work(&mut self, commands: &mut mpsc::UnboundedReceiver<Command>, mut hints: Hints) {
        let mut renew_at = Instant::now();
        let (mut acquire_at, mut balanced_at) = (Instant::now(), Instant::now());
        self.looks = Looks::new(self.shared.options.poll_interval, Instant::now());
        let cluster_ends = self.shared.cluster.inner.shutdown.clone();
        let mut places = self.shared.cluster.inner.nodes.presence().changes();
        let mut listening = self.is_listening();
        let waker = self.shared.parked_waker(self.node);
        while !self.is_done() {
            if self.other_server || self.renewed.is_none() {
                renew_at = renew_at.min(Instant::now() + UNSETTLED);
            }
            tokio::select! {
                () = sleep_until(renew_at) => renew_at = self.renew_soon().await,
                () = sleep_until(acquire_at), if self.stop.is_none() => {
                    self.attempt(Work::Balance).await;
                    balanced_at = Instant::now();
                    acquire_at = balanced_at + self.acquire_again();
                }
                () = sleep_until(self.pace.due()) => {
                    self.attempt(Work::Flush).await;
                }
                () = sleep_until(self.waiting.at().unwrap_or(renew_at)), if self.waiting.at().is_some() => {
                    self.attempt_what_waits().await;
                }
                () = sleep_until(self.parked.at().unwrap_or(renew_at)),
                    if self.parked.at().is_some() && self.fetching.is_empty() =>
                {
                    self.begin_to_fetch();
                }
                Some(Ok(fetched)) = self.fetching.join_next() => self.fetched(&fetched),
                () = waker.notified() => self.parked.look_at_all(),
                () = sleep_until(self.looks.at()) => self.look_in_turn().await,
                // Whoever misses the session must find the lease renewed.
                _ = places.changed() => {
                    if std::mem::replace(&mut listening, self.is_listening()) != listening {
                        renew_at = Instant::now();
                    }
                }
                Some(hint) = hints.next() => if self.hear(hint) {
                    // Whether it was given back or appended to is not said.
                    acquire_at = acquire_at.min(balanced_at + AFTER_HINT);
                },
                Some(Ok(holding)) = self.draining.join_next() => self.give_all_back(holding),
                command = commands.recv() => match command {
                    Some(Command::Renew) => renew_at = Instant::now(),
                    Some(Command::Rebalance) => {
                        (self.lacking_since, acquire_at) = (None, Instant::now());
                    }
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                () = cluster_ends.cancelled() => return,
            }
            if std::mem::take(&mut self.lacks) {
                acquire_at = acquire_at.min(Instant::now() + self.acquire_again());
            }
        }
    }

    /// Gives a partition back that is answered, and what else is.
    fn give_all_back(&mut self, first: Arc<Holding>) {
        let others = std::iter::from_fn(|| self.draining.try_join_next());
        let answered = others.filter_map(Result::ok).chain([first]).collect();
        self.give_back(answered);
    }

    fn is_listening(&self) -> bool {
        self.shared.cluster.inner.nodes.presence().is_at(Place::Node(self.node))
    }

    /// Nothing is left to do here.
    fn is_done(&self) -> bool {
        self.holdings.is_empty() && (self.stop.is_some() || self.wanted().is_empty())
    }

    /// Renews; returns when to do it again.
    async fn renew_soon(&mut self) -> Instant {
        let soon = match self.attempt(Work::Renew).await {
            true if self.other_server => UNSETTLED,
            true => self.shared.options.lease,
            false => RENEW_AGAIN,
        };
        Instant::now() + soon.min(self.shared.options.lease * 3 / 10)
    }

    /// How long until it tries again for what it lacks.
    fn acquire_again(&mut self) -> Duration {
        let wanted = self.wanted();
        if wanted.iter().all(|partition| self.holdings.contains_key(partition)) {
            self.lacking_since = None;
            return Duration::from_hours(1);
        }
        let since = *self.lacking_since.get_or_insert_with(Instant::now);
        let again = if since.elapsed() < EAGER { ACQUIRE_AGAIN.0 } else { ACQUIRE_AGAIN.1 };
        again.min(self.shared.options.lease / 3)
    }

    /// Tries something that may fail and is tried again; says whether it was done.
    pub(super) async fn attempt(&mut self, work: Work) -> bool {
        let outcome = match work {
            Work::Renew => timeout(STATEMENT, self.renew()).await,
            Work::Balance => timeout(STATEMENT, self.balance()).await,
            Work::Flush => {
                timeout(STATEMENT, self.flush(None)).await.map(|flushed| flushed.map(drop))
            }
            Work::Look => {
                let looked = timeout(STATEMENT, self.look()).await;
                if !matches!(looked, Ok(Ok(()))) {
                    self.wake_all();
                }
                looked
            }
        };
        let late = || {
            let what = format!("node {}: no answer in time", self.node);
            Err(Error::new(ErrorKind::Timeout, what))
        };
        let outcome = outcome.unwrap_or_else(|_| late());
        let done = outcome.is_ok();
        // Only a renewal has asked the node for certain: the others may have had nothing to do.
        if !done || matches!(work, Work::Renew) {
            self.note(outcome);
        }
        done
    }

    /// Says once that a node is in trouble, then now and then, and once that it is well again.
    pub(super) fn note(&mut self, outcome: Result<()>) {
        match outcome {
            Ok(()) => {
                self.shared.reach.note(self.node, true);
                if self.trouble.end() {
                    tracing::info!(node = %self.node, group = %self.shared.group, "node is back");
                }
            }
            // A partition's trouble, and not the node's; the stream says so.
            Err(error) if matches!(error.kind(), ErrorKind::LeaseLost | ErrorKind::Reset) => {}
            // This process' own work has the connections, which says nothing about the node.
            Err(error) if error.is_own_pool() => {
                let (node, group) = (self.node, &self.shared.group);
                tracing::debug!(%node, %group, error = %error.chain(), "no free connection");
            }
            Err(error) => {
                self.shared.reach.note(self.node, false);
                if self.trouble.meet(Instant::now()) {
                    tracing::error!(
                        node = %self.node, group = %self.shared.group, error = %error.chain(),
                        "node in trouble: its partitions pause"
                    );
                }
            }
        }
    }

    pub(super) fn wake(&self, partitions: &[PartitionId]) {
        for holding in partitions.iter().filter_map(|partition| self.holdings.get(partition)) {
            holding.wake.notify_one();
        }
    }

    pub(super) fn wake_all(&self) {
        self.holdings.values().for_each(|holding| holding.wake.notify_one());
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Flush(reply) if self.holdings.is_empty() => _ = reply.send(Ok(())),
            Command::Flush(reply) => self.waiting.flush(reply),
            Command::TailLost { .. } | Command::Anew { .. } => {
                match command {
                    Command::Anew { partition, owner } => self.begin_anew(partition, owner).await,
                    Command::TailLost { partition, owner } => {
                        self.lose_tail(partition, owner).await;
                    }
                    _ => {}
                }
                if self.stop.is_none() {
                    self.attempt(Work::Balance).await;
                }
            }
            Command::Stop { until, reply } => {
                let all: Vec<_> = self.holdings.values().cloned().collect();
                for holding in all {
                    self.give_up(holding, until);
                }
                self.stop = Some((until, reply));
            }
            Command::Parked { secs } => self.parked.expect(Some(secs)),
            // Those who sleep are woken by any command, and who works does this anyway.
            Command::Rebalance | Command::Renew | Command::Probe => {}
        }
    }

    /// Commits and releases all that is left, and ends the lease. With it ends what was not
    /// committed.
    async fn leave(&mut self) -> Result<()> {
        let holdings: Vec<Arc<Holding>> = self.holdings.values().cloned().collect();
        for holding in &holdings {
            holding.end(ErrorKind::LeaseLost);
        }
        let done = timeout(STATEMENT, async {
            let flushed = self.hand_all_over().await;
            let left: Vec<_> = self.holdings.values().cloned().collect();
            let released = self.release(&left).await;
            let _ = group::sweep_members(self.shared.connection(self.node).await?).await;
            let connection = self.shared.connection(self.node).await?;
            let (member, group) = (self.shared.member, &self.shared.group);
            let left = group::leave(connection, member, group, self.shared.turn()).await;
            flushed.and(released).and(left.map_err(|error| refused(error, "end the lease")))
        });
        let outcome = done.await.unwrap_or_else(|_| {
            let what = format!("commit acknowledgements on node {}: no answer", self.node);
            Err(Error::new(ErrorKind::Timeout, what))
        });
        for holding in holdings {
            self.forget(&holding);
        }
        if let Some(journal) = self.shared.journal.as_ref().filter(|_| outcome.is_ok()) {
            journal.finish(self.node);
        }
        (self.renewed, self.kept_since, self.incarnation) = (None, None, None);
        self.other_server = false;
        outcome
    }
}

/// What a member does from time to time.
#[derive(Clone, Copy)]
pub(super) enum Work {
    Renew,
    Balance,
    Flush,
    Look,
}
