//! One error type with few kinds, each of which says what the caller should do.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use tokio_postgres::error::DbError;

use crate::id::PartitionId;

/// What the caller of a failed operation should do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The input is outside of a limit, or not what it must be. Nothing was sent. The caller should
    /// change the input; the message names the limit.
    Invalid,
    /// A topic, group, message or database object does not exist. The caller should create it, or
    /// correct the name.
    NotFound,
    /// Something of that name or number exists already, and is different. The caller should choose
    /// another, or use what is there.
    Conflict,
    /// A server can't be reached, or can't work now. Nothing was done, or something that does no harm when
    /// it is done again, such as a seek or a deletion. The caller may try again.
    Unavailable,
    /// The time allowed for an operation is over, and it was certainly not done; but acknowledgements may
    /// have been committed where a flush or a shutdown says this. The caller may try again.
    Timeout,
    /// The operation may have been done, or may still be: the connection failed after the request
    /// was sent, and the server could not be asked since. The caller should expect either.
    Unknown,
    /// A bounded thing is full: a buffer that was asked not to wait, or a partition that holds
    /// 99,999,999 messages of a day. The caller should slow down, or wait for midnight UTC.
    Full,
    /// The partition belongs to another consumer now. What was acknowledged here since is delivered
    /// there again. The caller should drop its work on that partition.
    LeaseLost,
    /// The group's position was moved by a seek. The caller should drop its work on messages
    /// received before.
    Reset,
    /// Messages were dropped by retention before this group had read them; the message says how many.
    /// Consuming goes on behind them. The caller should take note.
    Missed,
    /// Library and schema do not fit each other. The caller should run `shardmq migrate`, or a newer
    /// library; the message says which.
    Incompatible,
    /// The producer, consumer or cluster was shut down. The caller should stop using it.
    Closed,
    /// A payload is not what the codec expected. The caller should acknowledge the message or put it
    /// away: to receive it again does not help.
    Decode,
    /// The server refused a statement, for a reason that trying again does not cure. The caller
    /// should look at [`source`](StdError::source): rights, settings, disk.
    Database,
}

/// The error of all of `ShardMQ`: a [kind](ErrorKind), what was being done, and the cause.
///
/// `Display` says what was being done and never repeats the cause; [`Error::chain`] prints both.
/// Cheap to clone: all messages of a failed batch share one.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    lost_tail: Option<PartitionId>,
}

/// All connections of a pool, so many, are in use by this process.
#[derive(Debug, thiserror::Error)]
#[error("all {0} connections of this process are in use")]
pub(crate) struct InUse(pub(crate) usize);

/// A [`Result`](std::result::Result) whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of this kind. The message is lower case and says what was being done.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: None, lost_tail: None }))
    }

    /// An error with a cause. Where the cause is a server's answer whose detail may quote a message, its
    /// words without the detail are kept in place of it.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        let (message, source) = (message.into(), Some(without_contents(source.into())));
        Self(Arc::new(Inner { kind, message, source, lost_tail: None }))
    }

    /// The news that the server of a partition lacks the end of its log.
    pub(crate) fn of_lost_tail(partition: PartitionId, message: impl Into<String>) -> Self {
        let (kind, message) = (ErrorKind::LeaseLost, message.into());
        Self(Arc::new(Inner { kind, message, source: None, lost_tail: Some(partition) }))
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn closed(what: &str) -> Self {
        Self::new(ErrorKind::Closed, format!("{what} was shut down"))
    }

    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The partition whose server has lost the end of its log, where this is the news of that: a
    /// consumer had read messages that are not there any more, as after the promotion of an asynchronous
    /// standby.
    pub fn lost_tail(&self) -> Option<PartitionId> {
        self.0.lost_tail
    }

    /// Whether the same call may succeed later without any change to it.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::Unknown | ErrorKind::Full
        )
    }

    /// Whether there was no free connection: all are in use by this process itself, which says nothing about
    /// the server.
    pub(crate) fn is_own_pool(&self) -> bool {
        self.0.source.as_ref().is_some_and(|source| source.is::<InUse>())
    }

    /// The message and those of all its causes, joined by `": "`.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// The texts of an error and all its causes, joined by `": "`. (`tokio_postgres` displays only "db
/// error" and keeps the server's words in the source.) No text quotes a message: see [`words`].
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = words(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let words = words(cause);
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

/// An error's own text. The detail of a server's answer is left out where it may quote a row: "Failing row
/// contains (..)" shows keys, headers and the beginnings of payloads to everybody who reads a log.
fn words(error: &(dyn StdError + 'static)) -> String {
    match error.downcast_ref::<DbError>() {
        Some(answer) if may_quote_rows(answer) => {
            let hint = answer.hint().map(|hint| format!("\nHINT: {hint}")).unwrap_or_default();
            format!("{}: {}{hint}", answer.severity(), answer.message())
        }
        _ => error.to_string(),
    }
}

/// Whether a server's answer has a detail that may quote a row. The classes of errors that are listed are
/// about connections, rights, locks, resources and the names in statements.
fn may_quote_rows(answer: &DbError) -> bool {
    const ABOUT_NO_ROW: [&str; 11] =
        ["08", "0A", "25", "28", "3D", "40", "42", "53", "55", "57", "58"];
    let class = answer.code().code().get(..2).unwrap_or_default();
    answer.detail().is_some() && !ABOUT_NO_ROW.contains(&class)
}

/// The same cause, or its words where one of its own causes may quote a row: whoever prints all causes of
/// an error shows no message.
fn without_contents(source: Box<dyn StdError + Send + Sync>) -> Box<dyn StdError + Send + Sync> {
    let first: &(dyn StdError + 'static) = &*source;
    let mut causes = std::iter::successors(Some(first), |cause| (*cause).source());
    let quotes = |cause: &(dyn StdError + 'static)| {
        cause.downcast_ref::<DbError>().is_some_and(may_quote_rows)
    };
    if causes.any(quotes) { chain(first).into() } else { source }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.chain())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_says_what_was_done_and_chain_adds_the_cause() {
        let cause = std::io::Error::other("connection refused");
        let error = Error::with_source(ErrorKind::Unavailable, "connect to node 01", cause);
        assert_eq!(error.to_string(), "connect to node 01");
        assert_eq!(error.chain(), "connect to node 01: connection refused");
        assert_eq!(format!("{error:?}"), "Unavailable: connect to node 01: connection refused");
        assert!(error.is_transient());
    }
}
