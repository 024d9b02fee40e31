//! Receiving a backlog: each slice is a group of its own that reads it from the start.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::bench::floor::{self, BATCH, Bare, Work};
use crate::bench::slices::{Contest, Latency, Outcome, SLICE, Tally, alternate, pairs_in};
use crate::bench::stage::{FLOOR_CONNECTIONS, Stage};
use crate::consumer::{ConsumerHandle, Messages};
use crate::error::{Error, ErrorKind, Result};

/// How long a group may take to begin.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long giving partitions back may take.
const GRACE: Duration = Duration::from_secs(5);

/// Against the floor; where there are several members also against one alone.
pub(super) async fn measure(stage: &Stage) -> Result<(Outcome, Option<Outcome>)> {
    let backlog = fill(stage, backlog_for(stage)).await?;
    let pairs = pairs_in(stage.options.seconds);
    let outcome = alternate(Consume::new(stage, backlog).await?, pairs).await?;
    if stage.options.members == 1 {
        return Ok((outcome, None));
    }
    let mut several = Consume::new(stage, backlog).await?;
    several.prefix = "m";
    let to_one = alternate(Several(several), pairs).await?;
    Ok((outcome, Some(to_one)))
}

/// All members against one alone.
struct Several<'a>(Consume<'a>);

impl Contest for Several<'_> {
    async fn library(&mut self, slice: Duration) -> Result<Tally> {
        self.0.read_by(self.0.stage.options.members, slice).await
    }

    async fn floor(&mut self, slice: Duration) -> Result<Tally> {
        self.0.read_by(1, slice).await
    }
}

/// More than is read in a slice, at most half a gigabyte.
fn backlog_for(stage: &Stage) -> u64 {
    let fits = (512 << 20) / (stage.options.size as u64 + 1);
    let enough = if stage.options.seconds < 10 { 500_000 } else { 5_000_000 };
    stage.options.messages.unwrap_or(fits.min(enough))
}

/// Appends so many messages to the library's topic, through the floor.
pub(super) async fn fill(stage: &Stage, messages: u64) -> Result<u64> {
    let writers = Bare::each(&stage.producing, &stage.topic, usize::MAX).await?;
    floor::fill(writers, &stage.payloads.batches(BATCH).into(), messages).await
}

pub(super) struct Consume<'a> {
    stage: &'a Stage,
    backlog: u64,
    groups: usize,
    prefix: &'static str,
    bare: Vec<Bare>,
}

impl<'a> Consume<'a> {
    /// On a topic that has so many messages.
    pub(super) async fn new(stage: &'a Stage, backlog: u64) -> Result<Self> {
        let bare = Bare::each(&stage.consuming, &stage.topic, FLOOR_CONNECTIONS).await?;
        Ok(Self { stage, backlog, groups: 0, prefix: "g", bare })
    }

    /// A new group; each member reads in a task of its own.
    async fn join(&mut self, members: usize) -> Result<Group> {
        self.groups += 1;
        // Groups of a small and a large backlog are not the same.
        let name = format!("{}{}-{}", self.prefix, self.backlog, self.groups);
        let progress = Arc::new(Progress::new(self.backlog));
        let mut group = Group { handles: Vec::new(), readers: JoinSet::new(), progress };
        let mut streams = Vec::new();
        for _ in 0..members {
            let topic = self.stage.name();
            let messages = self.stage.consuming.consumer(topic, &name).stream().await?;
            group.handles.push(messages.handle());
            streams.push(messages);
        }
        // What is measured is reading, not the division of partitions.
        timeout(PATIENCE, group.is_even(self.stage.topic.partitions.len())).await.map_err(
            |_| {
                let what = "the members do not come to even shares";
                Error::new(ErrorKind::Timeout, what)
            },
        )?;
        for messages in streams {
            group.readers.spawn(read(messages, Arc::clone(&group.progress)));
        }
        Ok(group)
    }
}

impl Consume<'_> {
    /// The clock runs once the group is under way: joining is not what is measured, and what was
    /// fetched before is no gift.
    async fn read_by(&mut self, members: usize, slice: Duration) -> Result<Tally> {
        let group = self.join(members).await?;
        group.progress.reach(group.progress.start).await?;
        let _ = timeout(slice, group.progress.reach(self.backlog)).await;
        let (elapsed, messages) = group.progress.of_the_clock();
        let latency = group.leave().await?;
        Ok(Tally { messages, elapsed, latency })
    }
}

impl Contest for Consume<'_> {
    async fn library(&mut self, slice: Duration) -> Result<Tally> {
        self.read_by(self.stage.options.members, slice).await
    }

    async fn floor(&mut self, slice: Duration) -> Result<Tally> {
        floor::slice(&mut self.bare, &Work::Read, slice).await
    }
}

/// Takes turns until the time is over, at least once. Each of the library's turns reads all.
pub(super) async fn drain(consume: &mut Consume<'_>, time: Duration) -> Result<Outcome> {
    let until = Instant::now() + time;
    let mut pairs = Vec::new();
    while pairs.is_empty() || Instant::now() < until {
        let library = consume.library(PATIENCE).await?;
        // However quickly the library was through, the floor has time for a message.
        let floor = consume.floor(library.elapsed.clamp(SLICE / 10, SLICE)).await?;
        pairs.push((library, floor));
    }
    Outcome::of::<Consume<'_>>(&pairs)
}

/// The members of one slice.
struct Group {
    handles: Vec<ConsumerHandle>,
    readers: JoinSet<Result<Latency>>,
    progress: Arc<Progress>,
}

impl Group {
    /// Waits until all partitions are owned, and evenly.
    async fn is_even(&self, partitions: usize) {
        let least = partitions / self.handles.len().max(1);
        loop {
            let held = self.handles.iter().map(ConsumerHandle::held_partitions);
            let (sum, fewest) = held.fold((0, usize::MAX), |(sum, few), n| (sum + n, few.min(n)));
            if sum == partitions && fewest >= least {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn leave(self) -> Result<Latency> {
        let left = join_all(self.handles.iter().map(|handle| handle.shutdown(GRACE))).await;
        left.into_iter().collect::<Result<()>>()?;
        let mut latency = Latency::new();
        for read in self.readers.join_all().await {
            latency.add(&read?);
        }
        Ok(latency)
    }
}

/// Touches and acknowledges each message, until the consumer is shut down. Times how long it takes to
/// get 1,000.
async fn read(mut messages: Messages, progress: Arc<Progress>) -> Result<Latency> {
    let mut latency = Latency::new();
    let (mut count, mut begun) = (0, Instant::now());
    while let Some(delivery) = messages.next().await {
        let delivery = delivery?;
        floor::touch(delivery.payload());
        delivery.ack()?;
        count += 1;
        if count == BATCH {
            latency.record(begun.elapsed());
            progress.add(count as u64);
            (count, begun) = (0, Instant::now());
        }
    }
    Ok(latency)
}

/// How many messages all members have received.
struct Progress {
    /// Where the clock begins to run.
    start: u64,
    backlog: u64,
    count: AtomicU64,
    /// When the clock began to run, and how many had been received then.
    begun: OnceLock<(Instant, u64)>,
    /// When the last message was received.
    ended: OnceLock<Instant>,
    more: Notify,
}

impl Progress {
    fn new(backlog: u64) -> Self {
        // More than several members have fetched before.
        let start = backlog.min(5_000_000) / 5;
        Self {
            start,
            backlog,
            count: AtomicU64::new(0),
            begun: OnceLock::new(),
            ended: OnceLock::new(),
            more: Notify::new(),
        }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    fn add(&self, messages: u64) {
        let before = self.count.fetch_add(messages, Ordering::AcqRel);
        let after = before + messages;
        // Few look, and only these moments interest them. Whoever waits for one may wake when all is over.
        let crosses = |mark: u64| before < mark && after >= mark;
        if crosses(self.start) {
            let _ = self.begun.set((Instant::now(), after));
            self.more.notify_waiters();
        }
        if crosses(self.backlog) {
            let _ = self.ended.set(Instant::now());
            self.more.notify_waiters();
        }
    }

    /// How long the clock has run, or did, and how many were received meanwhile.
    fn of_the_clock(&self) -> (Duration, u64) {
        let ended = self.ended.get().copied().unwrap_or_else(Instant::now);
        let (begun, before) = self.begun.get().copied().unwrap_or((ended, self.count()));
        (ended.saturating_duration_since(begun), self.count() - before)
    }

    /// Waits until so many have been received.
    async fn reach(&self, messages: u64) -> Result<()> {
        let reached = async {
            loop {
                let more = self.more.notified();
                if self.count() >= messages {
                    return;
                }
                more.await;
            }
        };
        let what = "no messages came in time";
        timeout(PATIENCE, reached).await.map_err(|_| Error::new(ErrorKind::Timeout, what))
    }
}
