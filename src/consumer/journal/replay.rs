//! What the segments of processes that are dead say.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::consumer::journal::record::{Held, Record};
use crate::consumer::journal::segment;
use crate::id::{NodeId, Uid};
use crate::store::group::{Acquired, Fence};

/// Acknowledged messages: which message was at which id.
pub(crate) type Acks = BTreeMap<i64, Uid>;

/// What a cursor's row said before it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Before {
    pub(crate) member: Option<Uuid>,
    /// None where it was given back.
    pub(crate) owner: Option<Uuid>,
    pub(crate) epoch: i64,
    pub(crate) reset_epoch: i64,
}

/// The segments of one node.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) segments: Vec<PathBuf>,
    /// The number of the last one.
    pub(super) last: u32,
    /// By table.
    pub(super) partitions: BTreeMap<u8, Former>,
}

/// What is known of a partition: its newest holding, and what was acknowledged under it.
///
/// In memory it is what was acknowledged between two commits, and what a segment holds: not more than
/// was fetched and handed out meanwhile.
#[derive(Debug)]
pub(super) struct Former {
    fence: Fence,
    incarnation: i64,
    acks: Arc<Acks>,
    /// The fences that it was under before holdings of this process took it.
    follows: Vec<Fence>,
}

impl Former {
    fn new(held: Held) -> Self {
        let Held { fence, incarnation, .. } = held;
        Self { fence, incarnation, acks: Arc::default(), follows: Vec::new() }
    }

    /// Hands it to a new holding, unless somebody else owned the partition in between, or another
    /// server answered. `members` are all dead, and were one after the other.
    ///
    /// Returns what was acknowledged and not committed since, and all fences that were before.
    pub(super) fn take(
        &mut self,
        before: &Before,
        acquired: &Acquired,
        incarnation: i64,
        members: &[Uuid],
    ) -> Option<(Arc<Acks>, Vec<Fence>)> {
        if before.reset_epoch != self.fence.reset_epoch
            || acquired.fence.reset_epoch != self.fence.reset_epoch
            || incarnation != self.incarnation
            || !self.is_next(before, members)
        {
            return None;
        }
        Arc::make_mut(&mut self.acks).retain(|id, _| !is_committed(acquired, *id));
        self.follows.push(std::mem::replace(&mut self.fence, acquired.fence));
        Some((Arc::clone(&self.acks), self.follows.clone()))
    }

    pub(super) fn is_taken(&self) -> bool {
        !self.follows.is_empty()
    }

    fn is_next(&self, before: &Before, members: &[Uuid]) -> bool {
        // Each acquisition raises the epoch, so that a row without an owner is as this one left it.
        let unchanged = before.epoch == self.fence.epoch
            && before.owner.is_none_or(|owner| owner == self.fence.owner);
        // Killed between its acquisition and its record of that.
        let unrecorded = self.fence.epoch.checked_add(1) == Some(before.epoch)
            && before.member.is_some_and(|member| members.contains(&member));
        unchanged || unrecorded
    }

    /// The holding that it went to was seen on another server.
    pub(super) fn seen_on(&mut self, incarnation: i64) {
        self.incarnation = incarnation;
    }
}

fn is_committed(acquired: &Acquired, id: i64) -> bool {
    // The runs are in order and apart from each other.
    let after = acquired.acked_ahead.partition_point(|(first, _)| *first <= id);
    let run = acquired.acked_ahead[..after].last();
    id <= acquired.acked_id || run.is_some_and(|(_, last)| id <= *last)
}

impl Replay {
    fn apply(&mut self, reading: &mut Reading, record: Record) {
        match record {
            Record::Segment { .. } => {}
            Record::Before(held) => reading.before.push(held),
            Record::Holding(held) => {
                reading.before.clear();
                self.hold(reading, held);
            }
            Record::Continued(held) => {
                reading.before.retain(|before| before.table == held.table);
                self.hold(reading, held);
                reading.before.clear();
            }
            Record::Ack { table, id, uid } => {
                let of = reading.fences.get(&table);
                let former = self.partitions.get_mut(&table);
                if let Some(former) = former.filter(|former| Some(&former.fence) == of) {
                    Arc::make_mut(&mut former.acks).insert(id, uid);
                }
            }
        }
    }

    /// The newest holding counts. Acknowledgements stay where it is the same, or follows the one that
    /// they were made under.
    fn hold(&mut self, reading: &mut Reading, held: Held) {
        let former = self.partitions.entry(held.table).or_insert_with(|| Former::new(held));
        let follows = reading.before.iter().any(|before| before.fence == former.fence);
        if former.fence != held.fence && !follows {
            former.acks = Arc::default();
        }
        former.fence = held.fence;
        former.incarnation = held.incarnation;
        reading.fences.insert(held.table, held.fence);
    }
}

/// Where the reading of a segment is.
#[derive(Default)]
struct Reading {
    before: Vec<Held>,
    /// By table: every segment says again what is held.
    fences: BTreeMap<u8, Fence>,
}

/// Reads all segments of a folder: by node what they say, and the members that wrote them.
pub(super) fn read(folder: &Path) -> io::Result<(BTreeMap<NodeId, Replay>, Vec<Uuid>)> {
    let mut nodes: BTreeMap<NodeId, Replay> = BTreeMap::new();
    let mut members = Vec::new();
    for (node, number) in segment::list(folder)? {
        let path = segment::path(folder, node, number);
        let replay = nodes.entry(node).or_default();
        match read_segment(replay, node, &path) {
            Ok(Some(member)) if !members.contains(&member) => members.push(member),
            Ok(_) => {}
            // What can't be read is delivered again, which is no reason not to start.
            Err(error) => {
                let path = path.display();
                tracing::warn!(%path, %error, "a segment of the journal can't be read");
            }
        }
        replay.segments.push(path);
        replay.last = number;
    }
    Ok((nodes, members))
}

/// Returns the member that wrote it; none where even that is damaged.
fn read_segment(replay: &mut Replay, node: NodeId, path: &Path) -> io::Result<Option<Uuid>> {
    let mut reading = Reading::default();
    let mut member = None;
    let whole = segment::scan(path, |record| match record {
        Record::Segment { node: of, member: by } if of == node => member = Some(by),
        record if member.is_some() => replay.apply(&mut reading, record),
        _ => {}
    })?;
    if !whole {
        let path = path.display();
        tracing::info!(%path, "a segment of the journal ends in the middle of a record");
    }
    Ok(member)
}
