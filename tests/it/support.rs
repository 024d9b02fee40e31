//! Servers and databases for tests. One Postgres serves all tests that do no harm to it; each test
//! has databases of its own, cloned from a migrated template.

use std::future::Future;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, NodeId};
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub mod authority;
pub mod clocks;
pub mod guarded;
pub mod held;
pub mod hints;
pub mod pgbouncer;
pub mod proxy;
pub mod put_back;
pub mod reading;
pub mod redis;
pub mod relays;
pub mod said;
pub mod senders;
pub mod signals;
pub mod small_disk;
pub mod standby_away;
pub mod standbys;
pub mod stored;
mod watchdog;

/// The runtime of what outlives a test: each test has a runtime of its own.
static BACKGROUND: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
});

static SHARED: OnceCell<Server> = OnceCell::const_new();

const TEMPLATE: &str = "shardmq_template";

/// The Postgres that tests share. They must not restart it, nor change its settings.
pub async fn shared_server() -> &'static Server {
    set_up();
    SHARED
        .get_or_init(|| async {
            BACKGROUND
                .spawn(async { prepared(Server::builder().durable(false)).await })
                .await
                .unwrap()
        })
        .await
}

/// Sees to it that a test that hangs is ended. Shows what the library logs where `RUST_LOG` asks
/// for it, and keeps what it says of trouble.
fn set_up() {
    watchdog::watched();
    let shown = tracing_subscriber::fmt::layer().with_test_writer();
    let shown = shown.with_filter(tracing_subscriber::EnvFilter::from_default_env());
    let kept = said::Keep.with_filter(LevelFilter::INFO);
    let _ = tracing_subscriber::registry().with(shown).with(kept).try_init();
}

/// A Postgres of the test's own, to be stopped and broken.
pub async fn own_server() -> Server {
    prepared(Server::builder().durable(false)).await
}

/// Starts a server and makes the migrated template in it.
pub async fn prepared(builder: shardmq::embedded::ServerBuilder) -> Server {
    set_up();
    // Tests add its addresses as nodes, of which the control database keeps no password.
    let server = builder.trusts_everybody().start().await.unwrap();
    prepare(&server).await;
    server
}

/// Makes the migrated template.
pub async fn prepare(server: &Server) {
    watchdog::serves(server.url("postgres"));
    server.create_database(TEMPLATE).await.unwrap();
    let url = server.url(TEMPLATE);
    for schema in [Schema::Control, Schema::Log, Schema::Node, Schema::Dedup] {
        migrate(&url, schema).await.unwrap();
    }
}

/// A migrated database, not yet a node of any cluster. Returns its URL.
pub async fn database(server: &Server) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    set_up();
    let name = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let admin = client(&server.url("postgres")).await;
    admin.batch_execute(&format!("create database {name} template {TEMPLATE}")).await.unwrap();
    server.url(&name)
}

/// The same database, through another port.
pub fn through(url: &str, port: u16) -> String {
    let (before, rest) = url.split_once("127.0.0.1:").unwrap();
    let (_, database) = rest.split_once('/').unwrap();
    format!("{before}127.0.0.1:{port}/{database}")
}

/// A cluster of its own for one test: the control schema in the first node's database.
pub struct TestCluster {
    pub cluster: Cluster,
    pub control_url: String,
    pub node_urls: Vec<String>,
}

impl TestCluster {
    /// On the shared server, with so many nodes.
    pub async fn new(nodes: u8) -> Self {
        Self::on(shared_server().await, nodes).await
    }

    /// On this server.
    pub async fn on(server: &Server, nodes: u8) -> Self {
        let mut node_urls = Vec::new();
        for _ in 0..nodes {
            node_urls.push(database(server).await);
        }
        Self::of(node_urls).await
    }

    /// Of these migrated databases.
    pub async fn of(node_urls: Vec<String>) -> Self {
        let control_url = node_urls[0].clone();
        // Upkeep takes locks when it likes: tests that want it ask for it.
        let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
        for (url, number) in node_urls.iter().zip(1..) {
            cluster.add_node(NodeId::new(number).unwrap(), url).await.unwrap();
        }
        Self { cluster, control_url, node_urls }
    }

    /// A plain connection to a node's database, counted from 0.
    pub async fn sql(&self, node: usize) -> Client {
        client(&self.node_urls[node]).await
    }
}

/// A plain connection.
pub async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Waits until something holds, and fails with its name after the deadline.
pub async fn eventually<F: Future<Output = bool>>(
    what: &str,
    deadline: Duration,
    mut holds: impl FnMut() -> F,
) {
    let until = tokio::time::Instant::now() + deadline;
    while !holds().await {
        assert!(tokio::time::Instant::now() < until, "not within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Fails where a future takes longer: a stall is a defect of its own.
pub async fn within<T>(deadline: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(deadline, future)
        .await
        .unwrap_or_else(|_| panic!("not within {deadline:?}: {what}"))
}
