//! The password of the superuser of a server, without which nobody gets in over TCP.
//!
//! It is random, so that a single iteration of SCRAM is as good as thousands, and connecting costs
//! no time. Clients, and older servers, can't be asked for one iteration; but every server takes a
//! password that was hashed before. The server's own `sha256` does the hashing here.

use std::fmt;
use std::path::Path;

use tokio_postgres::{Client, Error};
use uuid::Uuid;

use super::database::USER;
use super::folder::Folder;
use crate::Result;
use crate::store::connect::{connect_once, refused};

/// Bytes of a block of SHA-256.
const BLOCK: usize = 64;

/// Nothing shows it.
#[derive(Clone)]
pub(super) struct Password(String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    /// One that nobody guesses, of letters and digits.
    pub(super) fn random() -> Self {
        Self(format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()))
    }

    /// For a part of a URL.
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// A line of a password file, good for every address: a proxy may stand before the server.
    pub(super) fn line(&self) -> String {
        format!("*:*:*:{USER}:{}\n", self.0)
    }

    /// Gives it to the superuser, through the socket that only the user of the server may reach.
    pub(super) async fn set(&self, folder: &Folder, port: u16) -> Result<()> {
        let doing = "give the embedded server its password";
        let single = connect_once(&at_socket(&folder.run(), port), "shardmq embedded").await?;
        let client = single.client();
        let hashed = self.hashed(client).await.map_err(|error| refused(error, doing))?;
        let given = client.batch_execute(&format!("ALTER ROLE {USER} PASSWORD '{hashed}'")).await;
        given.map_err(|error| refused(error, doing))
    }

    /// As Postgres stores it, by RFC 5803.
    async fn hashed(&self, client: &Client) -> Result<String, Error> {
        let salt = *Uuid::new_v4().as_bytes();
        let salted =
            hmac(client, self.0.as_bytes(), &[&salt[..], &1_u32.to_be_bytes()].concat()).await?;
        let client_key = hmac(client, &salted, b"Client Key").await?;
        let server_key = hmac(client, &salted, b"Server Key").await?;
        let text = "SELECT format('SCRAM-SHA-256$1:%s$%s:%s', encode($1::bytea, 'base64'),
                        encode(sha256($2::bytea), 'base64'), encode($3::bytea, 'base64'))";
        let row = client.query_one(text, &[&&salt[..], &client_key, &server_key]).await?;
        Ok(row.get(0))
    }
}

/// HMAC-SHA-256 with a key of one block at most.
async fn hmac(client: &Client, key: &[u8], message: &[u8]) -> Result<Vec<u8>, Error> {
    let padded = |pad: u8| -> Vec<u8> {
        (0..BLOCK).map(|at| key.get(at).copied().unwrap_or(0) ^ pad).collect()
    };
    let inner = [&padded(0x36)[..], message].concat();
    let text = "SELECT sha256($1::bytea || sha256($2::bytea))";
    let row = client.query_one(text, &[&padded(0x5c), &inner]).await?;
    Ok(row.get(0))
}

fn at_socket(run: &Path, port: u16) -> String {
    let quoted = run.display().to_string().replace('\\', r"\\").replace('\'', r"\'");
    format!("host='{quoted}' port={port} user={USER} dbname=postgres")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_differ_fit_a_block_and_are_not_shown() {
        let (one, other) = (Password::random(), Password::random());
        assert_ne!(one.text(), other.text());
        assert!(one.text().len() <= BLOCK && one.text().bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_eq!(format!("{one:?}"), "Password");
    }
}
