//! Addresses, connections and what their errors mean.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, Config, Connection, NoTls};

use crate::error::{Error, ErrorKind, Result};
use crate::store::pooler::Marker;

/// How long opening a connection may take unless the URL says otherwise (`connect_timeout`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After how long without a word a connection is probed, and after how long given up.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Parses a libpq URL or key-value string. A password that it lacks is taken from `PGPASSWORD`.
pub(crate) fn parse(url: &str) -> Result<Config> {
    let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
        // The source could quote a piece of the URL, and so of the password.
        let _ = error;
        Error::invalid(
            "the database URL is not of the form postgresql://user@host:port/database, or has a \
             parameter that is not known",
        )
    })?;
    if config.get_hosts().is_empty() {
        return Err(Error::invalid("the database URL names no host"));
    }
    if config.get_ssl_mode() == SslMode::Require {
        return Err(Error::invalid(
            "the database URL asks for sslmode=require, and this build has no TLS",
        ));
    }
    if config.get_password().is_none()
        && let Ok(password) = std::env::var("PGPASSWORD")
    {
        config.password(password);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    config.keepalives(true).keepalives_idle(KEEPALIVE).tcp_user_timeout(KEEPALIVE);
    Ok(config)
}

/// `host:port/database`, for people and errors: never a password.
pub(crate) fn describe(config: &Config) -> String {
    let hosts = config.get_hosts().iter().map(|host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    });
    let ports = config.get_ports();
    let port_of = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(5432);
    let addresses: Vec<String> =
        hosts.enumerate().map(|(index, host)| format!("{host}:{}", port_of(index))).collect();
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
    match stripped.parse::<Config>() {
        Ok(config) if config.get_password().is_none() => Ok(stripped),
        _ => Err(Error::invalid("the password could not be taken out of the node's address")),
    }
}

/// One connection outside of any pool, driven by a task that ends with it.
pub(crate) async fn connect_once(url: &str, application: &str) -> Result<Client> {
    let mut config = parse(url)?;
    config.application_name(application);
    let what = format!("connect to {}", describe(&config));
    let (client, connection) =
        config.connect(NoTls).await.map_err(|error| refused(error, &what))?;
    tokio::spawn(drive(connection));
    Ok(client)
}

/// The same, to Postgres itself: for what needs a session of its own.
pub(crate) async fn connect_directly(url: &str, application: &str) -> Result<Client> {
    let mut config = parse(url)?;
    config.application_name(application);
    let what = format!("connect to {}", describe(&config));
    let marker = Marker::new();
    let (client, connection, sent) =
        marker.connect(&config).await.map_err(|error| refused(error, &what))?;
    tokio::spawn(drive(connection));
    if sent && marker.is_there(&client).await.map_err(|error| refused(error, &what))? {
        return Ok(client);
    }
    Err(Error::invalid(format!(
        "the address {} leads to a pooler; this needs a session of its own: give the address of \
         Postgres itself",
        describe(&config)
    )))
}

/// Drives a connection until it ends.
pub(crate) async fn drive<S, T>(connection: Connection<S, T>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    if let Err(error) = connection.await {
        tracing::debug!(error = %crate::error::chain(&error), "connection ended");
    }
}

/// Whether the server answered with an error, so that a transaction that had not been asked to commit
/// is certainly rolled back. An error that ends the connection does not count: a pooler can make one
/// of its own, with more of the pipeline already on its way to the server.
pub(crate) fn is_definite(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|db| db.parsed_severity() == Some(Severity::Error))
}

/// Whether the server refused the data itself: class 22, 23 or 54, but not a clash of ids.
pub(crate) fn is_data_error(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|state| {
        *state != SqlState::UNIQUE_VIOLATION
            && ["22", "23", "54"].iter().any(|class| state.code().starts_with(class))
    })
}

/// What the caller should do about an error of the server or of the way to it.
pub(crate) fn kind_of(error: &tokio_postgres::Error) -> ErrorKind {
    let Some(state) = error.code() else {
        return ErrorKind::Unavailable;
    };
    match (state.code().get(..2), state.code()) {
        // 0A000: a transaction that begins as "read write" on a standby, which may be promoted.
        (_, "57014" | "55P03" | "25006" | "0A000" | "40001" | "40P01")
        | (Some("08" | "53" | "57" | "58"), _) => ErrorKind::Unavailable,
        (Some("22" | "23" | "54"), _) => ErrorKind::Invalid,
        (_, "3F000" | "42P01" | "42883") => ErrorKind::Incompatible,
        _ => ErrorKind::Database,
    }
}

/// An error that says what was being done, of the kind that the server's answer means.
pub(crate) fn refused(error: tokio_postgres::Error, what: &str) -> Error {
    Error::with_source(kind_of(&error), what, error)
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
        let config = parse("postgresql://u:secret@h:1,i:2/d").unwrap();
        assert_eq!(describe(&config), "h:1,i:2/d");
    }

    #[test]
    fn tls_that_this_build_lacks_is_a_clear_error() {
        let error = parse("postgresql://u@h/d?sslmode=require").unwrap_err();
        assert!(error.to_string().contains("sslmode=require"));
    }
}
