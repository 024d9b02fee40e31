//! Finds the program of Redis.

use std::path::{Path, PathBuf};

use super::binaries::is_executable;
use super::failed;
use crate::{Error, ErrorKind, Result};

const VARIABLE: &str = "SHARDMQ_REDIS_BIN";
/// The better first.
const PROGRAMS: [&str; 2] = ["redis-server", "valkey-server"];
/// Where packages put it, for those whose `PATH` is short.
const USUAL: [&str; 3] = ["/usr/bin", "/opt/homebrew/bin", "/usr/local/bin"];
const HOW_TO_INSTALL: &str = "found neither redis-server nor valkey-server: on Debian or Ubuntu \
    install one with `apt-get install redis-server`, on macOS with `brew install redis`, or set \
    SHARDMQ_REDIS_BIN to its folder";

/// The folder that the variable names; when it is set, nothing else is tried. Else the folders of
/// `PATH`, then the usual ones.
pub(super) fn find() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(VARIABLE) {
        return in_variable(Path::new(&dir));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> =
        std::env::split_paths(&path).chain(USUAL.into_iter().map(PathBuf::from)).collect();
    first_of(&folders, HOW_TO_INSTALL)
}

fn in_variable(dir: &Path) -> Result<PathBuf> {
    let [redis, valkey] = PROGRAMS;
    let dir_has = format!("{VARIABLE} is {}, which has", dir.display());
    first_of(&[dir.to_owned()], &format!("{dir_has} neither {redis} nor {valkey}"))
}

/// Or an error of these words.
fn first_of(folders: &[PathBuf], otherwise: &str) -> Result<PathBuf> {
    let mut all = PROGRAMS.iter().flat_map(|name| folders.iter().map(move |dir| dir.join(name)));
    let found = all.find(|path| is_executable(path));
    let found = found.ok_or_else(|| Error::new(ErrorKind::NotFound, otherwise))?;
    // The children work in another folder than we do.
    std::path::absolute(found).map_err(failed("look for Redis"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_wrong_variable_is_an_error_that_names_it_and_the_folder() {
        let error = in_variable(Path::new("/no/such/folder")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(
            error.chain(),
            "SHARDMQ_REDIS_BIN is /no/such/folder, which has neither redis-server nor valkey-server"
        );
    }

    #[test]
    fn redis_comes_before_valkey_and_both_must_be_executable() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = [one.path().to_owned(), other.path().to_owned()];
        put(one.path(), "redis-server", 0o644);
        let error = first_of(&folders, HOW_TO_INSTALL).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        for words in ["apt-get install redis-server", "brew install redis", VARIABLE] {
            assert!(error.to_string().contains(words), "{error}");
        }
        let valkey = put(one.path(), "valkey-server", 0o755);
        assert_eq!(first_of(&folders, "").unwrap(), valkey);
        let redis = put(other.path(), "redis-server", 0o755);
        assert_eq!(first_of(&folders, "").unwrap(), redis);
    }
}
