//! Addresses, connections and what their errors mean.

use std::time::Duration;

use tokio_postgres::config::{Host, TargetSessionAttrs};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, Config};

use crate::error::{Error, ErrorKind, Result};
use crate::store::dsn::{self, Parameters};
use crate::store::failed::{CutWait, Failed};
use crate::store::passfile;
use crate::store::pooler::Marker;
use crate::store::session::Single;
use crate::store::target::{self, Opened, Target};
use crate::store::tls::Tls;

/// How long opening a connection may take unless the URL says otherwise (`connect_timeout`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After how long without a word a connection is probed, and after how long given up.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Parses a libpq URL or key-value string. A password that it lacks is taken from `PGPASSWORD`, and
/// where that is missing too, from the password file, at each connection.
pub(crate) fn parse(url: &str) -> Result<Target> {
    let (mut config, parameters) = split(url)?;
    check_hosts(&config)?;
    let parameters = parameters.or_from(|name| std::env::var(name).ok());
    let tls = Tls::new(&parameters)?;
    if !target::has_password(&config)
        && let Ok(password) = std::env::var("PGPASSWORD")
    {
        config.password(password);
    }
    if config.get_hosts().len() > 1 && !parameters.names_session {
        // Everything here writes: a standby is of no use.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    config.keepalives(true).keepalives_idle(KEEPALIVE).tcp_user_timeout(KEEPALIVE);
    Ok(Target::new(config, tls, passfile::path(parameters.passfile.as_deref())))
}

fn split(url: &str) -> Result<(Config, Parameters)> {
    // The parser's error is left out: it could quote a piece of the URL, and so of the password.
    let parsed = dsn::split(url)
        .and_then(|(rest, parameters)| rest.parse().ok().map(|config| (config, parameters)));
    parsed.ok_or_else(|| {
        Error::invalid(
            "the database URL is not of the form postgresql://user@host:port/database, or has a \
             parameter that is not known",
        )
    })
}

fn check_hosts(config: &Config) -> Result<()> {
    let (hosts, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    let ports = config.get_ports().len();
    if hosts == 0 {
        return Err(Error::invalid("the database URL names no host"));
    }
    if addresses > 0 && addresses != hosts || ports > 1 && ports != hosts {
        return Err(Error::invalid(format!(
            "the database URL names {hosts} hosts, {addresses} addresses for them and {ports} ports"
        )));
    }
    Ok(())
}

/// `host:port/database`, for people and errors: never a password.
pub(crate) fn describe(config: &Config) -> String {
    let hosts = config.get_hosts().iter().map(|host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    });
    let with_port = |(index, host)| format!("{host}:{}", target::port(config, index));
    let addresses: Vec<String> = hosts.enumerate().map(with_port).collect();
    format!("{}/{}", addresses.join(","), config.get_dbname().unwrap_or_default())
}

/// A libpq URL without its password, for the control database.
pub(crate) fn without_password(url: &str) -> Result<String> {
    parse(url)?;
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(Error::invalid(
            "a node's address must be a URL: postgresql://user@host/database",
        ));
    };
    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    let authority = match authority.rsplit_once('@') {
        Some((user, hosts)) => {
            let user = user.split_once(':').map_or(user, |(name, _)| name);
            format!("{user}@{hosts}")
        }
        None => authority.to_owned(),
    };
    let path = match path.split_once('?') {
        Some((path, query)) => {
            let kept: Vec<&str> =
                query.split('&').filter(|pair| !pair.starts_with("password=")).collect();
            if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) }
        }
        None => path.to_owned(),
    };
    let stripped = format!("{scheme}://{authority}{path}");
    // However it was written: what is left must say none.
    match split(&stripped) {
        Ok((config, _)) if config.get_password().is_none() => Ok(stripped),
        _ => Err(Error::invalid("the password could not be taken out of the node's address")),
    }
}

/// One connection outside of any pool, driven by a task that ends with it.
pub(crate) async fn connect_once(url: &str, application: &str) -> Result<Single> {
    let mut target = parse(url)?;
    target.config.application_name(application);
    connect_single(&target).await
}

/// One connection outside of a pool.
pub(super) async fn connect_single(target: &Target) -> Result<Single> {
    let what = format!("connect to {}", describe(&target.config));
    let marker = Marker::new();
    let Opened { client, messages, marked, .. } = target.connect(&what, Some(&marker), &[]).await?;
    let cut = CutWait::default();
    tokio::spawn(target::drive(messages, cut.clone()));
    let pinned = marked && marker.is_there(&client).await.map_err(|error| refused(error, &what))?;
    Ok(Single { client, pinned, canceller: target.canceller().await?, cut })
}

/// The same, to Postgres itself: for what needs a session of its own.
pub(crate) async fn connect_directly(url: &str, application: &str) -> Result<Client> {
    let mut target = parse(url)?;
    target.config.application_name(application);
    let single = connect_single(&target).await?;
    if single.pinned {
        return Ok(single.client);
    }
    Err(Error::invalid(format!(
        "the address {} leads to a pooler; this needs a session of its own: give the address of \
         Postgres itself",
        describe(&target.config)
    )))
}

/// Whether the server answered with an error, so that a transaction that had not been asked to
/// commit is certainly rolled back. An error that ends the connection does not count: a pooler can
/// make one of its own, with more of the pipeline already on its way to the server.
pub(crate) fn is_definite(error: &Failed) -> bool {
    matches!(error, Failed::NoPlace)
        || error.as_db_error().is_some_and(|db| db.parsed_severity() == Some(Severity::Error))
}

/// Whether the server refused the data itself: class 22, 23 or 54, but not a clash of ids.
pub(crate) fn is_data_error(error: &Failed) -> bool {
    error.code().is_some_and(|state| {
        *state != SqlState::UNIQUE_VIOLATION
            && ["22", "23", "54"].iter().any(|class| state.code().starts_with(class))
    })
}

/// What the caller should do about an error of the server or of the way to it.
pub(crate) fn kind_of(error: &Failed) -> ErrorKind {
    if matches!(error, Failed::Unconfirmed | Failed::Outdated) {
        return ErrorKind::Unknown;
    }
    let Some(state) = error.code() else {
        return ErrorKind::Unavailable;
    };
    match (state.code().get(..2), state.code()) {
        // 0A000: a transaction that begins as "read write" on a standby, which may be promoted.
        (_, "57014" | "55P03" | "25006" | "0A000" | "40001" | "40P01")
        // 28: a password is replaced on the server first, or in the file.
        | (Some("08" | "28" | "53" | "57" | "58"), _) => ErrorKind::Unavailable,
        (Some("22" | "23" | "54"), _) => ErrorKind::Invalid,
        (_, "3F000" | "42P01" | "42883") => ErrorKind::Incompatible,
        _ => ErrorKind::Database,
    }
}

/// An error that says what was being done, of the kind that the server's answer means.
pub(crate) fn refused(error: impl Into<Failed>, what: &str) -> Error {
    let error = error.into();
    let kind = kind_of(&error);
    match error {
        Failed::Postgres(error) => Error::with_source(kind, what, error),
        error => Error::with_source(kind, what, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_taken_out_of_every_form() {
        let cases = [
            ("postgresql://u:secret@h:1/d", "postgresql://u@h:1/d"),
            (
                "postgres://u:a%40b@h1,h2/d?application_name=x",
                "postgres://u@h1,h2/d?application_name=x",
            ),
            ("postgresql://u@h/d?password=secret", "postgresql://u@h/d"),
            (
                "postgresql://h/d?password=secret&connect_timeout=3",
                "postgresql://h/d?connect_timeout=3",
            ),
            (
                "postgresql://u:secret@h/d?sslrootcert=/ca.pem&password=secret&passfile=/p",
                "postgresql://u@h/d?sslrootcert=/ca.pem&passfile=/p",
            ),
        ];
        for (url, expected) in cases {
            assert_eq!(without_password(url).unwrap(), expected);
        }
    }

    #[test]
    fn an_address_whose_password_would_stay_is_refused() {
        for url in ["host=h user=u password='se cret'", "postgresql://u@h/d?p%61ssword=secret"] {
            match without_password(url) {
                Ok(stripped) => assert!(!stripped.contains("secret"), "{stripped}"),
                Err(error) => assert!(!error.chain().contains("cret")),
            }
        }
    }

    #[test]
    fn errors_and_descriptions_never_show_a_password() {
        let error = parse("postgresql://u:secret@h:port/d").unwrap_err();
        assert!(!format!("{error:?}").contains("secret"));
        let error = parse("postgresql://u:secret@h/d?sslmode=secretive").unwrap_err();
        assert!(!format!("{error:?}").contains("secret"));
        let target = parse("postgresql://u:secret@h:1,i:2/d?passfile=/p").unwrap();
        assert_eq!(describe(&target.config), "h:1,i:2/d");
        assert!(!format!("{target:?}").contains("secret"));
    }

    #[test]
    fn of_several_hosts_one_that_writes_is_wanted_unless_the_url_says_otherwise() {
        let wanted = |url: &str| parse(url).unwrap().config.get_target_session_attrs();
        assert_eq!(wanted("postgresql://a/d"), TargetSessionAttrs::Any);
        assert_eq!(wanted("postgresql://a,b/d"), TargetSessionAttrs::ReadWrite);
        assert_eq!(wanted("postgresql://a,b/d?target_session_attrs=any"), TargetSessionAttrs::Any);
    }

    #[test]
    fn hosts_ports_and_addresses_must_fit() {
        for url in ["host=a,b port=1,2,3", "host=a,b hostaddr=::1", "user=u"] {
            assert_eq!(parse(url).unwrap_err().kind(), ErrorKind::Invalid, "{url}");
        }
        assert!(parse("host=a,b hostaddr=::1,::2 port=1").is_ok());
    }
}
