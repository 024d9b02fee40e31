//! A task that is started when it is first needed, and again once it has ended, however it did.

use std::fmt;
use std::sync::{Arc, Mutex};

use super::channel::lock;

/// Whether it is under way.
#[derive(Debug, Default)]
pub(super) struct Task(Arc<Mutex<bool>>);

impl Task {
    /// Whoever gets a value starts the task and gives it that; none where it is under way. `lost` is called where
    /// the value is dropped otherwise than by [`Running::end_if`]: at a shutdown, or with its runtime.
    pub(super) fn start(&self, lost: impl FnOnce() + Send + 'static) -> Option<Running> {
        let first = !std::mem::replace(&mut *lock(&self.0), true);
        first.then(|| Running { under_way: Arc::clone(&self.0), lost: Some(Box::new(lost)) })
    }
}

/// A task that is under way. A runtime that ends drops it at once, also one that never ran.
pub(super) struct Running {
    under_way: Arc<Mutex<bool>>,
    lost: Option<Box<dyn FnOnce() + Send>>,
}

impl Running {
    /// Ends the task if it is done. Whoever has something for it first adds that, and then looks whether it is
    /// under way: nothing falls in between.
    pub(super) fn end_if(&mut self, is_done: impl FnOnce() -> bool) -> bool {
        let mut under_way = lock(&self.under_way);
        let done = is_done();
        if done {
            (*under_way, self.lost) = (false, None);
        }
        done
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(lost) = self.lost.take() {
            let mut under_way = lock(&self.under_way);
            *under_way = false;
            lost();
        }
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_is_under_way_until_it_ends_or_is_lost() {
        let (task, lost) = (Task::default(), Arc::new(AtomicUsize::new(0)));
        let start = || {
            let lost = Arc::clone(&lost);
            task.start(move || {
                lost.fetch_add(1, Ordering::SeqCst);
            })
        };
        let mut running = start().unwrap();
        assert!(start().is_none());
        assert!(!running.end_if(|| false));
        assert!(start().is_none());
        assert!(running.end_if(|| true));
        let next = start().unwrap();
        // The one that has ended says nothing any more, also of the next.
        drop(running);
        assert!(start().is_none());
        assert_eq!(lost.load(Ordering::SeqCst), 0);
        drop(next);
        assert_eq!(lost.load(Ordering::SeqCst), 1);
        assert!(start().is_some());
    }
}
