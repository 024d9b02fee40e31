//! Finds the programs of Postgres.

use std::cmp::Reverse;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::failed;
use crate::{Error, ErrorKind, Result};

const VARIABLE: &str = "SHARDMQ_PG_BIN";
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];
const HOW_TO_INSTALL: &str = "found no Postgres server programs (postgres, initdb and pg_ctl in one \
    folder): on Debian or Ubuntu install them with `apt-get install postgresql`, on macOS with \
    `brew install postgresql`, or set SHARDMQ_PG_BIN to their folder";

/// A folder that holds `postgres`, `initdb` and `pg_ctl`, all of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    dir: PathBuf,
    version: String,
    major: u32,
}

impl Binaries {
    /// Finds the programs on this machine. Looks into, in this order, and takes the first folder
    /// that has all three:
    ///
    /// 1. the environment variable `SHARDMQ_PG_BIN`; when it is set, nothing else is tried,
    /// 2. what `pg_config --bindir` says,
    /// 3. `/usr/lib/postgresql/*/bin`, the newest first,
    /// 4. Homebrew's folders, the newest first,
    /// 5. the folders of `PATH`.
    ///
    /// Blocks for some milliseconds, since it runs `pg_config` and `postgres --version`.
    ///
    /// [`ErrorKind::NotFound`] when there are none, or when `SHARDMQ_PG_BIN` is wrong.
    pub fn find() -> Result<Self> {
        match std::env::var_os(VARIABLE) {
            Some(dir) => Self::in_variable(dir),
            None => Self::first_of(candidates()),
        }
    }

    /// The programs in this folder. Blocks for some milliseconds, since it runs `postgres
    /// --version`.
    ///
    /// [`ErrorKind::NotFound`] when one of the three is missing or can't be executed,
    /// [`ErrorKind::Unavailable`] when `postgres` can't be run, [`ErrorKind::Incompatible`] when it
    /// does not say a version.
    pub fn in_dir(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // The children work in another folder than we do.
        let dir = std::path::absolute(path)
            .map_err(failed(format!("look for Postgres in {}", path.display())))?;
        let missing: Vec<_> =
            PROGRAMS.into_iter().filter(|name| !is_executable(&dir.join(name))).collect();
        if !missing.is_empty() {
            let text = format!("{} has no {}", dir.display(), missing.join(", no "));
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let version = version_of(&dir.join("postgres"))?;
        let major = major_of(&version).ok_or_else(|| {
            let text = format!("{} is not a Postgres of a known kind: {version}", dir.display());
            Error::new(ErrorKind::Incompatible, text)
        })?;
        Ok(Self { dir, version, major })
    }

    /// The major version, such as 17.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `postgres --version` says.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn in_variable(dir: OsString) -> Result<Self> {
        Self::in_dir(PathBuf::from(dir)).map_err(|cause| {
            let text = format!("{VARIABLE} is not the folder of the Postgres server programs");
            Error::with_source(ErrorKind::NotFound, text, cause)
        })
    }

    /// A folder whose programs don't run (made for another machine, say) is no reason to give up.
    fn first_of(candidates: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let found = candidates.into_iter().find_map(|dir| Self::in_dir(dir).ok());
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, HOW_TO_INSTALL))
    }
}

/// All folders to try, the best first. Lazy, so that nothing is run or read in vain.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    std::iter::once_with(of_pg_config)
        .flatten()
        .chain(std::iter::once_with(|| newest_first("/usr/lib/postgresql", "")).flatten())
        .chain(std::iter::once_with(|| newest_first("/opt/homebrew/opt", "postgresql")).flatten())
        .chain(std::iter::once_with(|| newest_first("/usr/local/opt", "postgresql")).flatten())
        .chain(folders)
}

fn of_pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let dir = String::from_utf8(output.stdout).ok()?;
    let dir = dir.trim();
    (output.status.success() && !dir.is_empty()).then(|| PathBuf::from(dir))
}

/// The `bin` folders of all versions that are installed side by side under `parent`, in folders
/// whose names begin with `prefix` and end with the version.
fn newest_first(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches('@');
            Some((leading_number(version).unwrap_or(0), entry.path().join("bin")))
        })
        .collect();
    found.sort_by_key(|(version, _)| Reverse(*version));
    found.into_iter().map(|(_, dir)| dir).collect()
}

pub(super) fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn version_of(postgres: &Path) -> Result<String> {
    let output = Command::new(postgres)
        .arg("--version")
        .output()
        .map_err(failed(format!("run {} --version", postgres.display())))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Of `postgres (PostgreSQL) 17.2 (Debian 17.2-1)`, or `... 18beta1`.
fn major_of(version: &str) -> Option<u32> {
    let (_, number) = version.split_once("(PostgreSQL) ")?;
    leading_number(number)
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_variable_is_an_error_that_names_it_and_the_folder() {
        let error = Binaries::in_variable("/no/such/folder".into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(
            error.chain(),
            "SHARDMQ_PG_BIN is not the folder of the Postgres server programs: /no/such/folder \
             has no postgres, no initdb, no pg_ctl"
        );
    }

    #[test]
    fn no_binaries_anywhere_is_an_error_that_says_how_to_install_them() {
        let error = Binaries::first_of([PathBuf::from("/no/such/folder")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        for words in ["apt-get install postgresql", "brew install postgresql", VARIABLE] {
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_folder_counts_only_with_all_three_programs() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["postgres", "initdb"] {
            let path = dir.path().join(name);
            std::fs::write(&path, "#!/bin/sh\necho 'postgres (PostgreSQL) 99devel'\n").unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        std::fs::write(dir.path().join("pg_ctl"), "not executable").unwrap();
        let error = Binaries::in_dir(dir.path()).unwrap_err();
        assert!(error.to_string().ends_with("has no pg_ctl"), "{error}");
    }

    #[test]
    fn majors_of_all_spellings() {
        let debian = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)";
        assert_eq!(major_of(debian), Some(15));
        assert_eq!(major_of("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_of("postgres (PostgreSQL) 19devel"), Some(19));
        assert_eq!(major_of("bash 5.2"), None);
    }

    #[test]
    fn the_newest_version_is_first_by_number_and_not_by_letter() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["postgresql@9", "postgresql@17", "postgresql", "postgresql@16", "redis"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let found = newest_first(dir.path().to_str().unwrap(), "postgresql");
        let names = ["postgresql@17", "postgresql@16", "postgresql@9", "postgresql"];
        assert_eq!(found, names.map(|name| dir.path().join(name).join("bin")));
    }
}
