//! What is recorded: values, holdings and events.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use crate::id::{MessageId, PartitionId, Uid};

/// The bits of a [`Value`] that count.
const COUNTER_BITS: u32 = 48;

/// What one message of a workload carries: unique in the history. Written `writer-counter`.
///
/// A writer is one producer instance. Its counter rises with each message, so that values say in which
/// order a writer sent them, and whether the first, the middle or the last of them are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(u64);

impl Value {
    /// The value of this writer and count; a counter of 2^48 or more is refused.
    pub fn new(writer: u16, counter: u64) -> Result<Self> {
        if counter >> COUNTER_BITS == 0 {
            Ok(Self(u64::from(writer) << COUNTER_BITS | counter))
        } else {
            Err(Error::invalid(format!(
                "counter {counter} of a value is not below 2^{COUNTER_BITS}"
            )))
        }
    }

    /// The value of a number that [`number`](Self::number) gave; every number is one.
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// As one number: values of a writer are ordered as they were sent.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The producer instance that sends it.
    pub fn writer(self) -> u16 {
        u16::try_from(self.0 >> COUNTER_BITS).unwrap_or(u16::MAX)
    }

    /// Its place among the values of its writer.
    pub fn counter(self) -> u64 {
        self.0 & ((1 << COUNTER_BITS) - 1)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.writer(), self.counter())
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One acquisition of a partition by a member of a group, from taking it to losing it.
///
/// The token stands for the fence, the whole of it: it MUST change with every acquisition and with
/// every seek (the hash of owner, epoch and reset epoch will do). It need not differ between
/// partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holding {
    /// The group, numbered by the workload.
    pub group: u16,
    /// The member, numbered by the workload; a member that was started again is another.
    pub member: u32,
    /// The fencing token.
    pub token: u64,
}

/// One thing that happened to a worker. What MUST be recorded *before* the call and what after it is
/// said at each: the checker relies on it, and accuses nobody where calls overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A producer is about to send. Recorded before the call.
    Sending {
        /// What it sends.
        value: Value,
        /// Messages of one writer and lane (its key, say) claim to be stored in the order of their
        /// counters. None claims nothing.
        lane: Option<u64>,
    },
    /// A send returned an id. This and the other outcomes are recorded after the call.
    Acknowledged {
        /// What was sent.
        value: Value,
        /// Where the receipt says that it is.
        id: MessageId,
    },
    /// A send failed, and the message is certainly not stored.
    Refused {
        /// What was not sent.
        value: Value,
    },
    /// A send failed, and the message may be stored. So it is for a send without any outcome.
    Unknown {
        /// What may be there.
        value: Value,
    },
    /// A member was told that it owns a partition. Recorded after.
    Owned {
        /// Its acquisition.
        holding: Holding,
        /// What it owns.
        partition: PartitionId,
    },
    /// A member was told that it lost a partition, or gave it back. Recorded after.
    Lost {
        /// The acquisition that ended.
        holding: Holding,
        /// What it owned.
        partition: PartitionId,
    },
    /// A member was handed a message. Recorded before it does anything with it.
    Delivered {
        /// Under which acquisition.
        holding: Holding,
        /// Where the message is.
        id: MessageId,
        /// The identity that came with it.
        uid: Uid,
        /// What it carries; none where the payload is damaged.
        value: Option<Value>,
    },
    /// A member is about to acknowledge a message, or to put it away for good. Recorded before the
    /// call.
    Acked {
        /// Under which acquisition.
        holding: Holding,
        /// Which message.
        id: MessageId,
    },
    /// The commit of a cursor was confirmed. Recorded after; commits that nobody saw may be left out.
    CursorCommitted {
        /// The acquisition whose fence it passed.
        holding: Holding,
        /// The cursor: every message up to here is finished.
        upto: MessageId,
        /// When it was asked for, on the clock of the history. Where it may have been committed before it
        /// was asked for, and nobody knows when: the earliest time, that of the last acknowledgement.
        asked: Duration,
    },
    /// A group's position is about to be moved, or the group begins elsewhere than at the first
    /// message. Recorded before the call.
    SeekStarted {
        /// The group.
        group: u16,
        /// Where it is moved.
        partition: PartitionId,
        /// The next message; none where that is not known: no skip is claimed there from then on.
        to: Option<MessageId>,
    },
    /// The move was confirmed. Recorded after; without it the move is not settled to the end.
    SeekDone {
        /// The group.
        group: u16,
        /// Where it was moved.
        partition: PartitionId,
    },
    /// A group had the time to get everything that was acknowledged in a partition. Recorded when its
    /// members have stopped.
    Drained {
        /// The group.
        group: u16,
        /// What it should have read to the end.
        partition: PartitionId,
    },
    /// A message of the final read: of everything, by fresh clients, when all else has ended. In order
    /// of ids, each partition by one recorder.
    Stored {
        /// Where it is.
        id: MessageId,
        /// Its identity.
        uid: Uid,
        /// What it carries; none where the payload is damaged.
        value: Option<Value>,
        /// Whether its producer marked it as possibly stored twice.
        marked_duplicate: bool,
    },
    /// A standby is about to be promoted that may lack the end of a partition, cursors included. What
    /// that may cost is forgiven there. Holdings end with it: one from before may still hand out what
    /// it had fetched, but reads nothing that the new server stores.
    TailLost {
        /// The partition.
        partition: PartitionId,
        /// The last message that is certainly kept; none forgives the whole partition.
        after: Option<MessageId>,
    },
    /// A client noticed that a partition's server has lost the end of its log. Recorded after.
    ///
    /// That counts for all partitions of the node. The final read shows what each has lost: ids that
    /// are used again, or that nothing follows in their day. A message that is missing between others
    /// is a violation all the same, and so is one that was sent after the last notice.
    TailNoticed {
        /// The partition.
        partition: PartitionId,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_ordered_by_writer_and_counter_and_bounded() {
        let value = Value::new(3, 17).unwrap();
        assert_eq!((value.writer(), value.counter()), (3, 17));
        assert_eq!(value.to_string(), "3-17");
        assert_eq!(Value::from_number(value.number()), value);
        assert!(value < Value::new(3, 18).unwrap());
        assert!(Value::new(3, (1 << 48) - 1).unwrap() < Value::new(4, 0).unwrap());
        assert!(Value::new(3, 1 << 48).is_err());
    }
}
