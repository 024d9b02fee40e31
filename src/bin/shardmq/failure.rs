//! Why a command ended early, and the exit code that says so.

use std::io::{self, ErrorKind as IoKind};
use std::process::ExitCode;

use shardmq::{Error, ErrorKind};

use crate::output::note;

/// Why a command did not do all that it was asked to.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Whoever read our output has gone: no error, and nothing more to do.
    ReaderGone,
    /// Something was refused or failed.
    Error { code: u8, text: String },
    /// Something failed that was reported already, such as single lines.
    Reported,
}

/// The operation failed.
pub(crate) const FAILED: u8 = 1;
/// Wrong arguments.
pub(crate) const USAGE: u8 = 2;
/// A check could not be brought to its end.
pub(crate) const UNFINISHED: u8 = 2;
/// Something named does not exist.
pub(crate) const NOT_FOUND: u8 = 3;
/// A check found nothing wrong but ends of logs that servers lost.
pub(crate) const TAIL_LOST: u8 = 5;
/// A server did not answer.
pub(crate) const UNAVAILABLE: u8 = 4;

impl Failure {
    /// With an exit code and the words after `error: `.
    pub(crate) fn new(code: u8, text: impl Into<String>) -> Self {
        let text = text.into();
        Self::Error { code, text }
    }

    /// Of a check that it kept from ending, whatever the reason.
    pub(crate) fn unfinished(self) -> Self {
        match self {
            Self::Error { text, .. } => Self::Error { code: UNFINISHED, text },
            other => other,
        }
    }

    /// Says on stderr what is to be said.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Self::ReaderGone => ExitCode::SUCCESS,
            Self::Reported => ExitCode::from(FAILED),
            Self::Error { code, text } => {
                note(&format!("error: {text}"));
                ExitCode::from(*code)
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::Invalid => USAGE,
            ErrorKind::NotFound => NOT_FOUND,
            ErrorKind::Unavailable | ErrorKind::Timeout => UNAVAILABLE,
            _ => FAILED,
        };
        Self::new(code, error.chain())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == IoKind::BrokenPipe {
            Self::ReaderGone
        } else {
            Self::new(FAILED, error.to_string())
        }
    }
}
