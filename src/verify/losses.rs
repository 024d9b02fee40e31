//! Where among its writer's values a lost one is: before, between or after those that were kept.

use crate::verify::event::Value;
use crate::verify::report::Report;

/// Fed with the acknowledged values in order.
#[derive(Debug, Default)]
pub(super) struct Losses {
    writer: u16,
    /// Lost since the last that was kept.
    pending: u64,
    any_kept: bool,
}

impl Losses {
    pub(super) fn kept(&mut self, value: u64, report: &mut Report) {
        self.turn_to(value, report);
        let lost = std::mem::take(&mut self.pending);
        if self.any_kept {
            report.lost_middle += lost;
        } else {
            report.lost_prefix += lost;
        }
        self.any_kept = true;
    }

    pub(super) fn lost(&mut self, value: u64, report: &mut Report) {
        self.turn_to(value, report);
        self.pending += 1;
    }

    /// After the last value. A writer that lost everything lost a prefix.
    pub(super) fn finish(self, report: &mut Report) {
        if self.any_kept {
            report.lost_postfix += self.pending;
        } else {
            report.lost_prefix += self.pending;
        }
    }

    fn turn_to(&mut self, value: u64, report: &mut Report) {
        let writer = Value::from_number(value).writer();
        if writer != self.writer {
            std::mem::take(self).finish(report);
            self.writer = writer;
        }
    }
}
