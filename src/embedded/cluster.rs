//! The initialised cluster: made once by `initdb`, then copied for each server.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::account::{self, Account};
use super::binaries::Binaries;
use super::database::USER;
use super::folder::Folder;
use super::{blocking, failed};
use crate::Result;

/// Part of the name of a template. Change it when the arguments of `initdb` change.
const FORMAT: u32 = 2;

/// `--reflink` is GNU's, and makes the copy nearly free where the file system shares blocks.
const COPY: &str = r#"
set -e
umask 077
mkdir "$2" "$3"
cp -a --reflink=auto "$1/." "$2" 2>/dev/null || cp -a "$1/." "$2"
"#;

/// Makes `data` and `run` in the server's folder.
pub(super) async fn create(folder: &Folder, binaries: &Binaries, account: Account) -> Result<()> {
    let template = template(folder, binaries, account).await?;
    let paths = [&*template.join("data"), &*folder.data(), &*folder.run()];
    let copy = account.shell(COPY, &paths);
    account::run(copy, "", "copy the initialised cluster").await.map(drop)
}

/// The folder to copy from. It holds the cluster in `data`, and its weight in `weight`.
async fn template(folder: &Folder, binaries: &Binaries, account: Account) -> Result<PathBuf> {
    let Some(cache) = cache(&folder.base, account).await? else {
        return initialise(folder, binaries, account).await;
    };
    let cached = cache.join(name(binaries, account));
    let found = cached.clone();
    if blocking(move || Ok(is_whole(&found))).await? {
        return Ok(cached);
    }
    let fresh = initialise(folder, binaries, account).await?;
    let broken = folder.path().join("broken");
    blocking(move || Ok(publish(fresh, cached, &broken))).await
}

/// The folder of all templates, or none if somebody else could write there.
async fn cache(base: &Path, account: Account) -> Result<Option<PathBuf>> {
    let path = base.join(format!("shardmq-pg-cache-{}", account.uid));
    if !is_private(path.clone(), account).await? {
        // That fails when another process was faster, and when there is something else of that
        // name, which the second look tells apart.
        let mkdir = account.shell("mkdir -m 700 \"$1\"", &[&path]);
        let made = account::run(mkdir, "", "make the folder of initialised clusters").await;
        if !is_private(path.clone(), account).await? {
            tracing::warn!(path = %path.display(), ?made, "not safe to use: start will be slow");
            return Ok(None);
        }
    }
    Ok(Some(path))
}

/// Whether it is a folder, not a link to one, that belongs to the account, and to nobody else.
async fn is_private(path: PathBuf, account: Account) -> Result<bool> {
    blocking(move || {
        Ok(path.symlink_metadata().is_ok_and(|meta| {
            meta.is_dir() && meta.uid() == account.uid && meta.permissions().mode() & 0o777 == 0o700
        }))
    })
    .await
}

/// Two servers may share a template if all that went into it is the same.
fn name(binaries: &Binaries, account: Account) -> String {
    let mut hasher = DefaultHasher::new();
    (FORMAT, binaries.dir(), binaries.version(), account.uid).hash(&mut hasher);
    format!("{}-{:016x}", binaries.major(), hasher.finish())
}

/// Makes a template in the server's own folder: nothing is left of it when we are killed meanwhile.
async fn initialise(folder: &Folder, binaries: &Binaries, account: Account) -> Result<PathBuf> {
    let fresh = folder.path().join("fresh");
    let data = fresh.join("data");
    let mut initdb = account.command(binaries.program("initdb"));
    initdb.arg("-D").arg(&data).args(["--no-sync", "--encoding=UTF8", "--locale=C"]);
    // The socket is where only the user of the server reaches it.
    initdb.args(["--username", USER, "--auth-local=trust", "--auth-host=scram-sha-256"]);
    account::run(initdb, "", "initialise a cluster with initdb").await?;
    let weight = blocking(move || weigh(&data).map_err(failed("weigh the new cluster"))).await?;
    folder.append(&fresh.join("weight"), &weight).await?;
    Ok(fresh)
}

/// Moves a new template to its place, unless another process was faster. Moving a folder onto
/// another fails, so that it is always one whole template. What can't be used is moved out of the
/// way. Returns the template to use.
fn publish(fresh: PathBuf, cached: PathBuf, broken: &Path) -> PathBuf {
    if std::fs::rename(&fresh, &cached).is_ok() || is_whole(&cached) {
        return cached;
    }
    let moved = std::fs::rename(&cached, broken).and_then(|()| std::fs::rename(&fresh, &cached));
    if moved.is_ok() { cached } else { fresh }
}

/// Whether all is there. Files may be missing, since folders for temporary files are swept by age;
/// and files may be empty after a power failure, since `initdb` did not sync them.
fn is_whole(template: &Path) -> bool {
    let expected = std::fs::read_to_string(template.join("weight")).unwrap_or_default();
    weigh(&template.join("data")).is_ok_and(|weight| weight == expected)
}

/// The number of files and folders, and of the bytes in the files.
fn weigh(dir: &Path) -> io::Result<String> {
    let (mut entries, mut bytes) = (0, 0);
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            entries += 1;
            if meta.is_dir() {
                dirs.push(entry.path());
            } else {
                bytes += meta.len();
            }
        }
    }
    Ok(format!("{entries} {bytes}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn make_template(path: &Path, content: &str) -> PathBuf {
        fs::create_dir_all(path.join("data/global")).unwrap();
        fs::write(path.join("data/global/pg_control"), content).unwrap();
        fs::write(path.join("weight"), weigh(&path.join("data")).unwrap()).unwrap();
        path.to_owned()
    }

    #[test]
    fn a_template_is_not_whole_when_a_file_is_missing_or_empty() {
        let dir = tempfile::tempdir().unwrap();
        let template = make_template(&dir.path().join("a"), "content");
        assert!(is_whole(&template));
        fs::write(template.join("data/global/pg_control"), "").unwrap();
        assert!(!is_whole(&template));
        fs::remove_file(template.join("data/global/pg_control")).unwrap();
        assert!(!is_whole(&template));
        assert!(!is_whole(&dir.path().join("b")));
    }

    #[test]
    fn the_first_published_template_stays_and_a_broken_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let read = |path: PathBuf| fs::read_to_string(path.join("data/global/pg_control")).unwrap();

        let first = make_template(&at("first"), "first");
        assert_eq!(publish(first, at("cached"), &at("broken")), at("cached"));
        let second = make_template(&at("second"), "second");
        assert_eq!(publish(second, at("cached"), &at("broken")), at("cached"));
        assert_eq!(read(at("cached")), "first");

        fs::write(at("cached/data/global/pg_control"), "").unwrap();
        assert_eq!(publish(at("second"), at("cached"), &at("broken")), at("cached"));
        assert_eq!(read(at("cached")), "second");
    }
}
