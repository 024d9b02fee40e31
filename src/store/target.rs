//! Where a connection string leads: the one place that opens connections.
//!
//! ```text
//! each host ─> each of its addresses ─> plain or TLS ─> a session of the wanted kind
//!   │ next, if it was refused or silent for too long
//!   v
//! ```

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt, stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts, TargetSessionAttrs};
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls, Socket};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::store::failed::CutWait;
use crate::store::passfile::{self, Lines, Login};
use crate::store::pooler::{Marker, refuses_options};
use crate::store::tls::{Connector, Encryption, Tls};

mod failure;

use failure::{Failure, error_of};

/// How long a server may take to let us in, once it was reached.
const ENTRY_TIMEOUT: Duration = Duration::from_secs(1);

/// What a server says by itself. To take from it is what drives the connection.
pub(crate) type Messages =
    Pin<Box<dyn Stream<Item = Result<AsyncMessage, tokio_postgres::Error>> + Send>>;

/// An open connection.
pub(crate) struct Opened {
    pub(crate) client: Client,
    pub(crate) messages: Messages,
    /// Whether it was opened with the marker that was asked for.
    pub(crate) marked: bool,
    /// The number of its host in the address.
    pub(crate) host: usize,
}

/// A host that has an older primary than is known.
#[derive(Debug)]
pub(crate) struct Older {
    /// Its number in the address.
    pub(crate) host: usize,
    pub(crate) why: String,
}

/// A parsed connection string.
#[derive(Debug)]
pub(crate) struct Target {
    /// All that tokio-postgres knows; with a password only where the string or `PGPASSWORD` has
    /// one.
    pub(crate) config: Config,
    tls: Tls,
    passfile: Option<PathBuf>,
    /// The host to begin with, where it does not matter which one takes us.
    first: AtomicUsize,
}

impl Target {
    /// Of a configuration with a connect timeout and at least one host.
    pub(super) fn new(config: Config, tls: Tls, passfile: Option<PathBuf>) -> Self {
        Self { config, tls, passfile, first: AtomicUsize::new(0) }
    }

    /// How long to wait for one address at most.
    fn limit(&self) -> Duration {
        self.config.get_connect_timeout().copied().unwrap_or_default() + ENTRY_TIMEOUT
    }

    /// How long to wait for all hosts.
    pub(crate) fn patience(&self) -> Duration {
        self.limit() * u32::try_from(self.config.get_hosts().len()).unwrap_or(u32::MAX)
    }

    /// Opens a connection to the first host that takes us and whose session is as wanted, with a
    /// marker where that is taken too. Hosts with an older primary are left out. Passwords and
    /// certificates are read from their files each time, so that they can be replaced. The error
    /// begins with `what`.
    pub(crate) fn connect<'a>(
        &'a self,
        what: &'a str,
        marker: Option<&'a Marker>,
        older: &'a [Older],
    ) -> BoxFuture<'a, Result<Opened>> {
        // Boxed: it is large, seldom, and deep inside of most futures of this library.
        Box::pin(self.connect_to_any(what, marker, older))
    }

    async fn connect_to_any(
        &self,
        what: &str,
        marker: Option<&Marker>,
        passed: &[Older],
    ) -> Result<Opened> {
        let keys = self.keys(marker).await;
        let keys = keys.map_err(|error| Error::with_source(error.kind(), what, error))?;
        let refused = |older: &Older| (self.place(older.host), Failure::Older(older.why.clone()));
        let mut failures: Vec<_> = passed.iter().map(refused).collect();
        let order = self.order();
        let hosts = order.len();
        let is_older = |index: &usize| passed.iter().any(|older| older.host == *index);
        for index in order.into_iter().filter(|index| !is_older(index)) {
            let attempt = Attempt { first: &self.first, index, next: (index + 1) % hosts };
            match self.connect_to_host(index, &keys).await {
                Ok(opened) => {
                    attempt.succeeded();
                    return Ok(opened);
                }
                Err(failure) => failures.push((self.place(index), failure)),
            }
        }
        Err(error_of(failures, what))
    }

    /// The numbers of the hosts, in the order in which to try them. Where only the primary will do,
    /// it is first looked for where it was found last.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.config.get_hosts().len()).collect();
        if self.config.get_load_balance_hosts() == LoadBalanceHosts::Random {
            order.sort_by_cached_key(|_| Uuid::new_v4());
        } else if self.config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite {
            order.rotate_left(self.first.load(Ordering::Relaxed));
        }
        order
    }

    /// How many hosts the address has.
    pub(super) fn hosts(&self) -> usize {
        self.config.get_hosts().len()
    }

    /// Opens a connection to one host, whatever was found there before.
    pub(super) async fn open_at(&self, index: usize) -> Result<Opened> {
        let what = || format!("connect to {}", self.place(index));
        let keys = self.keys(None).await?;
        self.connect_to_host(index, &keys).await.map_err(|failure| failure.into_error(&what()))
    }

    /// All hosts with their ports.
    pub(super) fn places(&self) -> BTreeSet<String> {
        (0..self.hosts()).map(|index| self.place(index)).collect()
    }

    /// A host of the address with its port.
    pub(super) fn place(&self, index: usize) -> String {
        let host = match self.config.get_hosts().get(index) {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => String::new(),
        };
        format!("{host}:{}", port(&self.config, index))
    }

    async fn connect_to_host(&self, index: usize, keys: &Keys<'_>) -> Result<Opened, Failure> {
        let config = keys.with_password(one_host(&self.config, index));
        let mut failure = Failure::Silent;
        for address in self.addresses(&config).await? {
            let mut config = config.clone();
            if let Some(address) = address {
                config.hostaddr(address);
            }
            match timeout(self.limit(), self.enter(config, keys)).await {
                Ok(Ok(opened)) => return Ok(Opened { host: index, ..opened }),
                Ok(Err(error)) => failure = Failure::Refused(error),
                Err(_) => failure = Failure::Silent,
            }
        }
        Err(failure)
    }

    /// The addresses of a host; `None` where there is nothing to look up. Each has its own time,
    /// since one may be silent that another stands in for.
    async fn addresses(&self, config: &Config) -> Result<Vec<Option<IpAddr>>, Failure> {
        let name = match config.get_hosts() {
            [Host::Tcp(name)] if config.get_hostaddrs().is_empty() => name,
            _ => return Ok(vec![None]),
        };
        if name.parse::<IpAddr>().is_ok() {
            return Ok(vec![None]);
        }
        let found = timeout(self.limit(), tokio::net::lookup_host((name.as_str(), 0))).await;
        let found = found.map_err(|_| Failure::Silent)?.map_err(Failure::Unknown)?;
        Ok(found.map(|address| Some(address.ip())).collect())
    }

    async fn enter(
        &self,
        mut config: Config,
        keys: &Keys<'_>,
    ) -> Result<Opened, tokio_postgres::Error> {
        let is_socket = matches!(config.get_hosts(), [Host::Unix(_)]);
        let mut encryptions = self.tls.encryptions(is_socket).iter().copied().peekable();
        loop {
            let encryption = encryptions.next().unwrap_or(Encryption::Plain);
            encryption.set(&mut config);
            let connector = keys.connector.as_ref().filter(|_| encryption != Encryption::Plain);
            match open_marked(&config, connector, keys.marker).await {
                Err(error) if encryptions.peek().is_some() && encryption.is_refused_by(&error) => {
                    tracing::debug!(error = %crate::error::chain(&error), ?encryption, "refused");
                }
                outcome => return outcome,
            }
        }
    }

    /// What ends a statement of a connection that was opened here.
    pub(super) async fn canceller(&self) -> Result<Canceller> {
        Ok(Canceller { connector: self.keys(None).await?.connector })
    }

    async fn keys<'a>(&self, marker: Option<&'a Marker>) -> Result<Keys<'a>> {
        let passfile = self.passfile.clone().filter(|_| !has_password(&self.config));
        let tls = self.tls.clone();
        let read = move || {
            let connector = tls.connector()?;
            Ok((connector, passfile.and_then(|path| passfile::read(&path))))
        };
        let (connector, passwords) =
            tokio::task::spawn_blocking(read).await.map_err(|error| {
                Error::with_source(
                    ErrorKind::Closed,
                    "read the files of the connection string",
                    error,
                )
            })??;
        Ok(Keys { connector, passwords, marker })
    }
}

/// Asks a server to end what a connection is at.
pub(super) struct Canceller {
    connector: Option<Connector>,
}

impl Canceller {
    /// Asks once, encrypted as the connection is.
    pub(super) async fn cancel(&self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let token = client.cancel_token();
        match &self.connector {
            Some(connector) => token.cancel_query(Connector::clone(connector)).await,
            None => token.cancel_query(NoTls).await,
        }
    }
}

/// An attempt at one host. Until it is over, it changes nothing for those who connect meanwhile.
/// Whoever gives up on it, by a failure or by being dropped, makes the next one begin with the next
/// host.
struct Attempt<'a> {
    first: &'a AtomicUsize,
    index: usize,
    next: usize,
}

impl Attempt<'_> {
    fn succeeded(self) {
        self.first.store(self.index, Ordering::Relaxed);
        std::mem::forget(self);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        // Not where another attempt has found a better one by now.
        let (from, to) = (self.index, self.next);
        let _ = self.first.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// What to enter with: what was read from files, and the marker.
struct Keys<'a> {
    connector: Option<Connector>,
    passwords: Option<Lines>,
    marker: Option<&'a Marker>,
}

impl Keys<'_> {
    /// With the password for its host, where it has none yet.
    fn with_password(&self, mut config: Config) -> Config {
        let (Some(lines), false) = (&self.passwords, has_password(&config)) else {
            return config;
        };
        // As tokio-postgres and the server fill them in.
        let user = config.get_user().map(str::to_owned).or_else(|| whoami::username().ok());
        if let (Some(user), [host]) = (user, config.get_hosts()) {
            let database = config.get_dbname().unwrap_or(&user);
            let login = Login { host, port: port(&config, 0), database, user: &user };
            if let Some(password) = lines.password(login) {
                config.password(password);
            }
        }
        config
    }
}

/// With the marker, or without it where it is refused.
async fn open_marked(
    config: &Config,
    connector: Option<&Connector>,
    marker: Option<&Marker>,
) -> Result<Opened, tokio_postgres::Error> {
    if let Some(marker) = marker {
        match open(&marker.added_to(config), connector).await {
            Ok(opened) => return Ok(Opened { marked: true, ..opened }),
            Err(error) if refuses_options(&error) => {}
            Err(error) => return Err(error),
        }
    }
    open(config, connector).await
}

async fn open(
    config: &Config,
    connector: Option<&Connector>,
) -> Result<Opened, tokio_postgres::Error> {
    if let Some(connector) = connector {
        let (client, connection) = config.connect(Connector::clone(connector)).await?;
        return Ok(Opened { client, messages: messages(connection), marked: false, host: 0 });
    }
    let (client, connection) = config.connect(NoTls).await?;
    Ok(Opened { client, messages: messages(connection), marked: false, host: 0 })
}

fn messages<S>(mut connection: Connection<Socket, S>) -> Messages
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Box::pin(stream::poll_fn(move |context| connection.poll_message(context)))
}

/// An empty one is none, as in libpq.
pub(super) fn has_password(config: &Config) -> bool {
    config.get_password().is_some_and(|password| !password.is_empty())
}

/// Drives a connection until its client is gone, for a caller that has no use for its messages. A
/// wait for a standby that was cut short is noted before the commit's answer arrives.
pub(crate) async fn drive(mut messages: Messages, cut: CutWait) {
    while let Some(message) = messages.next().await {
        match message {
            Ok(AsyncMessage::Notice(notice)) => {
                cut.note(&notice);
                tracing::debug!(severity = notice.severity(), "{}", notice.message());
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(error = %crate::error::chain(&error), "connection ended");
                return;
            }
        }
    }
}

pub(super) fn port(config: &Config, index: usize) -> u16 {
    let ports = config.get_ports();
    ports.get(index).or(ports.first()).copied().unwrap_or(5432)
}

/// The same configuration with only one of its hosts.
fn one_host(config: &Config, index: usize) -> Config {
    let mut one = Config::new();
    match config.get_hosts().get(index) {
        Some(Host::Tcp(name)) => one.host(name),
        Some(Host::Unix(path)) => one.host_path(path),
        None => &mut one,
    };
    if let Some(address) = config.get_hostaddrs().get(index) {
        one.hostaddr(*address);
    }
    one.port(port(config, index));
    config.get_user().map(|user| one.user(user));
    config.get_password().map(|password| one.password(password));
    config.get_dbname().map(|name| one.dbname(name));
    config.get_options().map(|options| one.options(options));
    config.get_application_name().map(|name| one.application_name(name));
    config.get_connect_timeout().map(|time| one.connect_timeout(*time));
    config.get_tcp_user_timeout().map(|time| one.tcp_user_timeout(*time));
    config.get_keepalives_interval().map(|time| one.keepalives_interval(time));
    config.get_keepalives_retries().map(|retries| one.keepalives_retries(retries));
    one.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_negotiation(config.get_ssl_negotiation())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    one
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::connect;

    fn target(url: &str) -> Target {
        connect::parse(url).unwrap()
    }

    #[test]
    fn a_host_keeps_all_that_was_said() {
        let url = "host=h hostaddr=127.0.0.1 port=7 user=u password=p dbname=d options='-c a=b' \
            application_name=a connect_timeout=3 tcp_user_timeout=4 keepalives=0 keepalives_idle=5 \
            keepalives_interval=6 keepalives_retries=7 sslnegotiation=direct \
            target_session_attrs=read-only channel_binding=require load_balance_hosts=random";
        let config: Config = url.parse().unwrap();
        assert_eq!(one_host(&config, 0), config);
    }

    #[test]
    fn each_host_has_its_own_port_and_address() {
        let one = |index| {
            one_host(&target("host=a,/run,c hostaddr=::1,::2,::3 port=1,2,3").config, index)
        };
        assert_eq!(one(1).get_hosts(), [Host::Unix("/run".into())]);
        assert_eq!(
            (one(2).get_ports(), one(2).get_hostaddrs()),
            (&[3][..], &["::3".parse().unwrap()][..])
        );
        assert_eq!(one_host(&target("host=a,b port=9").config, 1).get_ports(), [9]);
    }

    #[test]
    fn the_primary_is_looked_for_where_it_was_last() {
        let order = |url: &str, first| {
            let target = target(url);
            target.first.store(first, Ordering::Relaxed);
            target.order()
        };
        let url = "postgresql://a,b,c/d?target_session_attrs=";
        assert_eq!(order(&format!("{url}read-write"), 1), [1, 2, 0]);
        assert_eq!(order(&format!("{url}any"), 1), [0, 1, 2]);
        let mut shuffled = order(&format!("{url}any&load_balance_hosts=random"), 0);
        shuffled.sort_unstable();
        assert_eq!(shuffled, [0, 1, 2]);
    }

    #[tokio::test]
    async fn an_attempt_under_way_does_not_send_others_elsewhere_and_one_given_up_does() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let target = target(&format!(
            "postgresql://u@127.0.0.1:1,127.0.0.1:{port}/d?target_session_attrs=read-write"
        ));
        target.first.store(1, Ordering::Relaxed);
        let mut attempt = target.connect("connect", None, &[]);
        tokio::select! {
            _ = &mut attempt => panic!("nobody answers"),
            accepted = silent.accept() => drop(accepted.unwrap()),
        }
        assert_eq!(target.order(), [1, 0]);
        drop(attempt);
        assert_eq!(target.order(), [0, 1]);
    }
}
