//! Which messages of a topic a group wants.

use std::fmt;

use crate::error::{Error, Result};
use crate::message::RESERVED_HEADER_PREFIX;
use crate::store::fetch::Batch;

/// Chooses messages by their headers and keys, without a look at their payloads.
///
/// ```
/// use shardmq::Filter;
///
/// let paid_in_europe = Filter::header("kind", "paid").and(Filter::key_prefix("eu/"));
/// let either = paid_in_europe.or(Filter::header("urgent", "true"));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Filter(Rule);

#[derive(Clone, PartialEq, Eq)]
enum Rule {
    Header { name: String, value: String },
    KeyPrefix(String),
    All(Vec<Rule>),
    Any(Vec<Rule>),
}

impl Filter {
    /// Messages that have this header with exactly this value. A value that is no string, which only SQL
    /// can send, counts as its JSON text in the server's own form, such as `[1, 2]`.
    pub fn header(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self(Rule::Header { name: name.into(), value: value.into() })
    }

    /// Messages whose key begins so; the empty prefix is that of each key. Messages without a key have no
    /// prefix.
    pub fn key_prefix(prefix: impl Into<String>) -> Self {
        Self(Rule::KeyPrefix(prefix.into()))
    }

    /// Messages that both choose.
    pub fn and(self, other: Self) -> Self {
        Self(match self.0 {
            Rule::All(mut rules) => {
                rules.push(other.0);
                Rule::All(rules)
            }
            rule => Rule::All(vec![rule, other.0]),
        })
    }

    /// Messages that one of both chooses.
    pub fn or(self, other: Self) -> Self {
        Self(match self.0 {
            Rule::Any(mut rules) => {
                rules.push(other.0);
                Rule::Any(rules)
            }
            rule => Rule::Any(vec![rule, other.0]),
        })
    }

    /// Refuses what no message can have.
    pub(super) fn check(&self) -> Result<()> {
        self.0.check()
    }

    /// Whether it chooses the message of a row with this id.
    pub(super) fn takes(&self, row: &Batch, id: i64) -> bool {
        let Ok(index) = usize::try_from(id - row.base_id) else { return true };
        let key = || row.keys.as_ref().and_then(|keys| keys.element(index));
        // Read once at most, and only if a rule asks.
        let mut headers = None;
        let taken = self.0.takes(&key, &mut |name, value| {
            let headers = headers.get_or_insert_with(|| row.headers_of(index).ok());
            headers.iter().any(|headers| headers.get(name).is_some_and(|found| found == value))
        });
        // Nobody knows whether it is wanted: it must not be passed over unseen.
        let unknown = matches!(headers, Some(None));
        taken || unknown
    }
}

impl Rule {
    fn check(&self) -> Result<()> {
        match self {
            Self::Header { name, .. } if name.starts_with(RESERVED_HEADER_PREFIX) => {
                Err(Error::invalid(format!(
                    "filter: header {name:?} begins with {RESERVED_HEADER_PREFIX:?}, which is reserved"
                )))
            }
            Self::Header { .. } | Self::KeyPrefix(_) => Ok(()),
            Self::All(rules) | Self::Any(rules) => rules.iter().try_for_each(Self::check),
        }
    }

    fn takes<'a>(
        &self,
        key: &impl Fn() -> Option<&'a [u8]>,
        has_header: &mut dyn FnMut(&str, &str) -> bool,
    ) -> bool {
        match self {
            Self::Header { name, value } => has_header(name, value),
            Self::KeyPrefix(prefix) => key().is_some_and(|key| key.starts_with(prefix.as_bytes())),
            Self::All(rules) => rules.iter().all(|rule| rule.takes(key, has_header)),
            Self::Any(rules) => rules.iter().any(|rule| rule.takes(key, has_header)),
        }
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { name, value } => write!(f, "{name}={value:?}"),
            Self::KeyPrefix(prefix) => write!(f, "key {prefix:?}.."),
            Self::All(rules) => f.debug_set().entry(&"all").entries(rules).finish(),
            Self::Any(rules) => f.debug_set().entry(&"any").entries(rules).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(filter: &Filter, key: Option<&str>, headers: &[(&str, &str)]) -> bool {
        filter
            .0
            .takes(&|| key.map(str::as_bytes), &mut |name, value| headers.contains(&(name, value)))
    }

    #[test]
    fn rules_are_joined_as_said() {
        let paid = || Filter::header("kind", "paid");
        let europe = || Filter::key_prefix("eu/");
        let both = paid().and(europe());
        assert!(takes(&both, Some("eu/1"), &[("kind", "paid")]));
        assert!(!takes(&both, Some("us/1"), &[("kind", "paid")]));
        assert!(!takes(&both, Some("eu/1"), &[("kind", "sent")]));
        assert!(!takes(&both, None, &[("kind", "paid")]));
        let either = paid().or(europe());
        assert!(takes(&either, Some("eu/1"), &[]));
        assert!(takes(&either, None, &[("kind", "paid")]));
        assert!(!takes(&either, None, &[]));
        // What is added later is joined to all before it.
        let nested = paid().or(europe()).and(Filter::header("urgent", "true"));
        assert!(!takes(&nested, Some("eu/1"), &[]));
        assert!(takes(&nested, Some("eu/1"), &[("urgent", "true")]));
        let nested = paid().and(europe()).or(Filter::header("urgent", "true"));
        assert!(takes(&nested, None, &[("urgent", "true")]));
    }

    #[test]
    fn an_empty_prefix_is_that_of_each_key_and_of_no_message_without() {
        assert!(takes(&Filter::key_prefix(""), Some(""), &[]));
        assert!(!takes(&Filter::key_prefix(""), None, &[]));
    }

    #[test]
    fn reserved_headers_are_refused_wherever_they_stand() {
        let filter = Filter::key_prefix("a").or(Filter::header("shardmq.uid", "x"));
        assert!(filter.check().unwrap_err().to_string().contains("reserved"));
        assert!(Filter::header("kind", "paid").check().is_ok());
    }
}
