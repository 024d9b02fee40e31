//! What a server is started with.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;

use super::account::Account;
use super::binaries::Binaries;
use super::blocking;
use super::folder::{DataFile, Folder};
use super::password::Password;
use super::postmaster::Postgres;
use super::server::Server;
use crate::{Error, Result};

/// Where the server is, and where its log goes, is what the rest of this module relies on.
const RESERVED: [&str; 5] =
    ["port", "listen_addresses", "unix_socket_directories", "data_directory", "logging_collector"];

/// Who gets in, and how.
const RULES: &str = "pg_hba.conf";

/// What belongs to the server alone, beside the folders that `initdb` made.
const RESERVED_FILES: [&str; 5] =
    ["postgresql.conf", "postgresql.auto.conf", "postmaster.pid", "postmaster.opts", "PG_VERSION"];

/// What is written into the folder of a new cluster.
pub(super) struct Files {
    /// Lines for `postgresql.conf`.
    pub(super) settings: String,
    pub(super) others: Vec<DataFile>,
}

/// The options of a [`Server`]. Made by [`Server::builder`].
#[derive(Debug, Clone, Default)]
#[must_use = "does nothing until it is started"]
pub struct ServerBuilder {
    binaries: Option<Binaries>,
    settings: Vec<(String, String)>,
    variables: Vec<(OsString, OsString)>,
    files: Vec<DataFile>,
    volatile: bool,
    open: bool,
}

impl ServerBuilder {
    /// The programs to start. Default: [`Binaries::find`].
    pub fn binaries(mut self, binaries: Binaries) -> Self {
        self.binaries = Some(binaries);
        self
    }

    /// A line for `postgresql.conf`. The last one for a name counts; it comes after the defaults,
    /// which are 128 MB of `shared_buffers`, 200 `max_connections`, and UTC.
    ///
    /// The name has only ASCII letters, digits, `_` and `.`; the value is quoted as needed and has
    /// no NUL. `port`, `listen_addresses`, `unix_socket_directories`, `data_directory` and
    /// `logging_collector` can't be set. Checked by [`start`](Self::start); what the server itself
    /// does not like ends it at its start.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// A file in the folder of the cluster, which only the user of the server may read: certificates
    /// for the setting `ssl`, say, or `pg_hba.conf` in place of the one that asks for the password: then
    /// the superuser has none. There from the first start on.
    ///
    /// The name has only ASCII letters, digits, `_`, `-` and `.`, and is neither `postgresql.conf` nor
    /// that of another file that the server keeps for itself. Checked by [`start`](Self::start).
    pub fn file(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.files.push(DataFile { name: name.into(), text: text.into() });
        self
    }

    /// A variable for the environment of the server process, such as `LD_PRELOAD`. Default: our own
    /// environment, without all variables whose names begin with `PG`, and `LC_ALL=C`.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// Lets everybody in who can reach the port, without a password, as superuser: every user of this
    /// machine can read all and run programs as the user of the server. For tests on a machine of their
    /// own. Default: the random password of [`Server::url`] is asked for.
    pub fn trusts_everybody(mut self) -> Self {
        self.open = true;
        self
    }

    /// Whether data outlives a crash of the machine. Default: true. `false` sets `fsync` and
    /// `full_page_writes` to off, which is quicker and good for tests: data still outlives a crash
    /// of the server.
    pub fn durable(mut self, durable: bool) -> Self {
        self.volatile = !durable;
        self
    }

    /// Starts a server and waits until it takes connections, for at most 30 seconds after its
    /// cluster was made.
    ///
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a bad setting,
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) without binaries or without a user to run
    /// them as, [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) when it does not get ready in time,
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) otherwise. When the server itself
    /// failed, the cause has the last lines of its log. After an error, and if this is dropped, what
    /// was begun is stopped and removed soon after.
    pub async fn start(self) -> Result<Server> {
        let settings = self.settings()?;
        self.files.iter().try_for_each(|file| file.check(&RESERVED_FILES))?;
        let binaries = match self.binaries {
            Some(binaries) => binaries,
            None => blocking(Binaries::find).await?,
        };
        let account = Account::find().await?;
        let folder = Folder::create(account, "shardmq-pg-").await?;
        let settings = format!("{}{settings}", of_folder(&folder.run())?);
        let has_own_rules = self.files.iter().any(|file| file.name == RULES);
        let (mut files, asks) = (self.files, !self.open && !has_own_rules);
        if self.open && !has_own_rules {
            let text = "local all all trust\nhost all all 127.0.0.1/32 trust\n\
                        local replication all trust\nhost replication all 127.0.0.1/32 trust\n";
            files.push(DataFile { name: RULES.into(), text: text.into() });
        }
        let files = Files { settings, others: files };
        let password = asks.then(Password::random);
        let postgres = Postgres { binaries, variables: self.variables, password };
        Server::start(folder, account, postgres, files).await
    }

    /// The lines that don't depend on where the server is.
    fn settings(&self) -> Result<String> {
        let mut lines = String::from(
            "listen_addresses = '127.0.0.1'\nlogging_collector = off\nlog_destination = stderr\n\
             shared_buffers = 128MB\nmax_connections = 200\nTimeZone = UTC\nlog_timezone = UTC\n",
        );
        if self.volatile {
            lines.push_str("fsync = off\nfull_page_writes = off\n");
        }
        for (name, value) in &self.settings {
            check(name)?;
            lines.push_str(&line(name, value)?);
        }
        Ok(lines)
    }
}

fn of_folder(run: &Path) -> Result<String> {
    let quoted = line("unix_socket_directories", &format!("\"{}\"", run.display()))?;
    Ok(format!("\n# The following lines are those of the embedded server.\n{quoted}"))
}

fn check(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') || !name.chars().all(good) {
        return Err(Error::invalid(format!("{name:?} is not the name of a setting of Postgres")));
    }
    if RESERVED.iter().any(|reserved| name.eq_ignore_ascii_case(reserved)) {
        return Err(Error::invalid(format!("the embedded server sets {name} itself")));
    }
    Ok(())
}

/// A line of `postgresql.conf`, where a backslash escapes and a value must not go on in a second
/// line.
fn line(name: &str, value: &str) -> Result<String> {
    if value.contains('\0') {
        return Err(Error::invalid(format!("the value of the setting {name} has a NUL")));
    }
    let mut line = format!("{name} = '");
    for c in value.chars() {
        match c {
            '\'' => line.push_str("''"),
            '\\' => line.push_str(r"\\"),
            '\n' => line.push_str(r"\n"),
            other => line.push(other),
        }
    }
    let _ = writeln!(line, "'");
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn values_are_quoted() {
        let quoted = line("a.b", "it's C:\\x\ny").unwrap();
        assert_eq!(quoted, "a.b = 'it''s C:\\\\x\\ny'\n");
        assert_eq!(line("a", "\0").unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn settings_that_we_rely_on_and_names_that_are_none_are_refused() {
        for name in ["Port", "listen_addresses", "", "a b", "1a", "a\nb", "a=b", "ä"] {
            let refused = Server::builder().setting(name, "1").settings();
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
        }
    }

    #[test]
    fn files_of_the_servers_own_and_elsewhere_are_refused() {
        let check = |name: &str| {
            DataFile { name: name.to_owned(), text: String::new() }.check(&RESERVED_FILES)
        };
        for name in ["", "..", "../x", "a/b", ".hidden", "postgresql.conf", "postmaster.pid", "a b"]
        {
            assert_eq!(check(name).unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
        }
        assert!(check("pg_hba.conf").is_ok());
    }

    #[test]
    fn what_is_in_a_file_is_not_shown() {
        let builder = Server::builder().file("server.key", "secret");
        assert!(!format!("{builder:?}").contains("secret"));
    }

    #[test]
    fn own_settings_come_after_the_defaults() {
        let builder = Server::builder().durable(false).setting("fsync", "on");
        let settings = builder.settings().unwrap();
        assert!(settings.find("fsync = off").unwrap() < settings.find("fsync = 'on'").unwrap());
        assert!(!Server::builder().settings().unwrap().contains("fsync"));
    }
}
