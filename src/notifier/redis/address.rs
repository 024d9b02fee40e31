//! Where a Redis is.

use std::fmt;
use std::time::Duration;

use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError, TlsMode};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};

/// Where the password is that an address lacks.
const PASSWORD: &str = "SHARDMQ_REDIS_PASSWORD";
const PASSWORD_FROM: &str =
    " (the password is taken from the address, or from SHARDMQ_REDIS_PASSWORD)";
/// The port of Sentinels where none is given.
const SENTINEL_PORT: u16 = 26_379;
/// How long all Sentinels together may take.
const ASK: Duration = Duration::from_secs(5);

/// The servers of one address. Prints without what is secret in it.
pub(super) struct Address {
    /// The scheme and the hosts.
    shown: String,
    way: Way,
}

enum Way {
    /// Tried in turn.
    Hosts(Vec<Client>),
    /// Asked for the master.
    Sentinels(Box<tokio::sync::Mutex<SentinelClient>>),
}

impl Address {
    pub(super) fn parse(url: &str) -> Result<Self> {
        let password = std::env::var(PASSWORD).ok().filter(|text| !text.is_empty());
        Self::with_password(url, password.as_deref())
    }

    fn with_password(url: &str, password: Option<&str>) -> Result<Self> {
        // What is no address may have its password anywhere: nothing of it is shown.
        let what = || format!("no Redis address: {FORMS}");
        let none = || Error::new(ErrorKind::Invalid, what());
        let parts = Parts::of(url).ok_or_else(none)?;
        let invalid = |error: RedisError| Error::with_source(ErrorKind::Invalid, what(), error);
        let way = match parts.scheme.strip_suffix("+sentinel") {
            Some(scheme) => parts.sentinels(scheme, password).map_err(invalid)?,
            None => parts.hosts(password).map_err(invalid)?,
        };
        let scheme = parts.scheme.to_ascii_lowercase();
        if matches!(scheme.trim_end_matches("+sentinel"), "rediss" | "valkeys") {
            have_cryptography();
        }
        Ok(Self { shown: format!("{}://{}", parts.scheme, parts.hosts), way })
    }

    /// How many servers may be tried one after the other.
    pub(super) fn count(&self) -> usize {
        match &self.way {
            Way::Hosts(all) => all.len(),
            Way::Sentinels(_) => 1,
        }
    }

    /// A client of the nth server to be tried.
    pub(super) async fn client(&self, nth: usize) -> Result<Client> {
        match &self.way {
            Way::Hosts(all) => {
                let at = nth % all.len().max(1);
                let none = || Error::new(ErrorKind::Invalid, "a Redis address without hosts");
                all.get(at).cloned().ok_or_else(none)
            }
            Way::Sentinels(sentinels) => {
                let what = self.what("ask the Sentinels of");
                let asking = async { sentinels.lock().await.async_get_client().await };
                let late = |_| Error::new(ErrorKind::Unavailable, format!("{what}: no answer"));
                let asked = timeout(ASK, asking).await.map_err(late)?;
                asked.map_err(|error| Self::refused(&what, error))
            }
        }
    }

    /// What is done with it, for errors.
    pub(super) fn what(&self, verb: &str) -> String {
        format!("{verb} {}", self.shown)
    }

    /// Redis' errors say what is wrong and show no password.
    pub(super) fn refused(what: &str, error: RedisError) -> Error {
        let locked_out = error.kind() == redis::ErrorKind::AuthenticationFailed;
        let remedy = match error.code() {
            _ if locked_out => PASSWORD_FROM,
            Some("NOAUTH" | "WRONGPASS") => PASSWORD_FROM,
            Some("NOPERM") => {
                " (the user needs +publish +subscribe +unsubscribe, and &shardmq:* for the channels)"
            }
            _ => "",
        };
        Error::with_source(ErrorKind::Unavailable, format!("{what}{remedy}"), error)
    }
}

/// The library of Redis takes the process' default, and panics where there is none and several could be it.
fn have_cryptography() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Somebody may have been quicker.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Address").field(&self.shown).finish()
    }
}

const FORMS: &str = "redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DB], rediss:// with TLS, \
                     redis+unix:///PATH, or redis+sentinel://HOST[:PORT][,...]/NAME[/DB]";

/// `scheme://[user@]hosts[/rest]`.
struct Parts<'a> {
    scheme: &'a str,
    /// With its `@`.
    user: &'a str,
    hosts: &'a str,
    /// With its `/`, `?` or `#`.
    rest: &'a str,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Option<Self> {
        let (scheme, rest) = url.trim().split_once("://")?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        let at = authority.rfind('@').map_or(0, |at| at + 1);
        let (user, hosts) = authority.split_at(at);
        // A password with a character that ends the hosts: it must be percent-encoded.
        (!rest.contains('@')).then_some(Self { scheme, user, hosts, rest })
    }

    fn hosts(&self, password: Option<&str>) -> Result<Way, RedisError> {
        let client = |host: &str| {
            let url = format!("{}://{}{host}{}", self.scheme, self.user, self.rest);
            let info = with_password(url.into_connection_info()?, password);
            Client::open(info)
        };
        let all = self.hosts.split(',').map(client).collect::<Result<_, _>>()?;
        Ok(Way::Hosts(all))
    }

    fn sentinels(&self, scheme: &str, password: Option<&str>) -> Result<Way, RedisError> {
        let name_and_db = self.rest.trim_start_matches('/');
        let end = name_and_db.find(['/', '?', '#']).unwrap_or(name_and_db.len());
        let (name, rest) = name_and_db.split_at(end);
        if name.is_empty() {
            return Err(
                (redis::ErrorKind::InvalidClientConfig, "the master's name is missing").into()
            );
        }
        let parsed = |host: &str| {
            let url = format!("{scheme}://{}{}{rest}", self.user, with_port(host));
            url.into_connection_info()
        };
        let infos: Vec<_> = self.hosts.split(',').map(parsed).collect::<Result<_, _>>()?;
        let addresses: Vec<ConnectionAddr> = infos.iter().map(|info| info.addr().clone()).collect();
        let builder = SentinelClientBuilder::new(addresses, name, SentinelServerType::Master)?;
        let Some(info) = infos.into_iter().next() else {
            return Err((redis::ErrorKind::InvalidClientConfig, "no Sentinel").into());
        };
        let info = with_password(info, password);
        let mut builder = builder.set_client_to_redis_db(info.redis_settings().db());
        if let Some(username) = info.redis_settings().username() {
            builder = builder.set_client_to_redis_username(username);
        }
        if let Some(password) = info.redis_settings().password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let ConnectionAddr::TcpTls { insecure, .. } = info.addr() {
            let mode = if *insecure { TlsMode::Insecure } else { TlsMode::Secure };
            builder = builder.set_client_to_redis_tls_mode(mode);
        }
        Ok(Way::Sentinels(Box::new(tokio::sync::Mutex::new(builder.build()?))))
    }
}

/// The address's own password, or this one.
fn with_password(info: ConnectionInfo, password: Option<&str>) -> ConnectionInfo {
    match password {
        Some(password) if info.redis_settings().password().is_none() => {
            let settings = info.redis_settings().clone().set_password(password);
            info.set_redis_settings(settings)
        }
        _ => info,
    }
}

fn with_port(host: &str) -> String {
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { host.to_owned() } else { format!("{host}:{SENTINEL_PORT}") }
}

/// The same address, as it may be stored and shown: without a password.
pub(crate) fn without_password(url: &str) -> Result<String> {
    Address::with_password(url, None)?;
    let Some(parts) = Parts::of(url) else { return Ok(url.to_owned()) };
    let user = parts.user.trim_end_matches('@').split(':').next().unwrap_or_default();
    let at = if user.is_empty() { "" } else { "@" };
    let address = format!("{}://{user}{at}{}{}", parts.scheme, parts.hosts, parts.rest);
    let secret = |part: &str| ["pass=", "password="].iter().any(|name| part.starts_with(name));
    if parts.rest.split(['?', '&', '#']).any(secret) {
        let what = "a Redis address with a password in its query is not stored: give the password apart, in \
                    SHARDMQ_REDIS_PASSWORD";
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(url: &str, password: Option<&str>) -> Vec<ConnectionInfo> {
        match Address::with_password(url, password).unwrap().way {
            Way::Hosts(all) => {
                all.iter().map(|client| client.get_connection_info().clone()).collect()
            }
            Way::Sentinels(_) => panic!("no hosts"),
        }
    }

    #[test]
    fn several_hosts_share_all_else() {
        let infos = hosts("rediss://u:p@one,two:7000/3", Some("other"));
        let addresses: Vec<String> = infos.iter().map(|info| info.addr().to_string()).collect();
        assert_eq!(addresses, ["one:6379", "two:7000"]);
        for info in &infos {
            let settings = info.redis_settings();
            let found = (settings.username(), settings.password(), settings.db());
            assert_eq!(found, (Some("u"), Some("p"), 3));
            assert!(matches!(info.addr(), ConnectionAddr::TcpTls { insecure: false, .. }));
        }
        let infos = hosts("valkey://u@one", Some("other"));
        assert_eq!(infos[0].redis_settings().password(), Some("other"));
        assert_eq!(
            hosts("redis+unix:///run/redis.sock", None)[0].addr().to_string(),
            "/run/redis.sock"
        );
    }

    #[test]
    fn sentinels_are_asked_at_their_port() {
        let address = Address::parse("redis+sentinel://u:secret@one,two:7000/master/2").unwrap();
        assert!(matches!(address.way, Way::Sentinels(_)));
        assert_eq!(format!("{address:?}"), r#"Address("redis+sentinel://one,two:7000")"#);
        assert_eq!(with_port("one"), "one:26379");
        assert_eq!(with_port("[::1]"), "[::1]:26379");
        assert_eq!(with_port("[::1]:7000"), "[::1]:7000");
    }

    #[test]
    fn what_is_none_is_refused_and_its_password_not_shown() {
        for url in [
            "",
            "one:6379",
            "http://x",
            "redis://u:secret@one:port",
            "redis+sentinel://u:secret@one",
            "redis://u:secret@one/x",
            "redis://u:secret#@one",
            "redis://u:secret/3@one",
            "redis://u:secret?x@one",
        ] {
            let error = Address::parse(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
            assert!(!error.chain().contains("secret"), "{}", error.chain());
        }
    }

    #[test]
    fn passwords_are_left_out() {
        for (url, expected) in [
            ("redis://u:p@one,two:7000/3", "redis://u@one,two:7000/3"),
            ("redis://:p@one", "redis://one"),
            ("redis://one", "redis://one"),
            ("redis+sentinel://:p@one/m", "redis+sentinel://one/m"),
        ] {
            assert_eq!(without_password(url).unwrap(), expected);
        }
        let error = without_password("redis+unix:///run/redis.sock?db=1&pass=secret").unwrap_err();
        assert!(!error.chain().contains("secret"), "{}", error.chain());
    }
}
