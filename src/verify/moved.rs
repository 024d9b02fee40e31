//! Messages that were delivered before they were durable, and stored again under other ids.
//!
//! Postgres shows a commit that waits for a standby as soon as the wait ends, also where a restart, a
//! termination or the death of the server ended it. A member may be delivered such a message. If the
//! standby is promoted without it, the producer, which has no answer yet, sends it again: another id,
//! the same uid. Nobody was promised the first id.

use std::collections::HashMap;

use crate::verify::ranges::Ranges;
use crate::verify::record::partition_of;

/// Ranges of ids that are kept for a partition.
const MOST_RANGES: usize = 10_000;

/// The ids under which such messages were delivered first.
#[derive(Debug, Default)]
pub(super) struct Moved(HashMap<u32, Ranges>);

impl Moved {
    /// Notes an id; says whether there was room for it.
    pub(super) fn note(&mut self, id: i64) -> bool {
        let (ranges, at) = (self.0.entry(partition_of(id)).or_default(), id.cast_unsigned());
        let has_room = ranges.len() < MOST_RANGES;
        if has_room {
            ranges.insert(at..at + 1);
        }
        has_room
    }

    /// Whether a message moved from this id.
    pub(super) fn from(&self, id: i64) -> bool {
        let at = id.cast_unsigned();
        self.0.get(&partition_of(id)).is_some_and(|ranges| ranges.covers(&(at..at + 1)))
    }
}
