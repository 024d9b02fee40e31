//! The temporary folder of one server.

use std::fmt;
use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;

use super::account::{self, Account};
use super::{blocking, failed};
use crate::{Error, Result};

/// A socket's address has 104 bytes on macOS and 108 on Linux. The folder's name and the socket's
/// take 40 of them: `/shardmq-pg-XXXXXX/run/.s.PGSQL.65535`.
const LONGEST_BASE: usize = 60;

/// The server works in `data`, `run` has the socket of a Postgres, and `server.log` is what the server
/// says.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) base: PathBuf,
    pub(super) log: Log,
    dir: TempDir,
    account: Account,
}

impl Folder {
    /// Makes the folder. It is removed on drop, unless that was [left](Self::leave) to another.
    pub(super) async fn create(account: Account, prefix: &'static str) -> Result<Self> {
        blocking(move || {
            let base = base(account);
            let dir = tempfile::Builder::new()
                .prefix(prefix)
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(&base)
                .map_err(failed(format!("make a folder in {}", base.display())))?;
            let log = Log::create(dir.path(), account)?;
            Ok(Self { base, log, dir, account })
        })
        .await
    }

    /// Leaves it to another to remove the folder.
    pub(super) fn leave(&mut self) {
        self.dir.disable_cleanup(true);
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    pub(super) fn run(&self) -> PathBuf {
        self.path().join("run")
    }

    /// Writes a file into `data`, in place of one of that name.
    pub(super) async fn put(&self, file: &DataFile) -> Result<()> {
        self.write(&self.data().join(&file.name), &file.text).await
    }

    /// Writes a file that only the account may read.
    pub(super) async fn write(&self, path: &Path, text: &str) -> Result<()> {
        let command = self.account.shell("umask 077; cat >\"$1\"", &[path]);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let doing = format!("write {name} for the embedded server");
        account::run(command, text, &doing).await.map(drop)
    }

    pub(super) async fn append(&self, path: &Path, text: &str) -> Result<()> {
        let command = self.account.shell("cat >>\"$1\"", &[path]);
        account::run(command, text, "write into the embedded server's folder").await.map(drop)
    }
}

/// A file for the folder `data`. What is in it may be a secret.
#[derive(Clone)]
pub(super) struct DataFile {
    pub(super) name: String,
    pub(super) text: String,
}

impl DataFile {
    /// Refuses what would lie elsewhere, and the names of files that the server keeps for itself.
    pub(super) fn check(&self, reserved: &[&str]) -> Result<()> {
        let name = &*self.name;
        let good = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(good) {
            return Err(Error::invalid(format!(
                "{name:?} is not the name of a file for the server"
            )));
        }
        if reserved.contains(&name) {
            return Err(Error::invalid(format!("the embedded server keeps {name} for itself")));
        }
        Ok(())
    }
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataFile").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The server's log. Held open, so that it can be read to the last, also when the folder is gone.
#[derive(Debug)]
pub(super) struct Log(File);

impl Log {
    /// Makes the log in a folder that is still ours, then gives both to the account.
    fn create(folder: &Path, account: Account) -> Result<Self> {
        let create = || {
            let mut options = File::options();
            let file =
                options.read(true).append(true).create_new(true).open(folder.join("server.log"))?;
            if let Some(gid) = account.group {
                fchown(&file, Some(account.uid), Some(gid))?;
                chown(folder, Some(account.uid), Some(gid))?;
            }
            Ok(file)
        };
        create().map(Self).map_err(failed("make the log of the embedded server"))
    }

    pub(super) fn stdio(&self) -> Result<Stdio> {
        self.0.try_clone().map(Stdio::from).map_err(failed("open the log of the embedded server"))
    }

    pub(super) fn len(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len())
    }

    /// The text from this byte on.
    pub(super) fn text(&self, from: u64) -> String {
        let mut text = Vec::new();
        let mut chunk = [0; 16 * 1024];
        let mut at = from;
        while let Ok(length @ 1..) = self.0.read_at(&mut chunk, at) {
            text.extend_from_slice(&chunk[..length]);
            at += length as u64;
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// The folder for temporary files, unless its name is too long for a socket's address or not a text
/// that a configuration file can hold, or the account could not work there.
fn base(account: Account) -> PathBuf {
    let fits = |path: &PathBuf| {
        path.to_str().is_some_and(|text| text.len() <= LONGEST_BASE) && may_work_in(account, path)
    };
    let preferred = std::path::absolute(std::env::temp_dir()).ok();
    preferred.filter(fits).unwrap_or_else(|| PathBuf::from("/tmp"))
}

/// An account other than our own has only the rights of everybody.
fn may_work_in(account: Account, path: &Path) -> bool {
    let rights = |path: &Path| path.metadata().map_or(0, |meta| meta.permissions().mode());
    account.group.is_none()
        || rights(path) & 0o003 == 0o003 && path.ancestors().all(|up| rights(up) & 0o001 == 0o001)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_account_can_not_work_in_a_folder_of_ours() {
        let dir = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in("/tmp")
            .unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        std::fs::set_permissions(&inner, Permissions::from_mode(0o777)).unwrap();
        assert!(may_work_in(Account { uid: 1, group: None }, &inner));
        assert!(!may_work_in(Account { uid: 1, group: Some(1) }, &inner));
        assert!(may_work_in(Account { uid: 1, group: Some(1) }, Path::new("/tmp")));
    }

    #[test]
    fn the_longest_base_leaves_room_for_the_socket() {
        let name = "/shardmq-pg-XXXXXX/run/.s.PGSQL.65535";
        assert!(LONGEST_BASE + name.len() < 100);
    }
}
