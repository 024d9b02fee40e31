//! Names of topics and groups.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// The most characters of a topic's or group's name.
pub const MAX_NAME_LEN: usize = 100;

/// Checks a name: `[a-z0-9][a-z0-9._-]{0,99}`.
fn check(what: &str, name: &str) -> Result<()> {
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-')
    };
    let starts_well = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if starts_well && name.len() <= MAX_NAME_LEN && name.bytes().all(allowed) {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    let dots = if shown.len() < name.len() { "..." } else { "" };
    Err(Error::invalid(format!(
        "{what} name {shown:?}{dots} is not 1 to {MAX_NAME_LEN} characters of a-z, 0-9, '.', '_' \
         and '-' that begin with a letter or digit"
    )))
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and takes a name: 1 to 100 characters of `a-z`, `0-9`, `.`, `_` and `-`, the
            /// first a letter or digit.
            pub fn new(name: &str) -> Result<Self> {
                check($what, name).map(|()| Self(name.into()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self> {
                Self::new(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(&String::deserialize(deserializer)?).map_err(D::Error::custom)
            }
        }
    };
}

name!(
    /// The name of a topic, a set of partitions. Cheap to clone.
    TopicName,
    "topic"
);
name!(
    /// The name of a group, a set of consumers that together see each message of a topic once. Cheap
    /// to clone.
    GroupName,
    "group"
);

/// Says which of the names that there are come nearest to one that there is not.
pub(crate) fn nearest(wanted: &str, mut names: Vec<String>) -> String {
    names.sort_by_key(|name| distance(name, wanted));
    names.truncate(3);
    match names.as_slice() {
        [] => "there is none yet".to_owned(),
        names => format!("the nearest are {}", names.join(", ")),
    }
}

/// How many letters must change to make one name of another (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_that_fit_the_pattern_are_taken(name in "[a-z0-9][a-z0-9._-]{0,99}") {
            let topic = TopicName::new(&name).unwrap();
            prop_assert_eq!(topic.as_str(), &name);
        }

        #[test]
        fn names_with_another_character_are_refused(name in "[a-z0-9]{0,3}[^a-z0-9._-][a-z]{0,3}") {
            prop_assert!(GroupName::new(&name).is_err());
        }
    }

    #[test]
    fn a_million_characters_are_refused_in_a_short_message() {
        let error = TopicName::new(&"x".repeat(1_000_000)).unwrap_err();
        assert!(error.to_string().len() < 250, "{error}");
        assert!(error.to_string().contains("100 characters"));
    }

    #[test]
    fn the_empty_name_and_a_leading_dot_are_refused() {
        assert!(TopicName::new("").is_err());
        assert!(TopicName::new(".a").is_err());
        assert!(TopicName::new(&"a".repeat(101)).is_err());
    }
}
