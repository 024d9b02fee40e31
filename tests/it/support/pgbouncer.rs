//! A private PgBouncer in transaction mode: it gives each transaction any of its server connections.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::{Cluster, ClusterBuilder, NodeId};
use tokio::net::TcpStream;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use super::guarded::{Guarded, free_port};
use super::{TestCluster, client, database, eventually, shared_server, through};

/// What it does with a startup parameter that it does not know, as `options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// It refuses the connection: its default.
    Refused,
    /// It leaves the parameter out: `ignore_startup_parameters`.
    Ignored,
}

/// A running PgBouncer before all databases of a server. It ends when it is dropped.
pub struct PgBouncer {
    port: u16,
    program: Guarded,
}

impl PgBouncer {
    /// With so many server connections for each database.
    pub async fn start(server: &Server, pool_size: u8, unknown: Unknown) -> Self {
        loop {
            let port = free_port();
            let started = Self::launch(server.port(), port, pool_size, unknown);
            if started.is_up().await {
                return started;
            }
        }
    }

    fn launch(server_port: u16, port: u16, pool_size: u8, unknown: Unknown) -> Self {
        let ignored = if unknown == Unknown::Ignored { "options" } else { "" };
        let start = |dir: &Path| {
            std::fs::write(dir.join("users"), "\"shardmq\" \"\"\n").unwrap();
            let users = dir.join("users").display().to_string();
            // One that lost its server asks again at once.
            let config = format!(
                "[databases]\n* = host=127.0.0.1 port={server_port}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = trust\nauth_file = {users}\nadmin_users = shardmq\n\
             pool_mode = transaction\ndefault_pool_size = {pool_size}\n\
             max_client_conn = 500\nserver_login_retry = 0.05\n\
             ignore_startup_parameters = {ignored}\n"
            );
            let file = dir.join("pgbouncer.ini");
            std::fs::write(&file, config).unwrap();
            let mut command = vec![OsString::from(program())];
            command.extend(as_another_user());
            command.push(file.into());
            command
        };
        Self { port, program: Guarded::start("shardmq-pooler-", start) }
    }

    /// Waits until it takes connections; false where another took the port.
    async fn is_up(&self) -> bool {
        let decided = || async {
            let up = self.log().contains("process up");
            self.log().contains("Address already in use")
                || up && TcpStream::connect(("127.0.0.1", self.port)).await.is_ok()
        };
        eventually("the pooler takes connections", Duration::from_secs(10), decided).await;
        !self.log().contains("Address already in use")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    fn log(&self) -> String {
        self.program.log()
    }

    /// A URL that leads to the server, as one that leads here.
    pub fn url(&self, url: &str) -> String {
        through(url, self.port)
    }

    /// Its console: takes simple statements only.
    pub async fn console(&self) -> Client {
        client(&format!("postgresql://shardmq@127.0.0.1:{}/pgbouncer", self.port)).await
    }

    /// How many connections of clients there are.
    pub async fn clients(&self) -> usize {
        let rows = rows(&self.console().await, "show clients").await;
        rows.iter().filter(|row| row.get("database") != Some("pgbouncer")).count()
    }

    /// Connections of clients that it has ended, and not they, with its reasons.
    pub fn ended(&self) -> Vec<String> {
        let by_itself = |line: &&str| {
            let reason = line.split_once(" closing because: ").map_or("client", |parts| parts.1);
            line.contains(" C-")
                && !["client", "unsupported startup"].iter().any(|by| reason.starts_with(by))
        };
        self.log().lines().filter(by_itself).map(str::to_owned).collect()
    }

    /// How many server connections there are.
    pub async fn servers(&self) -> usize {
        rows(&self.console().await, "show servers").await.len()
    }
}

async fn rows(client: &Client, statement: &str) -> Vec<SimpleQueryRow> {
    let messages = client.simple_query(statement).await.unwrap();
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// Debian has it where only root looks.
fn program() -> &'static str {
    let places = ["/usr/sbin/pgbouncer", "/opt/homebrew/bin/pgbouncer", "/usr/local/bin/pgbouncer"];
    places.into_iter().find(|place| Path::new(place).exists()).unwrap_or("pgbouncer")
}

/// It refuses to run as root.
fn as_another_user() -> Vec<OsString> {
    let id = |arguments: &[&str]| {
        let output = Command::new("id").args(arguments).output().unwrap();
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if id(&["-u"]).as_deref() != Some("0") {
        return Vec::new();
    }
    let user = ["postgres", "nobody"].into_iter().find(|user| id(&["-u", user]).is_some());
    vec!["-u".into(), user.expect("a user other than root").into()]
}

/// A cluster of one node whose data and control connections all go through a port; the test's own SQL
/// goes straight.
pub async fn cluster_through(server: &Server, port: u16) -> TestCluster {
    cluster_with(server, port, |builder| builder).await
}

/// The same, with more settings.
pub async fn cluster_with(
    server: &Server,
    port: u16,
    settings: impl FnOnce(ClusterBuilder) -> ClusterBuilder,
) -> TestCluster {
    let url = database(server).await;
    let pooled = through(&url, port);
    let builder = Cluster::builder(&pooled).upkeep(false);
    let cluster = settings(builder).connect().await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &pooled).await.unwrap();
    TestCluster { cluster, control_url: pooled, node_urls: vec![url] }
}

/// What the sessions of a database's only server connection know by name: statements and channels.
pub async fn left_in_session(pooled_url: &str) -> Vec<String> {
    let asks = "select name from pg_prepared_statements
                union all select channel from pg_listening_channels() channel";
    let rows = rows(&client(pooled_url).await, asks).await;
    rows.iter().map(|row| row.get(0).unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_pooler_shares_its_server_connections_and_ends_with_its_folder() {
    let server = shared_server().await;
    let pooler = PgBouncer::start(server, 1, Unknown::Refused).await;
    let url = pooler.url(&server.url("postgres"));
    let (one, other) = (client(&url).await, client(&url).await);
    let pid = async |client: &Client| {
        let rows = rows(client, "select pg_backend_pid()").await;
        rows[0].get(0).unwrap().to_owned()
    };
    assert_eq!(pid(&one).await, pid(&other).await);
    assert_eq!((pooler.clients().await, pooler.servers().await), (2, 1));
    let dir = pooler.program.dir().to_owned();
    drop(pooler);
    assert!(!dir.exists());
    assert!(one.simple_query("select 1").await.is_err());
}
