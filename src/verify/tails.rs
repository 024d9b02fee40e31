//! Ends of the log that servers have lost: those that were announced, and those that clients noticed.
//!
//! Where a client noticed one, nobody says from which id. The final read shows it. A server that was
//! put back goes on from its last id. So what it lost has one of two marks: its id is used again, or
//! nothing is stored at its id or above it in that day. A hole with messages above it is no lost tail.
//!
//! ```text
//! acknowledged   1 2 3 4 5 6 7 8      final read   1 2 3 x y       lost from 4 on
//! acknowledged   1 2 3 4 5 6 7 8      final read   1 2 3   5 6     4 is a hole; lost from 7 on
//! ```

use std::collections::HashMap;
use std::rc::Rc;

use crate::error::Result;
use crate::verify::history::History;
use crate::verify::ids::IDS_OF_DAY;
use crate::verify::ranges::Ranges;
use crate::verify::record::{Kind, Record, partition_of};
use crate::verify::sort::{Sorter, Workspace};

/// Ranges of holes that are kept for a partition. One with more has no lost tail that can be told.
const MOST_HOLES: usize = 10_000;

const STORED: u64 = 0;
const SEEN: u64 = 1;

/// Of all partitions.
#[derive(Debug, Default)]
pub(super) struct Tails {
    /// The last id that is certainly kept, by partition whose tail was announced to be lost.
    announced: HashMap<u32, i64>,
    /// When the last lost tail was noticed, by node: all partitions of a server lose theirs together.
    noticed: HashMap<u32, u64>,
    found: HashMap<u32, Found>,
}

/// What a noticed tail of a partition is, by the final read.
#[derive(Debug, Default)]
struct Found {
    /// The lowest id that went with it.
    first: Option<i64>,
    /// Ids that are gone although the partition went on behind them: no part of a tail.
    holes: Ranges,
}

fn node_of(partition: u32) -> u32 {
    partition / 100
}

impl Tails {
    /// Takes an announcement or a notice.
    pub(super) fn note(&mut self, record: &Record) {
        let partition = record.partition();
        if record.kind == Kind::TailNoticed {
            let last = self.noticed.entry(node_of(partition)).or_default();
            *last = record.time.max(*last);
        } else {
            let after = self.announced.entry(partition).or_insert(record.id);
            *after = record.id.min(*after);
        }
    }

    /// Looks up where the noticed ones begin. Costs nothing where there are none.
    pub(super) fn find(&mut self, history: &History, space: &Rc<Workspace<'_>>) -> Result<()> {
        if self.noticed.is_empty() {
            return Ok(());
        }
        let mut sorter = Sorter::new(space, 3);
        history.scan(|_, record| {
            let (Some(value), Some(class)) = (record.value(), class_of(record.kind)) else {
                return Ok(());
            };
            let is_noticed = self.noticed.contains_key(&node_of(record.partition()));
            if !is_noticed {
                return Ok(());
            }
            sorter.push([record.id.cast_unsigned(), class, value])
        })?;
        let (stored, pending) = (None, Ranges::default());
        let mut search = Search { found: &mut self.found, id: 0, stored, is_gone: false, pending };
        for row in sorter.sorted()? {
            let [id, class, value] = row?;
            search.take(id.cast_signed(), class, value);
        }
        search.close_id();
        search.close_day();
        Ok(())
    }

    /// Whether an id may have gone with a lost tail.
    pub(super) fn has(&self, partition: u32, id: i64) -> bool {
        let announced = self.announced.get(&partition).is_some_and(|after| id > *after);
        announced || self.found.get(&partition).is_some_and(|found| found.has(id))
    }

    /// Whether an acknowledged message may have gone with a lost tail. One that was sent after the last
    /// notice went otherwise.
    pub(super) fn took(&self, partition: u32, id: i64, sent_at: u64) -> bool {
        let is_in_time = self.announced.contains_key(&partition)
            || self.noticed.get(&node_of(partition)).is_some_and(|last| sent_at <= *last);
        is_in_time && self.has(partition, id)
    }

    /// Whether a partition's tail may be lost, cursors included.
    pub(super) fn may_lack(&self, partition: u32) -> bool {
        self.announced.contains_key(&partition) || self.noticed.contains_key(&node_of(partition))
    }
}

fn class_of(kind: Kind) -> Option<u64> {
    match kind {
        Kind::Stored => Some(STORED),
        Kind::Acknowledged | Kind::Delivered => Some(SEEN),
        _ => None,
    }
}

impl Found {
    fn has(&self, id: i64) -> bool {
        let at = id.cast_unsigned();
        let is_known = self.holes.len() <= MOST_HOLES;
        let is_hole = self.holes.covers(&(at..at + 1));
        is_known && !is_hole && self.first.is_some_and(|first| id >= first)
    }

    fn begin_at(&mut self, id: i64) {
        self.first = Some(self.first.map_or(id, |first| first.min(id)));
    }

    fn leave_out(&mut self, holes: &mut Ranges) {
        while let Some(range) = holes.pop_lowest() {
            if self.holes.len() <= MOST_HOLES {
                self.holes.insert(range);
            }
        }
    }
}

/// Goes through ids in order.
struct Search<'a> {
    found: &'a mut HashMap<u32, Found>,
    id: i64,
    stored: Option<u64>,
    is_gone: bool,
    /// Ids of the day that are gone and not used again, behind the last one that is stored.
    pending: Ranges,
}

impl Search<'_> {
    fn take(&mut self, id: i64, class: u64, value: u64) {
        if id != self.id {
            self.turn_to(id);
        }
        if class == STORED {
            self.stored = Some(value);
        } else {
            self.is_gone |= self.stored != Some(value);
        }
    }

    fn turn_to(&mut self, id: i64) {
        self.close_id();
        if id / IDS_OF_DAY != self.id / IDS_OF_DAY {
            self.close_day();
        }
        (self.id, self.stored, self.is_gone) = (id, None, false);
    }

    fn close_id(&mut self) {
        let (id, at) = (self.id, self.id.cast_unsigned());
        if self.stored.is_none() && self.is_gone {
            self.pending.insert(at..at + 1);
            if self.pending.len() > MOST_HOLES {
                self.pending.close_lowest_gap();
            }
        } else if self.stored.is_some() {
            let found = self.found.entry(partition_of(id)).or_default();
            found.leave_out(&mut self.pending);
            if self.is_gone {
                found.begin_at(id);
            }
        }
    }

    fn close_day(&mut self) {
        if let Some(lost) = self.pending.pop_lowest() {
            let first = lost.start.cast_signed();
            self.found.entry(partition_of(first)).or_default().begin_at(first);
        }
        self.pending = Ranges::default();
    }
}
