//! Rows that are kept in memory for some of their messages: it is the whole row that takes the room.

use std::collections::HashMap;

use uuid::Uuid;

use crate::consumer::delivery::Origin;
use crate::id::NodeId;

/// Rows that are kept: by how many messages, and their bytes.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    rows: HashMap<(Uuid, i64, bool), (usize, usize)>,
    bytes: HashMap<NodeId, usize>,
}

impl Pinned {
    pub(super) fn bytes(&self) -> usize {
        self.bytes.values().sum()
    }

    /// Of one node.
    pub(super) fn bytes_of(&self, node: NodeId) -> usize {
        self.bytes.get(&node).copied().unwrap_or(0)
    }

    /// How many bytes more it would be with a message of this row.
    pub(super) fn more(&self, origin: &Origin) -> usize {
        if self.rows.contains_key(&place(origin)) { 0 } else { origin.row.bytes }
    }

    /// A message of this row is kept.
    pub(super) fn pin(&mut self, origin: &Origin) {
        *self.bytes.entry(origin.holding.partition.node()).or_default() += self.more(origin);
        self.rows.entry(place(origin)).or_insert((0, origin.row.bytes)).0 += 1;
    }

    /// A message of this row is not kept any more.
    pub(super) fn unpin(&mut self, origin: &Origin) {
        let place = place(origin);
        if let Some((count, bytes)) = self.rows.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                let all = self.bytes.entry(origin.holding.partition.node()).or_default();
                *all = all.saturating_sub(*bytes);
                self.rows.remove(&place);
            }
        }
    }
}

fn place(origin: &Origin) -> (Uuid, i64, bool) {
    (origin.holding.owner(), origin.row.base_id, origin.parked.is_some())
}
