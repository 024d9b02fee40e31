//! How many partitions a consumer holds over all its nodes, against its even share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One partition's place in the count. Taken before the partition is, since other nodes' members do
/// the same at the same time, and free again when dropped, however that comes: the count can't drift.
#[derive(Debug)]
pub(crate) struct Seat {
    held: Arc<AtomicUsize>,
    taken: bool,
}

impl Seat {
    /// Takes seats up to the share, at most so many.
    pub(crate) fn take(held: &Arc<AtomicUsize>, share: usize, most: usize) -> Vec<Self> {
        let more = |held: usize| {
            let room = share.saturating_sub(held).min(most);
            (room > 0).then_some(held + room)
        };
        let Ok(before) = held.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) else {
            return Vec::new();
        };
        let seat = |_| Self { held: Arc::clone(held), taken: true };
        (0..share.saturating_sub(before).min(most)).map(seat).collect()
    }

    /// Frees the seat if more are taken than the share; says whether it did.
    pub(crate) fn free_above(&mut self, share: usize) -> bool {
        let fewer = |held: usize| (held > share).then(|| held - 1);
        let freed = self.taken
            && self.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, fewer).is_ok();
        self.taken &= !freed;
        freed
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.taken {
            self.held.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_count_is_that_of_the_seats(steps in proptest::collection::vec((0_usize..9, 0_usize..9, 0_u8..3), 0..40)) {
            let held = Arc::new(AtomicUsize::new(0));
            let mut seats: Vec<Seat> = Vec::new();
            for (share, most, action) in steps {
                match action {
                    0 => seats.extend(Seat::take(&held, share, most)),
                    1 => seats.retain_mut(|seat| !seat.free_above(share)),
                    _ => seats.truncate(most),
                }
                prop_assert_eq!(held.load(Ordering::Acquire), seats.len());
                if action == 1 {
                    prop_assert!(seats.len() <= share);
                }
            }
        }
    }
}
