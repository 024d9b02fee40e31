//! Which notifier a process has.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// Which notifier carries hints: a setting of the cluster, which a process may have otherwise.
///
/// Producers and consumers must have one in common: with none, messages come when consumers next look. So a
/// cluster moves from one to another by way of [`Both`](Self::Both).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotifierKind {
    /// `LISTEN/NOTIFY` on each node: nothing else to run. The default.
    #[default]
    Postgres,
    /// Pub/sub of a Redis, a Valkey, or what else speaks their protocol: where some hundred processes listen
    /// to a node, whose every notification wakes all of them.
    Redis,
    /// The two at once.
    Both,
    /// None: consumers look by themselves.
    None,
}

impl NotifierKind {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Postgres, "postgres"),
        (Self::Redis, "redis"),
        (Self::Both, "both"),
        (Self::None, "none"),
    ];

    /// Whether it needs a Redis.
    pub fn needs_redis(self) -> bool {
        matches!(self, Self::Redis | Self::Both)
    }
}

impl fmt::Display for NotifierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(kind, _)| kind == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for NotifierKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(kind, _)| *kind).ok_or_else(|| {
            let what = format!("{text:?} is no notifier: postgres, redis, both or none");
            Error::new(ErrorKind::Invalid, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (kind, name) in NotifierKind::ALL {
            assert_eq!(kind.to_string(), name);
            assert_eq!(name.parse::<NotifierKind>().unwrap(), kind);
        }
        assert_eq!("kafka".parse::<NotifierKind>().unwrap_err().kind(), ErrorKind::Invalid);
    }
}
