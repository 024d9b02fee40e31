//! What a consumer has acknowledged and not committed, in files: so that it outlives the process.
//!
//! Acknowledgements are committed each second. A process that is killed in between takes them with it,
//! and what it had acknowledged is delivered again. With a journal each is first written to a file, with
//! one write(2) and without a sync: the kernel keeps it when the process dies, not when the machine does.
//!
//! ```text
//! <directory>/<cluster>+<topic>+<group>/
//!     lock               held while the consumer lives
//!     n01-000001.acks    old: of a process that is dead; read when the next one starts
//!     n01-000002.acks    own: what is committed is deleted, segment by segment
//!     n01-000003.acks    own: appended to; another is begun when it is larger than 1 MiB
//!
//!                    killed                    fence as it was left
//! ack ──> segment ─────────> old ──> replay ────────────────────────> taken over ──> settled
//!           │ committed               │ another owner, a seek, another server          │
//!           v                         v                                                v
//!         deleted                  dropped                                old deleted, if retired
//! ```
//!
//! A process may be killed again before it has committed what it took over. So old segments stay until
//! - [`retire_old`](Journal::retire_old) said that nothing more of the node will be taken over, and
//! - all that was taken over is [settled](HoldingJournal::settled): acknowledged anew, or committed.
//!
//! Until then each segment says which fences a holding follows, so that the third process finds both
//! the old acknowledgements and the new ones. One that was killed between the acquisition and its record
//! is known by its name: [`former`](Journal::former), which is written before the first acquisition.
//!
//! A write that fails stops the journal, and nothing else. What it says stays true.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use uuid::Uuid;

use crate::error::Result;
use crate::id::{NodeId, Uid};
use crate::name::{GroupName, TopicName};
use crate::store::group::{Acquired, Fence};

mod folder;
mod node;
mod record;
mod replay;
mod segment;
#[cfg(test)]
mod tests;

use folder::Folder;
use node::{Common, NodeJournal};
use replay::Replay;
pub(crate) use replay::{Acks, Before};

/// A segment larger than this is followed by another at the next commit.
const SEGMENT_BYTES: u64 = 1 << 20;

/// The journal of one consumer. All its functions block for as long as a small file takes.
#[derive(Debug)]
pub(crate) struct Journal {
    common: Arc<Common>,
    nodes: Mutex<BTreeMap<NodeId, Arc<NodeJournal>>>,
}

/// The segment that was written to before a commit was composed. Those below say nothing else than what
/// that commit has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "what was committed is deleted with it"]
pub(crate) struct Mark(u32);

impl Journal {
    /// Locks the journal and reads what others have left. Blocks.
    ///
    /// # Errors
    /// [`Conflict`](crate::ErrorKind::Conflict) where another consumer has it,
    /// [`Invalid`](crate::ErrorKind::Invalid) where the directory can't be used.
    pub(crate) fn open(
        directory: &Path,
        cluster: Uuid,
        (topic, group): (&TopicName, &GroupName),
        member: Uuid,
    ) -> Result<Self> {
        let folder = Folder::lock(directory, cluster, topic, group)?;
        let (nodes, former) =
            replay::read(&folder.path).map_err(|cause| folder::unusable(&folder.path, cause))?;
        let common = Arc::new(Common {
            folder,
            member,
            former,
            stopped: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            unwritten: AtomicU64::new(0),
        });
        let journal =
            |(node, replay)| (node, Arc::new(NodeJournal::new(Arc::clone(&common), node, replay)));
        let nodes = nodes.into_iter().map(journal).collect();
        Ok(Self { common, nodes: Mutex::new(nodes) })
    }

    /// The members of processes that are dead, and whose partitions this one may take at once. It lists
    /// those whose segments were there at the start.
    pub(crate) fn former(&self) -> &[Uuid] {
        &self.common.former
    }

    /// To be called before partitions of a node are first acquired: writes down this member's name, by
    /// which a later process knows what was acquired and not written down. Idempotent.
    pub(crate) fn begin(&self, node: NodeId) {
        self.node(node).begin();
    }

    /// A partition was acquired: writes that down, and returns what former processes have acknowledged
    /// and not committed. That is empty where somebody else has owned it in between, where a seek has
    /// moved it, or where another server answers. To be called before anything is acknowledged.
    ///
    /// An id is a location: before it counts as acknowledged, the message there is to be compared.
    pub(crate) fn holding(
        &self,
        acquired: &Acquired,
        before: &Before,
    ) -> (HoldingJournal, Arc<Acks>) {
        let node = self.node(acquired.partition.node());
        let acks = node.hold(acquired, before);
        let table = acquired.partition.table();
        (HoldingJournal { node, table, fence: acquired.fence }, acks)
    }

    /// To be called before a commit is composed.
    pub(crate) fn mark(&self, node: NodeId) -> Mark {
        self.node(node).mark(SEGMENT_BYTES)
    }

    /// Everything that was acknowledged before the mark is committed, or void: deletes what the journal
    /// says of it.
    pub(crate) fn committed(&self, node: NodeId, mark: Mark) {
        self.node(node).committed(mark);
    }

    /// Of this node nothing more will be taken over: what former members owned was acquired, or is
    /// others' by now. The old segments are deleted when what was taken over is settled. Idempotent.
    pub(crate) fn retire_old(&self, node: NodeId) {
        self.node(node).retire_old();
    }

    /// Everything of this node is committed and given back. Nothing more is written until it is
    /// [begun](Self::begin) again, and what this process has written is deleted, unless that tells of
    /// what was taken over and is not settled.
    pub(crate) fn finish(&self, node: NodeId) {
        self.node(node).finish();
    }

    /// Ends it, and lets another consumer have it. What is acknowledged later is not written. Idempotent;
    /// dropping does the same.
    pub(crate) fn close(&self) {
        self.common.closed.store(true, Ordering::SeqCst);
        self.nodes().values().for_each(|node| node.close());
        self.common.folder.unlock();
    }

    /// How many acknowledgements were not written, since a write has failed.
    #[cfg(test)]
    pub(crate) fn unwritten(&self) -> u64 {
        self.common.unwritten.load(Ordering::Relaxed)
    }

    fn node(&self, node: NodeId) -> Arc<NodeJournal> {
        let new = || NodeJournal::new(Arc::clone(&self.common), node, Replay::default());
        Arc::clone(self.nodes().entry(node).or_insert_with(|| Arc::new(new())))
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<NodeId, Arc<NodeJournal>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

/// The journal of one holding. When a later holding of the partition has begun it writes nothing.
#[derive(Debug)]
pub(crate) struct HoldingJournal {
    node: Arc<NodeJournal>,
    table: u8,
    fence: Fence,
}

impl HoldingJournal {
    /// Writes an acknowledgement. To be called after it was recorded in memory: what a segment says
    /// before a mark is then in the commit that follows.
    pub(crate) fn ack(&self, id: i64, uid: Uid) {
        self.node.ack(self.table, &self.fence, id, uid);
    }

    /// What was read under it was seen on this server. Does nothing where that is known.
    pub(crate) fn seen_on(&self, incarnation: SystemTime) {
        self.node.seen_on(self.table, &self.fence, record::micros(incarnation));
    }

    /// What was taken over was acknowledged anew under this holding, was committed, or is void.
    /// Idempotent.
    pub(crate) fn settled(&self) {
        self.node.settle(self.table, &self.fence);
    }
}

impl Drop for HoldingJournal {
    fn drop(&mut self) {
        self.node.forget(self.table, &self.fence);
    }
}
