//! The segments of one node: what this process writes, and what others before it have left.
//!
//! ```text
//! old      n01-000001 n01-000002      deleted when retired, and every take-over is settled
//! own      n01-000003 n01-000004      deleted when committed, but for the last
//!                     ^ appended to
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::consumer::journal::Mark;
use crate::consumer::journal::folder::Folder;
use crate::consumer::journal::record::{Held, Record, micros};
use crate::consumer::journal::replay::{Acks, Before, Former, Replay};
use crate::consumer::journal::segment;
use crate::id::{NodeId, Uid};
use crate::store::group::{Acquired, Fence};

/// What the journals of all nodes share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) folder: Folder,
    pub(super) member: Uuid,
    /// The members before this one whose segments were there.
    pub(super) former: Vec<Uuid>,
    /// A write has failed: nothing is written any more.
    pub(super) stopped: AtomicBool,
    /// Somebody else may have the folder.
    pub(super) closed: AtomicBool,
    /// Acknowledgements that were not written.
    pub(super) unwritten: AtomicU64,
}

impl Common {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn stop(&self, error: &io::Error) {
        if !self.stopped.swap(true, Ordering::Relaxed) {
            let path = self.folder.path.display();
            tracing::error!(
                %path, %error,
                "the journal can't be written and is not used any more: what is acknowledged and not \
                 committed when this process is killed will be delivered again"
            );
        }
    }
}

#[derive(Debug)]
pub(super) struct NodeJournal {
    common: Arc<Common>,
    node: NodeId,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    old: Vec<PathBuf>,
    former: BTreeMap<u8, Former>,
    /// Nothing that was not taken yet will be.
    retired: bool,
    live: BTreeMap<u8, Live>,
    /// The numbers of the segments of this process.
    own: Vec<u32>,
    next: u32,
    /// The last of them, as long as it is written to.
    pub(super) file: Option<File>,
    len: u64,
    closed: bool,
}

/// The newest holding of a partition, to be said again in each segment.
#[derive(Debug)]
struct Live {
    held: Held,
    /// The fences that it follows, until what was acknowledged under them is settled.
    follows: Vec<Fence>,
}

impl Live {
    fn encode(&self, into: &mut Vec<u8>) {
        for fence in &self.follows {
            into.extend(Record::Before(Held { fence: *fence, ..self.held }).encode());
        }
        let record = if self.follows.is_empty() { Record::Holding } else { Record::Continued };
        into.extend(record(self.held).encode());
    }
}

impl NodeJournal {
    pub(super) fn new(common: Arc<Common>, node: NodeId, replay: Replay) -> Self {
        let state = State {
            old: replay.segments,
            former: replay.partitions,
            next: replay.last.saturating_add(1),
            ..State::default()
        };
        Self { common, node, state: Mutex::new(state) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the first segment, which says who may own partitions.
    pub(super) fn begin(&self) {
        let mut state = self.lock();
        // A node where nothing was wanted for a while; an end of the whole journal stands.
        state.closed = false;
        if state.file.is_none() {
            self.roll(&mut state);
        }
    }

    /// Writes down a holding, before anything is acknowledged under it. Returns what was acknowledged
    /// before it and is to be taken over.
    pub(super) fn hold(&self, acquired: &Acquired, before: &Before) -> Arc<Acks> {
        let mut state = self.lock();
        let (table, incarnation) = (acquired.partition.table(), micros(acquired.incarnation));
        let held = Held { table, fence: acquired.fence, incarnation };
        let members = &self.common.former;
        let (acks, follows) = state
            .former
            .get_mut(&table)
            .and_then(|former| former.take(before, acquired, incarnation, members))
            .filter(|(acks, _)| !acks.is_empty())
            .unwrap_or_default();
        let live = Live { held, follows };
        let mut records = Vec::new();
        live.encode(&mut records);
        state.live.insert(table, live);
        if state.file.is_none() {
            self.roll(&mut state);
        } else {
            self.append(&mut state, &records);
        }
        if acks.is_empty() {
            // After the record: until then the old ones are what a kill leaves.
            state.former.remove(&table);
            state.tidy();
        }
        acks
    }

    pub(super) fn ack(&self, table: u8, fence: &Fence, id: i64, uid: Uid) {
        let mut state = self.lock();
        // Another holding of the partition has begun: the older one's are void.
        if !state.is_live(table, fence) {
            return;
        }
        let written = self.append(&mut state, &Record::Ack { table, id, uid }.encode());
        if !written && !state.closed {
            self.common.unwritten.fetch_add(1, Ordering::Relaxed);
            ::metrics::counter!(crate::metrics::UNWRITTEN).increment(1);
        }
    }

    pub(super) fn seen_on(&self, table: u8, fence: &Fence, incarnation: i64) {
        let mut state = self.lock();
        let live = state.live.get_mut(&table).filter(|live| live.held.fence == *fence);
        let Some(live) = live.filter(|live| live.held.incarnation != incarnation) else {
            return;
        };
        live.held.incarnation = incarnation;
        // It keeps what was said of this fence.
        let record = Record::Holding(live.held).encode();
        if let Some(former) = state.former.get_mut(&table) {
            former.seen_on(incarnation);
        }
        self.append(&mut state, &record);
    }

    pub(super) fn settle(&self, table: u8, fence: &Fence) {
        let mut state = self.lock();
        if let Some(live) = state.live.get_mut(&table).filter(|live| live.held.fence == *fence) {
            live.follows.clear();
            state.former.remove(&table);
            state.tidy();
        }
    }

    /// The holding has ended: later segments need not say so, unless it passes on what it took over.
    pub(super) fn forget(&self, table: u8, fence: &Fence) {
        let mut state = self.lock();
        if state.is_live(table, fence) && !state.former.contains_key(&table) {
            state.live.remove(&table);
        }
    }

    /// The segment that is written to, a new one if that is large.
    pub(super) fn mark(&self, limit: u64) -> Mark {
        let mut state = self.lock();
        if state.file.is_some() && state.len > limit {
            self.roll(&mut state);
        }
        let last = state.own.last().filter(|_| state.file.is_some());
        Mark(last.copied().unwrap_or(state.next))
    }

    pub(super) fn committed(&self, Mark(mark): Mark) {
        let mut state = self.lock();
        // A segment that could not be written does not say what was taken over: the first ones do.
        if self.common.is_stopped() && state.is_unsettled() {
            return;
        }
        state.own.retain(|number| *number >= mark || !self.delete(*number));
    }

    pub(super) fn retire_old(&self) {
        let mut state = self.lock();
        state.retired = true;
        state.former.retain(|_, former| former.is_taken());
        state.tidy();
    }

    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.file = None;
    }

    pub(super) fn finish(&self) {
        self.close();
        let mut state = self.lock();
        if !state.is_unsettled() {
            state.own.retain(|number| !self.delete(*number));
        }
    }

    fn delete(&self, number: u32) -> bool {
        segment::delete(&segment::path(&self.common.folder.path, self.node, number))
    }

    /// Begins a segment with what is held.
    fn roll(&self, state: &mut State) {
        let closed = state.closed || self.common.closed.load(Ordering::SeqCst);
        if closed || self.common.is_stopped() {
            return;
        }
        let number = state.next;
        let segment = Record::Segment { node: self.node, member: self.common.member };
        let mut records = segment.encode().to_vec();
        state.live.values().for_each(|live| live.encode(&mut records));
        match segment::create(&segment::path(&self.common.folder.path, self.node, number)) {
            Ok(file) => {
                state.own.push(number);
                state.next = number.saturating_add(1);
                state.file = Some(file);
                state.len = 0;
                self.append(state, &records);
            }
            Err(error) => {
                state.file = None;
                self.common.stop(&error);
            }
        }
    }

    /// One write; the kernel keeps it when the process is killed. Says whether it was done.
    fn append(&self, state: &mut State, records: &[u8]) -> bool {
        if self.common.is_stopped() {
            state.file = None;
        }
        let Some(file) = state.file.as_mut() else {
            return false;
        };
        if let Err(error) = file.write_all(records) {
            state.file = None;
            self.common.stop(&error);
            return false;
        }
        state.len += records.len() as u64;
        true
    }
}

impl State {
    fn is_live(&self, table: u8, fence: &Fence) -> bool {
        self.live.get(&table).is_some_and(|live| live.held.fence == *fence)
    }

    /// Whether something was taken over that only the old segments say.
    fn is_unsettled(&self) -> bool {
        self.former.values().any(Former::is_taken)
    }

    /// Deletes the old segments when nobody needs them.
    fn tidy(&mut self) {
        if self.retired && self.former.is_empty() {
            self.old.retain(|path| !segment::delete(path));
        }
    }
}
