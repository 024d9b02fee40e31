//! The folder of a journal, and the lock that says who has it.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::name::{GroupName, TopicName};

/// Held from the beginning of a consumer to its end. The kernel lets go of it when the process dies:
/// whoever gets it knows that the one before writes no more.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    lock: Mutex<Option<File>>,
}

impl Folder {
    /// Makes the folder where it is missing, and locks it.
    pub(super) fn lock(
        directory: &Path,
        cluster: Uuid,
        topic: &TopicName,
        group: &GroupName,
    ) -> Result<Self> {
        // No name has a plus.
        let path = directory.join(format!("{cluster}+{topic}+{group}"));
        let unusable = |cause| unusable(&path, cause);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(unusable)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, lock: Mutex::new(Some(lock)) }),
            Err(TryLockError::WouldBlock) => {
                let shown = path.display();
                let what = format!("the journal {shown} is another living consumer's");
                Err(Error::new(ErrorKind::Conflict, what))
            }
            Err(TryLockError::Error(cause)) => Err(unusable(cause)),
        }
    }

    /// Lets go of it. Idempotent.
    pub(super) fn unlock(&self) {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        // By name: a child that is being started has a copy of the handle, and would keep the lock.
        let _ = lock.map(|lock| lock.unlock());
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.unlock();
    }
}

pub(super) fn unusable(path: &Path, cause: std::io::Error) -> Error {
    let what = format!("use the journal {}", path.display());
    Error::with_source(ErrorKind::Invalid, what, cause)
}
