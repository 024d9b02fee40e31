//! Trouble that lasts is said when it begins, and now and then while it goes on.

use std::time::Duration;

use tokio::time::Instant;

/// When it was said last, if there is any.
#[derive(Debug)]
pub(crate) struct Trouble {
    remind: Duration,
    said: Option<Instant>,
}

impl Trouble {
    /// None yet; to be said so often.
    pub(crate) fn new(remind: Duration) -> Self {
        Self { remind, said: None }
    }

    /// There is trouble. True where that is to be said.
    pub(crate) fn meet(&mut self, now: Instant) -> bool {
        let due = self.said.is_none_or(|said| now.duration_since(said) >= self.remind);
        if due {
            self.said = Some(now);
        }
        due
    }

    /// All is well. True where there was trouble.
    pub(crate) fn end(&mut self) -> bool {
        self.said.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The seconds at which it is said, of trouble that is met each second.
    fn said(trouble: &mut Trouble, began: Instant, seconds: std::ops::Range<u32>) -> Vec<u32> {
        seconds.filter(|second| trouble.meet(began + *second * SECOND)).collect()
    }

    #[test]
    fn it_is_said_at_once_and_then_each_minute() {
        let (mut trouble, began) = (Trouble::new(60 * SECOND), Instant::now());
        assert_eq!(said(&mut trouble, began, 0..200), [0, 60, 120, 180]);
    }

    #[test]
    fn its_end_is_said_once_and_new_trouble_at_once() {
        let (mut trouble, began) = (Trouble::new(60 * SECOND), Instant::now());
        assert!(!trouble.end());
        assert_eq!(said(&mut trouble, began, 0..10), [0]);
        assert!(trouble.end() && !trouble.end());
        assert_eq!(said(&mut trouble, began, 10..100), [10, 70]);
    }
}
