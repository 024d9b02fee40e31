//! Ids of messages that wait for their time.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::id::NodeId;

/// A message that waits for its time: the node that it waits on, and a number there. Written `01-123`, also
/// in JSON, since the number may exceed 2^53.
///
/// [`Cluster::cancel`](crate::Cluster::cancel) takes it back. When it is due it becomes a message with a
/// [`MessageId`](crate::MessageId) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScheduledId {
    /// The node that it waits on.
    pub node: NodeId,
    /// Its number there, from 1: what `shardmq.cancel` takes.
    pub number: i64,
}

impl fmt::Display for ScheduledId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.node, self.number)
    }
}

impl FromStr for ScheduledId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (node, number) = text.split_once('-')?;
            let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
            if !digits(node) || !digits(number) {
                return None;
            }
            let number = number.parse().ok().filter(|number| *number > 0)?;
            Some(Self { node: node.parse().ok()?, number })
        };
        parse().ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            Error::invalid(format!(
                "scheduled id {shown:?} is not of the form 01-123: node and number"
            ))
        })
    }
}

impl Serialize for ScheduledId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ScheduledId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_as_they_are_written() {
        let id = ScheduledId { node: NodeId::new(1).unwrap(), number: i64::MAX };
        assert_eq!(id.to_string(), "01-9223372036854775807");
        assert_eq!(id.to_string().parse::<ScheduledId>().unwrap(), id);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, "\"01-9223372036854775807\"");
        assert_eq!(serde_json::from_str::<ScheduledId>(&json).unwrap(), id);
        for text in ["", "1", "01-", "-1", "01-0", "00-1", "100-1", "01--1", "01-+1", "01-1x"] {
            assert!(text.parse::<ScheduledId>().is_err(), "{text}");
        }
    }
}
