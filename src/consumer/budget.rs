//! How much may be fetched and not yet handed out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

/// Bytes that a consumer may have fetched ahead, over all its partitions.
///
/// Room is reserved before it is known how much a fetch brings, and a row may be larger than the whole
/// budget. What goes beyond is owed: nobody reserves until so much was handed out.
#[derive(Debug)]
pub(crate) struct Budget {
    size: usize,
    free: Semaphore,
    owed: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self { size, free: Semaphore::new(size), owed: AtomicUsize::new(0) })
    }

    /// Waits for the room of one fetch: a quarter of the budget, 1 MiB at most. Who came first goes
    /// first. Cancel safe.
    pub(crate) async fn reserve(self: &Arc<Self>) -> Room {
        let size = (self.size / 4).clamp(1, 1 << 20);
        let permits = u32::try_from(size).unwrap_or(u32::MAX);
        match self.free.acquire_many(permits).await {
            Ok(permit) => permit.forget(),
            Err(_) => unreachable!("it is never closed"),
        }
        Room { budget: Arc::clone(self), size }
    }

    /// Bytes that are fetched, or reserved, and not yet handed out.
    pub(crate) fn taken(&self) -> usize {
        let owed = self.owed.load(Ordering::Acquire);
        self.size.saturating_sub(self.free.available_permits()) + owed
    }

    fn borrow(&self, size: usize) {
        let found = self.free.forget_permits(size);
        self.owed.fetch_add(size - found, Ordering::AcqRel);
    }

    fn give(&self, size: usize) {
        let pay = |owed: usize| Some(owed.saturating_sub(size));
        let owed =
            self.owed.fetch_update(Ordering::AcqRel, Ordering::Acquire, pay).unwrap_or_default();
        self.free.add_permits(size.saturating_sub(owed));
    }
}

/// A part of the budget; free again when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    budget: Arc<Budget>,
    size: usize,
}

impl Room {
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Takes a part of it, and what it lacks from the budget, or beyond that.
    pub(crate) fn split(&mut self, size: usize) -> Self {
        let own = size.min(self.size);
        self.size -= own;
        self.budget.borrow(size - own);
        Self { budget: Arc::clone(&self.budget), size }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.budget.give(self.size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_row_larger_than_the_budget_holds_everyone_up_until_it_is_handed_out() {
        let budget = Budget::new(100);
        let row = budget.reserve().await.split(1_000);
        assert_eq!(budget.taken(), 1_000);
        assert!(budget.reserve().now_or_never().is_none());
        drop(row);
        assert_eq!(budget.taken(), 0);
        assert!(budget.reserve().now_or_never().is_some());
    }

    proptest! {
        #[test]
        fn what_was_taken_is_free_again_whatever_the_order(sizes: Vec<u16>, seed: u64) {
            let budget = Budget::new(1_000);
            let mut rows = Vec::new();
            for (nth, size) in sizes.iter().enumerate() {
                if let Some(mut room) = budget.reserve().now_or_never() {
                    rows.push(room.split(usize::from(*size)));
                }
                if seed >> (nth % 64) & 1 == 1 && !rows.is_empty() {
                    rows.swap_remove(nth % rows.len());
                }
                prop_assert_eq!(budget.taken(), rows.iter().map(Room::size).sum::<usize>());
            }
            rows.clear();
            prop_assert_eq!(budget.taken(), 0);
            prop_assert_eq!(budget.free.available_permits(), 1_000);
        }
    }
}
