//! Measures the longest wait, in nanoseconds.

use crate::verify::record::Kind;

/// A wait that begins, ends, and is remembered if it was the longest.
#[derive(Debug, Default)]
pub(super) struct Wait {
    since: Option<u64>,
    longest: u64,
}

impl Wait {
    /// A wait begins, unless one is on.
    pub(super) fn begin(&mut self, time: u64) {
        self.since.get_or_insert(time);
    }

    /// It ends.
    pub(super) fn end(&mut self, time: u64) {
        if let Some(since) = self.since.take() {
            self.longest = self.longest.max(time.saturating_sub(since));
        }
    }

    /// The longest, if a wait that is on ends now.
    pub(super) fn longest_until(&self, time: u64) -> u64 {
        let current = self.since.map_or(0, |since| time.saturating_sub(since));
        self.longest.max(current)
    }
}

/// The wait of all producers for an acknowledgement.
///
/// A refusal does not end it: whoever is refused gets no service. So a pause of the producers
/// themselves counts as well, if the last that they heard was a refusal.
#[derive(Debug, Default)]
pub(super) struct Sends {
    wait: Wait,
    under_way: u64,
    last: u64,
}

impl Sends {
    pub(super) fn note(&mut self, kind: Kind, time: u64) {
        self.last = time;
        if kind == Kind::Sending {
            self.under_way += 1;
            self.wait.begin(time);
            return;
        }
        self.under_way = self.under_way.saturating_sub(1);
        if kind == Kind::Acknowledged {
            self.wait.end(time);
            if self.under_way > 0 {
                self.wait.begin(time);
            }
        }
    }

    /// The longest wait, up to the producers' last event.
    pub(super) fn longest(&self) -> u64 {
        self.wait.longest_until(self.last)
    }
}
