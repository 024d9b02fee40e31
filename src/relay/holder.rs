//! Relays from one database while this process has its lease.
//!
//! ```text
//!  ┌─> look ─> route ─> freeze ─> lanes ─> append ─┐ (in tasks, several at once)
//!  │                      ^                        v
//!  │                      └── forget what is there ┘
//!  └── nothing: arm the flag ─> look once more ─> sleep: until woken, something is due, or for 2 s
//! ```
//!
//! Topics that are not known are asked for, and large batches read, in tasks beside.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::deliver::{End, Outcome, Pause};
use super::due::Due;
use super::lanes::{Lanes, Next};
use super::routes::{Routed, Routes, fitting};
use super::seen::{Scope, Seen, Sight};
use super::tasks::{News, Tasks, time_for};
use super::{LEASE, Outlet, listen, prune};
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics as names;
use crate::name::TopicName;
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::outbox::{self, Asked, Looked, Standing, Stepped, Waiting};
use crate::supervise::supervised;
use crate::topology::Topology;

/// Messages of a look.
const LIMIT: i32 = 4_000;
/// How often the lease is renewed, and the database looked at where nothing happens.
const RENEW: Duration = Duration::from_secs(2);
/// The same, while messages wait for their time: the clock may be moved.
const PENDING: Duration = Duration::from_secs(1);
/// Between looks for what may be committed any time.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// When what is due and has to wait is looked at again.
const WAITS: Duration = Duration::from_secs(1);

/// See the module.
struct Holder {
    outlet: Arc<Outlet>,
    woken: Arc<Notify>,
    tasks: Tasks,
    seen: Seen,
    due: Due,
    routes: Routes,
    lanes: Lanes,
    /// Batches that are there, and not forgotten yet.
    done: Vec<i64>,
    /// Whether the flag is armed; none while it is not known.
    armed: Option<bool>,
    renewed: Instant,
    started: Option<f64>,
    topology: u64,
    pause: Duration,
}

/// Relays until the lease is another's, or something fails. Dropped, it leaves everything to the
/// next.
pub(super) async fn hold(outlet: &Arc<Outlet>) -> Result<()> {
    let woken = Arc::new(Notify::new());
    let mut beside = JoinSet::new();
    // Until this is dropped.
    let never = CancellationToken::new();
    let (of, wakes) = (Arc::clone(outlet), Arc::clone(&woken));
    let listen = move || listen::run(Arc::clone(&of), Arc::clone(&wakes));
    beside.spawn(supervised("relay's listener", never.clone(), listen, |_| {}).map(drop));
    let of = Arc::clone(outlet);
    let prune = move || prune::run(Arc::clone(&of));
    beside.spawn(supervised("relay's pruner", never, prune, |_| {}).map(drop));
    let now = Instant::now();
    let mut holder = Holder {
        woken,
        tasks: Tasks::new(outlet),
        seen: Seen::new(),
        due: Due::new(now),
        routes: Routes::default(),
        lanes: Lanes::new(outlet.context.nodes.connections()),
        done: Vec::new(),
        armed: None,
        renewed: now,
        started: None,
        topology: outlet.context.topology.revision(),
        pause: BACKOFF.0,
        outlet: Arc::clone(outlet),
    };
    holder.take_over().await?;
    while holder.turn().await? {}
    Ok(())
}

impl Holder {
    /// Takes over what was frozen before, once nobody freezes any more who had the lease.
    async fn take_over(&mut self) -> Result<()> {
        loop {
            let lanes = outbox::lanes(self.outlet.get().await?, self.outlet.holder()).await;
            if let Some(lanes) = lanes.map_err(|error| self.refused(error))? {
                for partition in lanes {
                    self.lanes.has_more(partition);
                }
                return Ok(());
            }
            if !self.outlet.is_ours() {
                let what = "take over an outbox: another relay is at work";
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            tokio::time::sleep(BACKOFF.1).await;
        }
    }

    /// One look, and what follows from it. False: the lease is another's.
    async fn turn(&mut self) -> Result<bool> {
        while let Some(news) = self.tasks.heard() {
            self.hear(news)?;
        }
        self.send_on();
        self.release();
        self.ask_on();
        let arms = self.pause == Duration::ZERO && self.armed != Some(true);
        let Some((messages, moved)) = self.look(arms).await? else {
            return Ok(false);
        };
        self.outlet.failpoint("looked").await;
        let takes = !messages.is_empty() || self.routes.unknown().has_dead();
        if takes && !self.take(&messages).await? {
            return Ok(false);
        }
        if moved || self.routes.unknown().has_dead() {
            self.pause = BACKOFF.0;
            if self.lanes.are_full() {
                self.wait_for_news(None).await?;
            }
            return Ok(true);
        }
        self.rest().await?;
        Ok(true)
    }

    /// Looks. Returns what is to be taken, in order, and whether to look again at once; none where
    /// the lease is another's.
    async fn look(&mut self, arms: bool) -> Result<Option<(Vec<Waiting>, bool)>> {
        let scope = self.seen.scope();
        let now = Instant::now();
        let keep = self.outlet.keep();
        let renews = now.duration_since(self.renewed) >= RENEW / 2;
        let arm = if arms { Some(true) } else { self.armed.is_none().then_some(false) };
        let asked = Asked {
            holder: keep.holder,
            arm,
            keep: renews.then_some(&keep),
            after: scope.after,
            ranges: &scope.ranges,
            draws: scope.draws,
            due_after: self.due.after(now),
            limit: LIMIT,
        };
        let looking = async {
            let looked = outbox::look(self.outlet.get().await?, &asked).await;
            looked.map_err(|error| self.refused(error))
        };
        let looked = self.in_time(0, looking).await?;
        if arm.is_some() && looked.armed.is_none() {
            return Ok(None);
        }
        self.armed = looked.armed.or(self.armed);
        match looked.standing {
            None => {}
            Some(Standing::Ours) => {
                self.renewed = now;
                self.outlet.renew(now);
            }
            Some(_) => return Ok(None),
        }
        if self.started.is_some_and(|started| started.to_bits() != looked.started.to_bits())
            || self.seen.is_ahead_of(looked.last_id)
        {
            let what =
                "the outbox is on another server now, or was started again: from the beginning";
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        self.started = Some(looked.started);
        self.see(&scope, looked, now).map(Some)
    }

    fn see(&mut self, scope: &Scope, looked: Looked, now: Instant) -> Result<(Vec<Waiting>, bool)> {
        let Some(snapshot) = &looked.snapshot else {
            return Err(Error::new(ErrorKind::Database, "the outbox's snapshot can't be read"));
        };
        let limit = usize::try_from(LIMIT).unwrap_or(usize::MAX);
        let (mut messages, mut due) = (looked.published, looked.due);
        let is_cut = messages.len() >= limit;
        messages.dedup_by_key(|message| message.id);
        let fit = fitting(&messages);
        let is_full = is_cut || fit < messages.len();
        messages.truncate(fit);
        let ids: Vec<i64> = messages.iter().map(|message| message.id).collect();
        let sight =
            Sight { snapshot, own: looked.own, last_id: looked.last_id, ids: &ids, is_full };
        let upto = self.seen.observe(scope, &sight);
        messages.retain(|message| message.id <= upto);
        let due_cut = due.len() >= limit;
        let fit = fitting(&due);
        let due_full = due_cut || fit < due.len();
        due.truncate(fit);
        let place = due.last().and_then(|last| Some((last.due_at?, last.id)));
        self.due.looked(place, due_full, looked.next_due, now);
        let moved =
            !messages.is_empty() || !due.is_empty() || is_full || due_full || self.seen.is_due();
        if !messages.is_empty() && self.armed == Some(true) {
            // Whoever publishes more need not wake anybody.
            self.armed = None;
        }
        messages.append(&mut due);
        Ok((messages, moved))
    }

    /// Takes messages: freezes what has somewhere to go. False: the lease is another's.
    async fn take(&mut self, messages: &[Waiting]) -> Result<bool> {
        let now = (Instant::now(), SystemTime::now());
        let Routed { mut step, due_waits } = self.routes.route(messages, &self.lanes, now);
        self.ask_on();
        if due_waits {
            self.due.look_from_the_start(now.0 + WAITS);
        }
        if step.targets.is_empty() && step.dead.is_empty() {
            return Ok(true);
        }
        step.done = std::mem::take(&mut self.done);
        let holder = self.outlet.holder();
        loop {
            let outlet = Arc::clone(&self.outlet);
            let working = outlet.working.lock().await;
            let stepping = async {
                let stepped = outbox::step(self.outlet.get().await?, holder, &step).await;
                stepped.map_err(|error| self.refused(error))
            };
            let stepped = self.in_time(outbox::INLINE, stepping).await?;
            drop(working);
            match stepped {
                Stepped::NotOurs => return Ok(false),
                Stepped::Locked => self.leave_locked(&mut step, now.0).await?,
                Stepped::Did { frozen, large, buried } => {
                    self.outlet.failpoint("frozen").await;
                    let count: usize =
                        step.targets.iter().map(|target| target.messages.len()).sum();
                    ::metrics::counter!(names::RELAYED).increment(count as u64);
                    for frozen in frozen {
                        self.lanes.push(frozen);
                    }
                    for partition in large {
                        self.lanes.has_more(partition);
                    }
                    self.outlet.buried(&buried);
                    self.send_on();
                    return Ok(true);
                }
            }
        }
    }

    /// Leaves out of a step what somebody is about to take back.
    async fn leave_locked(&mut self, step: &mut outbox::Step, now: Instant) -> Result<()> {
        let targets = step.targets.iter().flat_map(|target| &target.messages).map(|m| m.0);
        let ids: Vec<i64> = targets.chain(step.dead.iter().map(|dead| dead.0)).collect();
        let free = outbox::unlocked(self.outlet.get().await?, &ids).await;
        let mut free = free.map_err(|error| self.refused(error))?;
        free.sort_unstable();
        let is_free = |id: &i64| free.binary_search(id).is_ok();
        for id in ids.iter().filter(|id| !is_free(id)) {
            self.routes.wait_for_lock(*id, now);
        }
        self.due.look_from_the_start(now + WAITS);
        for target in &mut step.targets {
            target.messages.retain(|message| is_free(&message.0));
        }
        step.dead.retain(|dead| is_free(&dead.0));
        Ok(())
    }

    /// Sends what lanes have ready, and reads more of the table where they have none in memory: a
    /// large message takes its time on a slow line, and holds up no other partition's.
    fn send_on(&mut self) {
        while let Some(next) = self.lanes.next(Instant::now()) {
            match next {
                Next::Load(partition, after) => self.tasks.load(partition, after),
                Next::Send(frozen) => self.tasks.deliver(*frozen),
            }
        }
    }

    /// Has the control database asked for topics that are not known.
    fn ask_on(&mut self) {
        let now = Instant::now();
        let names = self.routes.unknown().ask(now);
        if !names.is_empty() {
            self.tasks.ask(names);
        }
        for topic in self.routes.unknown().read(now) {
            self.tasks.read(topic);
        }
    }

    fn hear(&mut self, news: Result<News, JoinError>) -> Result<()> {
        let now = Instant::now();
        match news {
            Ok(News::Delivered(Outcome { frozen, end })) => self.delivered(frozen, end, now),
            Ok(News::Loaded(partition, batches)) => self.lanes.loaded(partition, batches?),
            Ok(News::Asked(names, Ok(existing))) => {
                self.routes.unknown().answered(names, &existing);
            }
            Ok(News::Asked(names, Err(error))) => self.go_on_without(names, &error, now),
            Ok(News::Topic(topic, found)) => {
                self.routes.unknown().has_read();
                match found {
                    Ok(topology) => self.learn(topology, now),
                    Err(error) if error.kind() == ErrorKind::NotFound => {
                        self.routes.is_missing(topic, &error.to_string());
                    }
                    Err(error) => {
                        tracing::debug!(topic, error = %error.chain(), "a topic could not be looked up");
                        self.routes.unknown().is_away(topic, now);
                    }
                }
            }
            // What it had is in the table still: all begins anew.
            Err(error) => {
                let what = "a task of the relay failed";
                return Err(Error::with_source(ErrorKind::Database, what, error));
            }
        }
        Ok(())
    }

    /// The control database is away: goes on with what is known of these topics.
    fn go_on_without(&mut self, names: Vec<String>, error: &Error, now: Instant) {
        tracing::debug!(error = %error.chain(), "topics could not be looked up");
        let cache = Arc::clone(&self.outlet.context.topology);
        let known = |name: &String| TopicName::new(name).ok().and_then(|name| cache.known(&name));
        for topology in names.iter().filter_map(known) {
            self.learn(topology, now);
        }
        self.routes.unknown().not_answered(names, now);
    }

    /// A topic is known: what waited for it is looked at again.
    fn learn(&mut self, topology: Topology, now: Instant) {
        let learned = self.routes.learn(topology);
        self.seen.again_all(&learned.ids);
        if learned.for_later {
            self.due.begin_anew(now);
        }
    }

    fn delivered(&mut self, frozen: outbox::Frozen, end: End, now: Instant) {
        let (partition, node) = (frozen.partition, frozen.partition.node());
        match end {
            End::Done(day) => {
                if let Some(day) = day {
                    self.routes.set_day(partition, day);
                }
                self.done.push(frozen.id);
                if self.lanes.done(partition, frozen.size(), true) {
                    tracing::info!(%node, "messages are relayed to the node again");
                }
            }
            End::Gone => {
                // Its messages may be in the outbox again.
                self.seen.again_all(&frozen.ids);
                self.lanes.gone(&frozen);
            }
            End::PutBack { full } => {
                match full {
                    Some(day) => self.routes.is_full(partition, day),
                    None => self.routes.has_refused(&frozen.topic, partition, now),
                }
                self.seen.again_all(&frozen.ids);
                self.lanes.done(partition, frozen.size(), true);
            }
            End::Again(error, pause) => {
                let of_node = (pause == Pause::Node).then_some(&error);
                if self.lanes.failed(frozen, of_node, pause.long(), now) {
                    tracing::warn!(
                        %node, error = %error.chain(),
                        "messages from an outbox wait for the node"
                    );
                } else {
                    tracing::debug!(%partition, error = %error.chain(), "relaying failed, again later");
                }
            }
        }
    }

    /// What waits for something that may be there now is looked at again.
    fn release(&mut self) {
        let version = self.outlet.context.topology.revision();
        if std::mem::replace(&mut self.topology, version) != version {
            self.routes.forget_topics();
        }
        self.routes.settle(|partition| self.lanes.is_idle(partition));
        let is_looking = self.seen.is_looking_again();
        for range in self.routes.released(Instant::now(), is_looking) {
            self.seen.again(range);
        }
    }

    /// Nothing was there: arms the flag and looks once more, or waits.
    async fn rest(&mut self) -> Result<()> {
        let now = Instant::now();
        if !self.done.is_empty() {
            self.forget().await?;
        }
        if !self.seen.is_settled() {
            // What was drawn may be committed any moment, by somebody who saw that the relay was
            // awake.
            self.pause = (self.pause * 2).clamp(BACKOFF.0, BACKOFF.1);
            return self.wait_for_news(Some(now + self.pause)).await;
        }
        if self.armed != Some(true) {
            self.pause = Duration::ZERO;
            return Ok(());
        }
        let next_due = self.due.next().map(|due| due.min(now + PENDING));
        let (routes, lanes) = (self.routes.retry_at(), self.lanes.retry_at(now));
        let times = [Some(self.renewed + RENEW), next_due, routes, lanes];
        let until = times.into_iter().flatten().min();
        self.outlet.failpoint("rests").await;
        self.wait_for_news(until).await
    }

    /// Waits until the relay is woken, a task is through, or this time.
    async fn wait_for_news(&mut self, until: Option<Instant>) -> Result<()> {
        let until = until.unwrap_or_else(|| Instant::now() + RENEW / 2);
        tokio::select! {
            () = self.woken.notified() => {
                // Until it rests again nobody need wake it.
                self.armed = None;
                self.pause = BACKOFF.0;
            }
            Some(news) = self.tasks.next() => self.hear(news)?,
            () = sleep_until(until) => {}
        }
        Ok(())
    }

    /// Forgets batches that are there. Not durably: who finds one again finds it stored.
    async fn forget(&mut self) -> Result<()> {
        let done = std::mem::take(&mut self.done);
        let forgetting = async {
            let forgotten = outbox::forget(self.outlet.get().await?, &done).await;
            forgotten.map_err(|error| self.refused(error))
        };
        self.in_time(0, forgetting).await?;
        self.outlet.failpoint("forgotten").await;
        Ok(())
    }

    /// A database that does not answer within two leases, and the time of so many bytes on a slow
    /// line, is given up: all begins anew.
    async fn in_time<T>(&self, bytes: usize, doing: impl Future<Output = Result<T>>) -> Result<T> {
        in_time(time_for(bytes), &format!("relay from {}", self.outlet.name), doing).await
    }

    fn refused(&self, error: Failed) -> Error {
        refused(error, &format!("relay from {}", self.outlet.name))
    }
}

const _: () = assert!(RENEW.as_millis() * 3 <= LEASE.as_millis());
