//! Why the hosts of an address did not take us.

use std::io;

use crate::error::{Error, ErrorKind};
use crate::store::connect::refused;

/// Why one host did not take us.
#[derive(Debug)]
pub(super) enum Failure {
    Unknown(io::Error),
    Silent,
    Refused(tokio_postgres::Error),
    /// It has an older primary than is known.
    Older(String),
}

impl Failure {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Unknown(error) => error.to_string(),
            Self::Silent => "no answer in time".to_owned(),
            Self::Refused(error) => crate::error::chain(error),
            Self::Older(why) => why.clone(),
        }
    }

    pub(super) fn into_error(self, what: &str) -> Error {
        match self {
            Self::Unknown(error) => Error::with_source(ErrorKind::Unavailable, what, error),
            Self::Silent => {
                let source = io::Error::new(io::ErrorKind::TimedOut, self.text());
                Error::with_source(ErrorKind::Unavailable, what, source)
            }
            Self::Refused(error) => refused(error, what),
            Self::Older(why) => Error::with_source(ErrorKind::Unavailable, what, why),
        }
    }
}

/// The failures of all hosts. That of one alone is the cause itself, those of several are told in
/// one text, of the kind of the last.
pub(super) fn error_of(mut failures: Vec<(String, Failure)>, what: &str) -> Error {
    let texts: Vec<String> =
        failures.iter().map(|(place, failure)| format!("{place}: {}", failure.text())).collect();
    match failures.pop() {
        Some((_, failure)) if failures.is_empty() => failure.into_error(what),
        Some((_, failure)) => {
            let kind = failure.into_error(what).kind();
            Error::with_source(kind, what, texts.join("; "))
        }
        None => Error::invalid(format!("{what}: the database URL names no host")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_several_hosts_are_all_told() {
        let silent = |name: &str| (name.to_owned(), Failure::Silent);
        let one = error_of(vec![silent("a:1")], "connect");
        assert_eq!(one.chain(), "connect: no answer in time");
        let two = error_of(vec![silent("a:1"), silent("b:2")], "connect");
        assert_eq!(two.chain(), "connect: a:1: no answer in time; b:2: no answer in time");
        assert!(two.is_transient());
        let older = ("a:1".to_owned(), Failure::Older("it is older".to_owned()));
        let with_older = error_of(vec![older, silent("b:2")], "connect");
        assert_eq!(with_older.chain(), "connect: a:1: it is older; b:2: no answer in time");
    }
}
