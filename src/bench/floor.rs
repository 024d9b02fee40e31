//! The bare loops: the library's own statements, a connection for each partition, nothing around.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::bench::slices::{Latency, Tally};
use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, PartitionId};
use crate::store::append::{self, Append, Arrays, Inserted, Rolled};
use crate::store::bare;
use crate::store::connect::refused;
use crate::store::node::Node;
use crate::topology::Topology;

/// Messages of a batch.
pub(super) const BATCH: usize = 1_000;
/// How long one append may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// What one fetch brings at most, bytes and rows: as much as the library's.
const FETCH: (i64, i32) = (1 << 20, 512);

/// A connection of its own to a partition.
pub(super) struct Bare {
    node: Node,
    partition: PartitionId,
    topic_id: Uuid,
    generation: i32,
    day: Day,
    producer: Uuid,
    sequence: i64,
}

impl Bare {
    /// One for each of the topic's first so many partitions.
    pub(super) async fn each(cluster: &Cluster, of: &Topology, most: usize) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for partition in of.partitions.iter().take(most) {
            all.push(Self::open(cluster, of, *partition).await?);
        }
        Ok(all)
    }

    async fn open(cluster: &Cluster, of: &Topology, partition: PartitionId) -> Result<Self> {
        let url = cluster.inner.nodes.url(partition.node()).await?;
        let options = cluster.inner.nodes.options(1);
        let node = Node::new(&url, cluster.id(), partition.node(), options)?;
        Ok(Self {
            day: roll(&node, partition).await?,
            node,
            partition,
            topic_id: of.id,
            generation: of.generation,
            producer: Uuid::new_v4(),
            sequence: 0,
        })
    }

    /// Appends a batch, in a transaction of its own.
    pub(super) async fn append(&mut self, arrays: &Arrays) -> Result<()> {
        self.sequence += 1;
        if self.try_append(arrays).await? {
            return Ok(());
        }
        // Midnight has passed.
        self.day = roll(&self.node, self.partition).await?;
        if self.try_append(arrays).await? {
            return Ok(());
        }
        let what = format!("append to partition {}: not inserted", self.partition);
        Err(Error::new(ErrorKind::Conflict, what))
    }

    async fn try_append(&self, arrays: &Arrays) -> Result<bool> {
        let batch = Append {
            partition: self.partition,
            topic_id: self.topic_id,
            generation: self.generation,
            day: self.day,
            first_day: self.day,
            latest_day: self.day,
            producer: self.producer,
            sequence: self.sequence,
            arrays,
        };
        let connection = self.node.get().await?;
        let outcome = append::append(connection, &[batch], DEADLINE).await;
        let outcome = outcome.map_err(|failure| failure.into_error("append, on the floor"))?;
        Ok(matches!(outcome[..], [Inserted::At(_)]))
    }

    async fn append_until(&mut self, batches: &[Arrays], until: Instant) -> Result<(u64, Latency)> {
        let (mut messages, mut latency) = (0, Latency::new());
        for arrays in batches.iter().cycle() {
            let begun = Instant::now();
            // However busy the machine is, a slice has something.
            if begun >= until && messages > 0 {
                break;
            }
            self.append(arrays).await?;
            latency.record(begun.elapsed());
            messages += u64::from(arrays.count.unsigned_abs());
        }
        Ok((messages, latency))
    }

    /// Reads the day from its start, again and again.
    async fn read_until(&mut self, until: Instant) -> Result<(u64, Latency)> {
        let (mut messages, mut latency, mut position) = (0, Latency::new(), 0);
        loop {
            let begun = Instant::now();
            if begun >= until && messages > 0 {
                return Ok((messages, latency));
            }
            let (count, last) = self.fetch(position).await?;
            if count == 0 && position == 0 {
                let what = format!("read partition {}: nothing is there", self.partition);
                return Err(Error::new(ErrorKind::NotFound, what));
            }
            if let Ok(thousandths) = u32::try_from(count / BATCH as u64)
                && thousandths > 0
            {
                latency.record(begun.elapsed() / thousandths);
            }
            messages += count;
            position = if count == 0 { 0 } else { last };
        }
    }

    async fn fetch(&self, position: i64) -> Result<(u64, i64)> {
        let connection = self.node.get().await?;
        bare::fetch(&connection, self.partition, self.day, position, FETCH, touch)
            .await
            .map_err(|error| refused(error, &format!("read partition {}", self.partition)))
    }
}

/// Looks at a payload: its length, its first and its last byte.
pub(super) fn touch(payload: &[u8]) {
    black_box((payload.len(), payload.first(), payload.last()));
}

/// Moves the partition to the server's date.
async fn roll(node: &Node, partition: PartitionId) -> Result<Day> {
    let what = format!("roll partition {partition}");
    match append::roll(node.get().await?, partition, SystemTime::now()).await? {
        Rolled::To(day) => Ok(day),
        Rolled::Clock => {
            let what = format!("{what}: clocks differ");
            Err(Error::new(ErrorKind::Conflict, what))
        }
        Rolled::Unknown => Err(Error::new(ErrorKind::NotFound, what)),
    }
}

/// What each connection of a slice does.
#[derive(Clone)]
pub(super) enum Work {
    Append(Arc<[Arrays]>),
    Read,
}

/// All connections at once, for the time of a slice.
pub(super) async fn slice(all: &mut Vec<Bare>, work: &Work, slice: Duration) -> Result<Tally> {
    let begun = Instant::now();
    let mut set = JoinSet::new();
    for mut bare in all.drain(..) {
        let work = work.clone();
        set.spawn(async move {
            let done = match work {
                Work::Append(batches) => bare.append_until(&batches, begun + slice).await,
                Work::Read => bare.read_until(begun + slice).await,
            };
            (bare, done)
        });
    }
    let (mut messages, mut latency) = (0, Latency::new());
    for (bare, done) in set.join_all().await {
        let (count, times) = done?;
        messages += count;
        latency.add(&times);
        all.push(bare);
    }
    Ok(Tally { messages, elapsed: begun.elapsed(), latency })
}

/// Appends so many messages to all partitions of a topic, as fast as it goes; rounded up to whole
/// batches. Returns how many there are.
pub(super) async fn fill(all: Vec<Bare>, batches: &Arc<[Arrays]>, messages: u64) -> Result<u64> {
    let round = all.len() * BATCH;
    let each = usize::try_from(messages).unwrap_or(usize::MAX).div_ceil(round);
    let mut set = JoinSet::new();
    for mut bare in all {
        let batches = Arc::clone(batches);
        set.spawn(async move {
            for arrays in batches.iter().cycle().take(each) {
                bare.append(arrays).await?;
            }
            Ok(())
        });
    }
    set.join_all().await.into_iter().collect::<Result<()>>()?;
    Ok((each * round) as u64)
}
