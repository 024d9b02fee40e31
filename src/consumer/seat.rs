//! How many partitions a consumer holds over all its nodes, against its even share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The seats of a consumer, as many as its even share of the partitions.
#[derive(Debug, Default)]
pub(crate) struct Seats {
    taken: AtomicUsize,
    occupied: AtomicUsize,
}

impl Seats {
    /// Takes seats up to the share, at most so many.
    pub(crate) fn take(self: &Arc<Self>, share: usize, most: usize) -> Vec<Seat> {
        let more = |taken: usize| {
            let room = share.saturating_sub(taken).min(most);
            (room > 0).then_some(taken + room)
        };
        let Ok(before) = self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) else {
            return Vec::new();
        };
        let seat = |_| Seat { seats: Arc::clone(self), taken: true, occupied: false };
        (0..share.saturating_sub(before).min(most)).map(seat).collect()
    }

    /// Seats of partitions that are owned.
    pub(crate) fn occupied(&self) -> usize {
        self.occupied.load(Ordering::Acquire)
    }
}

/// One partition's place in the count. Taken before the partition is, since other nodes' members do
/// the same at the same time, and free again when dropped, however that comes: the count can't drift.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    taken: bool,
    occupied: bool,
}

impl Seat {
    /// The partition is owned now.
    pub(crate) fn occupy(&mut self) {
        if !std::mem::replace(&mut self.occupied, true) {
            self.seats.occupied.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Frees the seat if more are taken than the share; says whether it did.
    pub(crate) fn free_above(&mut self, share: usize) -> bool {
        let fewer = |taken: usize| (taken > share).then(|| taken - 1);
        let freed = self.taken
            && self.seats.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, fewer).is_ok();
        self.taken &= !freed;
        freed
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken.fetch_sub(usize::from(self.taken), Ordering::AcqRel);
        self.seats.occupied.fetch_sub(usize::from(self.occupied), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_count_is_that_of_the_seats(steps in proptest::collection::vec((0_usize..9, 0_usize..9, 0_u8..4), 0..40)) {
            let all = Arc::new(Seats::default());
            let mut seats: Vec<Seat> = Vec::new();
            for (share, most, action) in steps {
                match action {
                    0 => seats.extend(all.take(share, most)),
                    1 => seats.retain_mut(|seat| !seat.free_above(share)),
                    2 => seats.iter_mut().take(most).for_each(Seat::occupy),
                    _ => seats.truncate(most),
                }
                prop_assert_eq!(all.taken.load(Ordering::Acquire), seats.len());
                prop_assert_eq!(all.occupied(), seats.iter().filter(|seat| seat.occupied).count());
                if action == 1 {
                    prop_assert!(seats.len() <= share);
                }
            }
        }
    }
}
