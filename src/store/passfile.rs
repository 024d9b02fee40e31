//! Passwords from a file, as libpq has them: lines of `host:port:database:user:password`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tokio_postgres::config::Host;

/// Where a server with a Unix socket usually has it: such a host is `localhost` in the file.
const SOCKET_DIRS: [&str; 2] = ["/tmp", "/var/run/postgresql"];

/// The file of this name, or the one in the home directory where none is named.
pub(super) fn path(named: Option<&str>) -> Option<PathBuf> {
    match named.filter(|name| !name.is_empty()) {
        Some(name) => Some(PathBuf::from(name)),
        None => std::env::home_dir().map(|home| home.join(".pgpass")),
    }
}

/// The lines of a file, or none where it is missing, or unsafe: others than its owner may read it, or
/// it is no plain file. Blocks.
pub(super) fn read(path: &Path) -> Option<Lines> {
    match read_safely(path) {
        Ok(lines) => Some(Lines(lines)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the password file is ignored");
            None
        }
    }
}

fn read_safely(path: &Path) -> io::Result<Vec<u8>> {
    // First, since to open a pipe would wait for whoever writes to it.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    let mut file = File::open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        let text = "group or others have access to it: its permissions should be u=rw (0600)";
        return Err(io::Error::other(text));
    }
    let mut lines = Vec::new();
    file.read_to_end(&mut lines)?;
    Ok(lines)
}

/// What a password is looked for by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Login<'a> {
    pub(super) host: &'a Host,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// The content of a password file. Nothing shows it.
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// The password of the first line that matches.
    pub(super) fn password(&self, login: Login<'_>) -> Option<Vec<u8>> {
        let host = match login.host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        };
        let is_local = host.is_empty() || SOCKET_DIRS.contains(&host.as_str());
        let host = if is_local { "localhost" } else { &host };
        let port = login.port.to_string();
        let wanted = [host, &port, login.database, login.user];
        let mut lines = self.0.split(|byte| *byte == b'\n');
        let found = lines.find_map(|line| {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.starts_with(b"#") {
                return None;
            }
            wanted.iter().try_fold(line, |line, field| after_field(line, field))
        });
        found.map(|rest| next_field(rest).0).filter(|password| !password.is_empty())
    }
}

/// What follows a field that is this or `*`.
fn after_field<'a>(line: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    if let Some(rest) = line.strip_prefix(b"*:") {
        return Some(rest);
    }
    let (field, rest) = next_field(line);
    rest.filter(|_| field == wanted.as_bytes())
}

/// A field up to the next `:` that is not escaped, with its escapes undone, and what follows it.
fn next_field(text: &[u8]) -> (Vec<u8>, Option<&[u8]>) {
    let mut field = Vec::new();
    let mut bytes = text.iter().enumerate();
    while let Some((at, &byte)) = bytes.next() {
        match byte {
            b':' => return (field, Some(&text[at + 1..])),
            b'\\' => field.push(bytes.next().map_or(byte, |(_, escaped)| *escaped)),
            byte => field.push(byte),
        }
    }
    (field, None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn look(text: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
        let host = match host.strip_prefix('/') {
            Some(_) => Host::Unix(host.into()),
            None => Host::Tcp(host.to_owned()),
        };
        let login = Login { host: &host, port, database, user };
        let found = Lines(text.as_bytes().to_vec()).password(login);
        found.map(|password| String::from_utf8(password).unwrap())
    }

    #[test]
    fn the_first_line_that_matches_counts() {
        let text = "# h:1:d:u:comment\n\nh:1:d:v:other\nh:*:d:u:first\r\nh:1:d:u:second\n";
        assert_eq!(look(text, "h", 1, "d", "u").unwrap(), "first");
        assert_eq!(look(text, "h", 1, "d", "v").unwrap(), "other");
        assert_eq!(look(text, "h", 1, "e", "u"), None);
        assert_eq!(look(text, "hh", 1, "d", "u"), None);
        assert_eq!(look(text, "", 1, "d", "u"), None);
    }

    #[test]
    fn stars_match_all_and_backslashes_escape() {
        assert_eq!(look("*:*:*:*:p", "any", 7, "x", "y").unwrap(), "p");
        let text = r"fe80\:\:1:5432:a\\b:u\:v:p\:a\\s\s:ignored";
        assert_eq!(look(text, "fe80::1", 5432, r"a\b", "u:v").unwrap(), r"p:a\ss");
        assert_eq!(look(r"\*:1:d:u:p", "h", 1, "d", "u"), None);
        assert_eq!(look("*h:1:d:u:p", "h", 1, "d", "u"), None);
    }

    #[test]
    fn a_usual_socket_is_localhost() {
        let text = "localhost:1:d:u:p\n/srv/run:1:d:u:q";
        assert_eq!(look(text, "/var/run/postgresql", 1, "d", "u").unwrap(), "p");
        assert_eq!(look(text, "/srv/run", 1, "d", "u").unwrap(), "q");
        assert_eq!(look(text, "/other", 1, "d", "u"), None);
    }

    #[test]
    fn lines_that_are_cut_off_have_no_password() {
        for text in ["h", "h:1:d", "h:1:d:u", "h:1:d:u:", "\\", "h:1:d:u:\n:::::"] {
            assert_eq!(look(text, "h", 1, "d", "u"), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_was_escaped_is_found_again(fields in prop::array::uniform4("[ -~äß]{1,9}")) {
            let [host, database, user, password] = fields;
            prop_assume!(!host.starts_with('/') && !host.starts_with('#'));
            let escape = |text: &str| text.replace('\\', r"\\").replace(':', r"\:");
            // A star alone would match all, which includes itself.
            let line = format!(
                "{}:1:{}:{}:{}", escape(&host), escape(&database), escape(&user), escape(&password)
            );
            prop_assert_eq!(look(&line, &host, 1, &database, &user), Some(password));
        }
    }

    #[test]
    fn a_file_that_others_may_read_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pass");
        assert!(read(&path).is_none());
        fs::write(&path, "*:*:*:*:p").unwrap();
        for (mode, is_read) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_some(), is_read, "{mode:o}");
        }
        assert!(read(dir.path()).is_none());
    }

    #[test]
    fn a_named_file_is_preferred_to_the_one_at_home() {
        assert_eq!(path(Some("/x")).unwrap(), Path::new("/x"));
        assert_eq!(path(Some("")), path(None));
        assert!(path(None).is_none_or(|path| path.ends_with(".pgpass")));
    }
}
