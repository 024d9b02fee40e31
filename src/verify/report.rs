//! What a check found.

use serde::Serialize;

use crate::id::{MessageId, PartitionId};
use crate::verify::event::Value;

/// The outcome of a check: counters, and examples of what is wrong.
///
/// Serializes to one flat JSON object (`lost_tails`, `work` and `anomalies` aside). Where nothing else is said, a
/// counter counts messages, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Values whose send returned an id.
    pub acknowledged: u64,
    /// Values that were certainly not stored, by their send's error.
    pub refused: u64,
    /// Values whose send ended in doubt, or has no outcome at all.
    pub unknown: u64,
    /// Of the unknown, those in the final read.
    pub unknown_found: u64,
    /// Of the unknown, those not in the final read. No violation.
    pub unknown_missing: u64,
    /// Messages of the final read, copies included.
    pub stored: u64,
    /// Deliveries to members of all groups, repeated ones included.
    pub delivered: u64,
    /// Deliveries of an id that its group had been delivered before. No violation by itself.
    pub redelivered: u64,
    /// Acquisitions of a partition by a member.
    pub holdings: u64,

    /// Violation: acknowledged values that are not in the final read. The sum of
    /// [`lost_write`](Self::lost_write) and [`lost_tail`](Self::lost_tail), and of `lost_prefix`,
    /// `lost_middle` and `lost_postfix`.
    pub lost: u64,
    /// Of the lost, those whose partition was read at or beyond their ids.
    pub lost_write: u64,
    /// Of the lost, those beyond the last message that was read in their partition.
    pub lost_tail: u64,
    /// Of the lost, those that their writer sent before all that it did not lose.
    pub lost_prefix: u64,
    /// Of the lost, those with others of their writer kept before and after them.
    pub lost_middle: u64,
    /// Of the lost, those that their writer sent after all that it did not lose.
    pub lost_postfix: u64,
    /// Violation: messages that a holding jumped over and did not come back to, although nobody in the
    /// group had acknowledged them. A holding begins at the first message of the partition, or where a
    /// seek or a committed cursor allows it.
    pub skipped: u64,
    /// Violation: acknowledged and stored messages beyond the last that a drained group was delivered
    /// in their partition; for each group.
    pub unseen: u64,
    /// Violation: the sum of `delivery_order`, `send_order` and `read_order`.
    pub out_of_order: u64,
    /// Of `out_of_order`: deliveries whose id is not above all ids delivered in their holding before.
    pub delivery_order: u64,
    /// Of `out_of_order`: messages stored below one that the same writer sent before them in the same
    /// lane to the same partition.
    pub send_order: u64,
    /// Of `out_of_order`: messages of the final read whose id is not above the one read before.
    pub read_order: u64,
    /// Violation: values that were stored or delivered although their send was refused, or nobody sent
    /// them.
    pub phantom: u64,
    /// Violation: values that were delivered but are not in the final read; without those that are
    /// lost or phantoms.
    pub vanished: u64,
    /// Violation: copies too many, of values stored under several ids without a mark.
    pub duplicated: u64,
    /// Further copies that their producer marked as possible duplicates. No violation.
    pub duplicated_marked: u64,
    /// Violation: ids that were seen with more than one value (in receipts, deliveries, final read).
    pub offset_reused: u64,
    /// Violation: values acknowledged or delivered under an id under which they are not stored, though
    /// they are under another.
    pub wrong_id: u64,
    /// Violation: values that were seen with more than one uid (unless they are duplicated).
    pub uid_changed: u64,
    /// Violation: deliveries and messages of the final read whose payload is damaged.
    pub corrupt: u64,
    /// Violation: deliveries, by a holding that commits a cursor later, of an id that another holding's
    /// confirmed commit covered, without a seek in between.
    pub redelivered_after_commit: u64,
    /// Violation: commits of a cursor beyond what the group was delivered, or over a message that none
    /// of its members acknowledged (the latter in groups that record acknowledgements).
    pub cursor_overrun: u64,
    /// Violation: commits below a cursor that had been confirmed when they were asked for, without a
    /// seek in between.
    pub cursor_regressed: u64,
    /// Violation: fencing tokens of a partition used by two members, and commits that a token got
    /// through though asked for after another token had taken over and committed.
    pub two_owners: u64,

    /// Acknowledged values that went with a lost tail that was announced. No violation.
    pub tail_lost: u64,
    /// Ids that were used again after a lost tail that was announced. No violation.
    pub tail_reused: u64,
    /// The tails that took acknowledged messages, one for each partition. No violation.
    pub lost_tails: Vec<LostTail>,
    /// Values that were delivered under an id before they were durable, and that their producer stored
    /// under another with the same uid, since the server lost the first. No violation: that id was not
    /// acknowledged to anybody.
    pub moved: u64,
    /// Sequence numbers that the final read lacks between two ids of one day. No violation by itself.
    pub holes: u64,
    /// Times that a set of acknowledgements had too many gaps to be kept, and skips may have gone
    /// unseen. No violation.
    pub weakened: u64,
    /// Milliseconds: the longer of `longest_send_stall_ms` and `longest_delivery_stall_ms`.
    pub longest_stall_ms: u64,
    /// Milliseconds: the longest time from a send (of all producers) or an acknowledgement to the next
    /// acknowledgement, while sends had been tried and none was acknowledged; at the latest to the last
    /// event of a producer.
    pub longest_send_stall_ms: u64,
    /// Milliseconds: the longest time from the send of a value without a lane (a message without a key) to
    /// its acknowledgement.
    pub longest_keyless_send_ms: u64,
    /// Milliseconds: the longest time from such a send until it, or a later one of its writer without a
    /// lane, was acknowledged; at the latest to the writer's last acknowledgement or send. Shorter than
    /// the one above where a message was stuck and those sent after it were not.
    pub longest_keyless_stall_ms: u64,
    /// Milliseconds: the longest time in which a group was delivered nothing of a partition that it had
    /// begun to read, and that held messages acknowledged and not delivered; at the latest to the end
    /// of producing and consuming.
    pub longest_delivery_stall_ms: u64,
    /// All violations.
    pub violations: u64,
    /// What the check itself took.
    pub work: Work,
    /// Examples of what is wrong (and of lost tails), a bounded number of each kind.
    pub anomalies: Vec<Anomaly>,
}

/// The end of a partition's log that a server lost, as by the promotion of an asynchronous standby.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LostTail {
    /// Where.
    pub partition: PartitionId,
    /// The first acknowledged message that is gone.
    pub from: MessageId,
    /// How many acknowledged messages are gone.
    pub acknowledged: u64,
}

/// What a check took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Work {
    /// Events of the history.
    pub events: u64,
    /// The most bytes that sort buffers took at a time.
    pub peak_buffer_bytes: usize,
    /// Bytes written to temporary files.
    pub spilled_bytes: u64,
    /// Sorted runs that were written.
    pub spilled_runs: u64,
}

/// A kind of finding; what each means is said at the counter of its name in [`Report`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AnomalyKind {
    /// See [`Report::lost`].
    Lost,
    /// See [`Report::tail_lost`]: no violation.
    TailLost,
    /// See [`Report::tail_reused`]: no violation.
    TailReused,
    /// See [`Report::skipped`].
    Skipped,
    /// See [`Report::unseen`].
    Unseen,
    /// See [`Report::delivery_order`].
    DeliveryOrder,
    /// See [`Report::send_order`].
    SendOrder,
    /// See [`Report::read_order`].
    ReadOrder,
    /// See [`Report::phantom`].
    Phantom,
    /// See [`Report::vanished`].
    Vanished,
    /// See [`Report::duplicated`].
    Duplicated,
    /// See [`Report::offset_reused`].
    OffsetReused,
    /// See [`Report::wrong_id`].
    WrongId,
    /// See [`Report::uid_changed`].
    UidChanged,
    /// See [`Report::corrupt`].
    Corrupt,
    /// See [`Report::redelivered_after_commit`].
    RedeliveredAfterCommit,
    /// See [`Report::cursor_overrun`].
    CursorOverrun,
    /// See [`Report::cursor_regressed`].
    CursorRegressed,
    /// See [`Report::two_owners`].
    TwoOwners,
}

impl AnomalyKind {
    /// Every kind.
    pub const ALL: [Self; 19] = [
        Self::Lost,
        Self::TailLost,
        Self::TailReused,
        Self::Skipped,
        Self::Unseen,
        Self::DeliveryOrder,
        Self::SendOrder,
        Self::ReadOrder,
        Self::Phantom,
        Self::Vanished,
        Self::Duplicated,
        Self::OffsetReused,
        Self::WrongId,
        Self::UidChanged,
        Self::Corrupt,
        Self::RedeliveredAfterCommit,
        Self::CursorOverrun,
        Self::CursorRegressed,
        Self::TwoOwners,
    ];

    /// Whether a finding of this kind breaks a promise.
    pub fn is_violation(self) -> bool {
        !matches!(self, Self::TailLost | Self::TailReused)
    }
}

/// An example of a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Anomaly {
    /// What it is.
    pub kind: AnomalyKind,
    /// Where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<PartitionId>,
    /// For which group, where one is concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<u16>,
    /// The ids concerned, a few at most; what they are says the text.
    pub ids: Vec<MessageId>,
    /// The values concerned, a few at most.
    pub values: Vec<Value>,
    /// Milliseconds since the history began, where it has a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    /// One sentence for people.
    pub text: String,
}

impl Report {
    /// The counter of a kind.
    pub fn count(&self, kind: AnomalyKind) -> u64 {
        // A copy of the numbers alone, so that there is one list of which counter is whose.
        let mut numbers = Self { anomalies: Vec::new(), ..self.clone() };
        *numbers.counter(kind)
    }

    pub(super) fn counter(&mut self, kind: AnomalyKind) -> &mut u64 {
        match kind {
            AnomalyKind::Lost => &mut self.lost,
            AnomalyKind::TailLost => &mut self.tail_lost,
            AnomalyKind::TailReused => &mut self.tail_reused,
            AnomalyKind::Skipped => &mut self.skipped,
            AnomalyKind::Unseen => &mut self.unseen,
            AnomalyKind::DeliveryOrder => &mut self.delivery_order,
            AnomalyKind::SendOrder => &mut self.send_order,
            AnomalyKind::ReadOrder => &mut self.read_order,
            AnomalyKind::Phantom => &mut self.phantom,
            AnomalyKind::Vanished => &mut self.vanished,
            AnomalyKind::Duplicated => &mut self.duplicated,
            AnomalyKind::OffsetReused => &mut self.offset_reused,
            AnomalyKind::WrongId => &mut self.wrong_id,
            AnomalyKind::UidChanged => &mut self.uid_changed,
            AnomalyKind::Corrupt => &mut self.corrupt,
            AnomalyKind::RedeliveredAfterCommit => &mut self.redelivered_after_commit,
            AnomalyKind::CursorOverrun => &mut self.cursor_overrun,
            AnomalyKind::CursorRegressed => &mut self.cursor_regressed,
            AnomalyKind::TwoOwners => &mut self.two_owners,
        }
    }

    /// Adds up what is the sum of others.
    pub(super) fn sum_up(&mut self) {
        self.out_of_order = self.delivery_order + self.send_order + self.read_order;
        self.longest_stall_ms = self.longest_send_stall_ms.max(self.longest_delivery_stall_ms);
        let violations = AnomalyKind::ALL.into_iter().filter(|k| k.is_violation());
        self.violations = violations.map(|kind| *self.counter(kind)).sum();
    }
}
