//! What a Redis is started with.

use std::fmt::{self, Write};
use std::path::Path;

use super::account::Account;
use super::blocking;
use super::database::escaped;
use super::folder::{DataFile, Folder};
use super::redis_server::{self, Address, PID_FILE, Redis};
use crate::{Error, Result};

/// Where the server is, and how it is seen to be ready, is what the rest of this module relies on.
const RESERVED: [&str; 9] = [
    "port",
    "tls-port",
    "bind",
    "dir",
    "pidfile",
    "logfile",
    "loglevel",
    "daemonize",
    "supervised",
];
const CERTIFICATE: &str = "server.crt";
const KEY: &str = "server.key";
const RESERVED_FILES: [&str; 4] = [redis_server::CONFIG, PID_FILE, CERTIFICATE, KEY];

/// Redis takes no longer one, and would show it in its log.
const LONGEST_PASSWORD: usize = 512;

/// The options of a [`Redis`]. Made by [`Redis::builder`].
#[derive(Clone, Default)]
#[must_use = "does nothing until it is started"]
pub struct RedisBuilder {
    settings: Vec<(String, String)>,
    files: Vec<DataFile>,
    password: Option<String>,
    user: Option<(String, String)>,
    certificate: Option<[String; 2]>,
}

/// Settings may have passwords in them, and keys are secret.
impl fmt::Debug for RedisBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings: Vec<_> = self.settings.iter().map(|(name, _)| name).collect();
        f.debug_struct("RedisBuilder")
            .field("settings", &settings)
            .field("files", &self.files)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

impl RedisBuilder {
    /// A line for `redis.conf`, which comes after the defaults: nothing is written to disk, and what
    /// Redis itself has as its defaults.
    ///
    /// The name has only ASCII letters, digits, `-`, `_` and `.`. The value is one line with all
    /// arguments, in double quotes where they need it, as in `redis.conf`: the setting `save` with
    /// `3600 1`, or the setting `user` with `reader on >secret ~* &* +@read`. `port`, `tls-port`,
    /// `bind`, `dir`, `pidfile`, `logfile`, `loglevel`, `daemonize` and `supervised` can't be set.
    /// Checked by [`start`](Self::start); what the server itself does not like ends it at its start.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// A file in the folder in which the server works, so that settings can name it without a folder.
    /// Only the user of the server may read it. There from the first start on.
    ///
    /// The name has only ASCII letters, digits, `_`, `-` and `.`, does not begin with `.`, and is not
    /// `redis.conf`, `redis.pid`, `server.crt` or `server.key`. Checked by [`start`](Self::start).
    pub fn file(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.files.push(DataFile { name: name.into(), text: text.into() });
        self
    }

    /// Refuses clients without this password, which is that of the user `default`. Default: none is
    /// needed. 1 to 512 bytes without NUL, which [`start`](Self::start) checks.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(password.into());
        self
    }

    /// A user who may do everything, whom [`Redis::url`] then names. The user `default` is off,
    /// unless it has a [`password`](Self::password). Needs Redis 6.2. Default: there is only the user
    /// `default`.
    ///
    /// The name is not empty and has neither white space nor NUL, and is not `default`; the password
    /// is like the other one. Checked by [`start`](Self::start).
    pub fn acl_user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some((name.into(), password.into()));
        self
    }

    /// Speaks nothing but TLS, with this certificate (or chain) and its key, both in PEM.
    /// [`Redis::url`] then begins with `rediss:`. Needs a Redis that was built with TLS. Default: no
    /// TLS.
    ///
    /// Clients need no certificate, unless the setting `tls-auth-clients` is `yes`; then
    /// `tls-ca-cert-file` names the [file](Self::file) of who signs theirs.
    pub fn tls(mut self, certificate: impl Into<String>, key: impl Into<String>) -> Self {
        self.certificate = Some([certificate.into(), key.into()]);
        self
    }

    /// Starts a server and waits until it answers, for at most 30 seconds. As a rule that takes some
    /// hundredths of a second.
    ///
    /// The program is `redis-server`, or `valkey-server` where there is none. It is looked for in the
    /// folder that the environment variable `SHARDMQ_REDIS_BIN` names; when that is not set, in the
    /// folders of `PATH`, in `/usr/bin`, `/opt/homebrew/bin` and `/usr/local/bin`.
    ///
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a bad setting, file name, user name or
    /// password, [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) without the program or without a
    /// user to run it as, [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) when it does not get ready
    /// in time, [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) otherwise. When the server
    /// itself failed, the cause has the last lines of its log. After an error, and if this is dropped,
    /// what was begun is stopped and removed soon after.
    pub async fn start(self) -> Result<Redis> {
        let settings = self.settings()?;
        self.files.iter().try_for_each(|file| file.check(&RESERVED_FILES))?;
        let program = blocking(super::redis_program::find).await?;
        let account = Account::find().await?;
        let folder = Folder::create(account, "shardmq-redis-").await?;
        let settings = format!("{}{settings}", of_folder(&folder.data())?);
        let address = self.address();
        let mut files = self.files;
        if let Some([certificate, key]) = self.certificate {
            files.push(DataFile { name: CERTIFICATE.into(), text: certificate });
            files.push(DataFile { name: KEY.into(), text: key });
        }
        redis_server::start(folder, account, program, address, &settings, &files).await
    }

    /// The lines that don't depend on where the server is.
    fn settings(&self) -> Result<String> {
        let mut lines = String::from("save \"\"\nappendonly no\n");
        if self.certificate.is_some() {
            let _ = writeln!(lines, "tls-cert-file {CERTIFICATE}\ntls-key-file {KEY}");
            lines.push_str("tls-auth-clients no\n");
        }
        for (name, value) in &self.settings {
            check(name, value)?;
            let _ = writeln!(lines, "{name} {value}");
        }
        if let Some(password) = &self.password {
            check_password(password)?;
            let _ = writeln!(lines, "requirepass {}", quoted(password));
        }
        if let Some((name, password)) = &self.user {
            check_user(name)?;
            check_password(password)?;
            let password = quoted(&format!(">{password}"));
            let _ = writeln!(lines, "user {} on {password} ~* &* +@all", quoted(name));
            if self.password.is_none() {
                lines.push_str("user default off\n");
            }
        }
        Ok(lines)
    }

    fn address(&self) -> Address {
        let credentials = match (&self.user, &self.password) {
            (Some((name, password)), _) => format!("{}:{}@", escaped(name), escaped(password)),
            (None, Some(password)) => format!(":{}@", escaped(password)),
            (None, None) => String::new(),
        };
        Address { tls: self.certificate.is_some(), credentials }
    }
}

/// To be the first lines: names of files in later ones are those in the folder.
fn of_folder(data: &Path) -> Result<String> {
    let data = data.to_str().ok_or_else(|| Error::invalid("the folder's name is not UTF-8"))?;
    Ok(format!(
        "bind 127.0.0.1\ndir {}\npidfile {PID_FILE}\nlogfile \"\"\nloglevel notice\n\
         daemonize no\nsupervised no\n",
        quoted(data)
    ))
}

fn check(name: &str, value: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(good) {
        return Err(Error::invalid(format!("{name:?} is not the name of a setting of Redis")));
    }
    if RESERVED.iter().any(|reserved| name.eq_ignore_ascii_case(reserved)) {
        return Err(Error::invalid(format!("the embedded server sets {name} itself")));
    }
    if value.contains(['\0', '\n', '\r']) {
        let text = format!("the value of the setting {name} has a NUL or more than one line");
        return Err(Error::invalid(text));
    }
    Ok(())
}

fn check_user(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(|c: char| c == '\0' || c.is_whitespace()) {
        return Err(Error::invalid("the name of a Redis user is empty, or has white space or NUL"));
    }
    if name == "default" {
        let text = "the Redis user `default` has the password of the server, and no other";
        return Err(Error::invalid(text));
    }
    Ok(())
}

fn check_password(password: &str) -> Result<()> {
    if password.is_empty() || password.len() > LONGEST_PASSWORD || password.contains('\0') {
        let text = format!("a password of Redis has 1 to {LONGEST_PASSWORD} bytes and no NUL");
        return Err(Error::invalid(text));
    }
    Ok(())
}

/// One argument of a line of `redis.conf`, where a backslash escapes.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => {
                let _ = write!(quoted, "\\x{:02x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn builder() -> RedisBuilder {
        RedisBuilder::default()
    }

    #[test]
    fn arguments_are_quoted() {
        assert_eq!(quoted("a b"), "\"a b\"");
        assert_eq!(quoted("C:\\\"x\"\ny ü"), "\"C:\\\\\\\"x\\\"\\x0ay ü\"");
    }

    #[test]
    fn settings_that_we_rely_on_and_what_is_no_line_are_refused() {
        for (name, value) in [
            ("Port", "1"),
            ("tls-port", "1"),
            ("", "1"),
            ("a b", "1"),
            ("#a", "1"),
            ("a\nb", "1"),
            ("maxmemory", "1\nport 1"),
            ("maxmemory", "1\r"),
            ("maxmemory", "\0"),
        ] {
            let refused = builder().setting(name, value).settings();
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid, "{name:?} {value:?}");
        }
    }

    #[test]
    fn users_and_passwords_that_redis_would_refuse_are_refused() {
        let long = "x".repeat(LONGEST_PASSWORD + 1);
        for password in ["", "a\0b", &long] {
            let refused = builder().password(password).settings().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            let refused = builder().acl_user("worker", password).settings().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
        }
        for user in ["", "default", "a b", "a\tb", "a\0b"] {
            let refused = builder().acl_user(user, "secret").settings().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{user:?}");
        }
    }

    #[test]
    fn own_settings_come_after_the_defaults() {
        let settings = builder().setting("appendonly", "yes").settings().unwrap();
        assert!(settings.find("appendonly no").unwrap() < settings.find("appendonly yes").unwrap());
    }

    #[test]
    fn the_user_default_is_off_beside_another_unless_it_has_a_password() {
        let with_user = builder().acl_user("worker", "secret");
        let settings = with_user.settings().unwrap();
        assert!(settings.contains("user \"worker\" on \">secret\" ~* &* +@all\n"), "{settings}");
        assert!(settings.contains("user default off\n"), "{settings}");
        assert!(!with_user.password("other").settings().unwrap().contains("default"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let builder = builder().password("secret").acl_user("worker", "secret");
        let builder = builder.tls("certificate", "secret").file("users.acl", "secret");
        let builder = builder.setting("masterauth", "secret");
        assert!(!format!("{builder:?}").contains("secret"), "{builder:?}");
        assert!(!format!("{:?}", builder.address()).contains("secret"));
    }
}
