//! The databases of a server.

use std::fmt::Write;

use tokio_postgres::error::SqlState;

use super::password::Password;
use crate::store::connect::connect_once;
use crate::{Error, ErrorKind, Result};

/// Postgres cuts longer names, with no more than a notice.
const LONGEST_NAME: usize = 63;

/// The superuser.
pub(super) const USER: &str = "shardmq";

pub(super) fn url(port: u16, database: &str, password: Option<&Password>) -> String {
    let password = password.map_or_else(String::new, |password| format!(":{}", password.text()));
    format!("postgresql://{USER}{password}@127.0.0.1:{port}/{}", escaped(database))
}

/// In the database of this address.
pub(super) async fn create(admin_url: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
        return Err(Error::invalid("the name of a database has 1 to 63 bytes and no NUL"));
    }
    let error =
        |kind, cause| Error::with_source(kind, format!("create the database {name}"), cause);
    let single = connect_once(admin_url, "shardmq embedded").await?;
    let client = single.client();
    // It copies files, and waits for others that do: longer than a statement on a node may.
    let bounds = "set statement_timeout = '5min'; set lock_timeout = '1min'";
    client.batch_execute(bounds).await.map_err(|cause| error(ErrorKind::Unavailable, cause))?;
    let statement = format!("CREATE DATABASE \"{}\"", name.replace('"', "\"\""));
    client.batch_execute(&statement).await.map_err(|cause| match cause.code() {
        // The second is what the slower of two at once gets.
        Some(&(SqlState::DUPLICATE_DATABASE | SqlState::UNIQUE_VIOLATION)) => {
            error(ErrorKind::Conflict, cause)
        }
        Some(_) => error(ErrorKind::Database, cause),
        None => error(ErrorKind::Unknown, cause),
    })
}

/// For a part of a URL.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_databases_are_escaped_in_a_url() {
        assert_eq!(url(5, "orders-1", None), "postgresql://shardmq@127.0.0.1:5/orders-1");
        let password = Password::random();
        let url = url(5, "a b/ü?x", Some(&password));
        let config: tokio_postgres::Config = url.parse().unwrap();
        assert_eq!(config.get_password(), Some(password.text().as_bytes()));
        assert_eq!(config.get_dbname(), Some("a b/ü?x"));
    }
}
