//! What a member of the group saw: recorded in this process, or written as a line by one of its own.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardmq::verify::{Event, Holding, Recorder, Value};
use shardmq::{MessageId, PartitionId, Result, Uid};

/// The group in the history.
pub(super) const GROUP_NUMBER: u16 = 1;

/// Times are those of the history's clock. The recorder knows which member this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Seen {
    /// It was handed a message, and is about to acknowledge it.
    Taken {
        at: Duration,
        token: u64,
        id: MessageId,
        uid: Uid,
        /// A [`Value`] as a number; none where the payload is damaged.
        value: Option<u64>,
    },
    /// It was told that the partition's server has lost the end of its log.
    TailNoticed { at: Duration, partition: PartitionId },
    /// A commit was confirmed.
    Committed { at: Duration, token: u64, upto: MessageId, asked: Duration },
}

impl Seen {
    /// Whether a message was handed out.
    pub(super) fn is_delivery(&self) -> bool {
        matches!(self, Self::Taken { .. })
    }

    /// Records it as this member's.
    pub(super) fn record(self, member: u32, recorder: &mut Recorder) -> Result<()> {
        let holding = |token| Holding { group: GROUP_NUMBER, member, token };
        match self {
            Self::Taken { at, token, id, uid, value } => {
                let (holding, value) = (holding(token), value.map(Value::from_number));
                recorder.record(at, &Event::Delivered { holding, id, uid, value })?;
                recorder.record(at, &Event::Acked { holding, id })
            }
            Self::TailNoticed { at, partition } => {
                recorder.record(at, &Event::TailNoticed { partition })
            }
            Self::Committed { at, token, upto, asked } => {
                let holding = holding(token);
                recorder.record(at, &Event::CursorCommitted { holding, upto, asked })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_was_seen() {
        let id = "1010126112200000001".parse().unwrap();
        let uid = "0191e0a8-5d1c-7000-8000-000000000001:7:3".parse().unwrap();
        let (at, token) = (Duration::new(3, 123_456_789), u64::MAX);
        for seen in [
            Seen::Taken { at, token, id, uid, value: Some(u64::MAX) },
            Seen::Taken { at, token, id, uid, value: None },
            Seen::Committed { at, token, upto: id, asked: Duration::ZERO },
            Seen::TailNoticed { at, partition: id.partition() },
        ] {
            let line = serde_json::to_string(&seen).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Seen>(&line).unwrap(), seen);
        }
    }
}
