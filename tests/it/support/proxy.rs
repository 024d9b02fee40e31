//! A TCP proxy between a library and its server: it can hold, swallow, delay and cut what passes, each
//! way by itself, for all connections or for single ones.
//!
//! What a client has sent is taken from it at once and kept here, also after the client has gone: a
//! held pipeline whose client gave up reaches the server when it is let go, as one does that hung in a
//! socket's buffer.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{TestCluster, client, database, shared_server, through};
use shardmq::{Cluster, NodeId};

/// What happens to bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rule {
    /// They pass.
    #[default]
    Pass,
    /// They pass so long after they came.
    Delay(Duration),
    /// They pass as on a line of so many bytes a second.
    Slow(u64),
    /// They wait here until there is another rule.
    Hold,
    /// They are thrown away.
    Swallow,
    /// What comes in pieces of at least so many bytes is held, and all after it.
    HoldLarge(usize),
    /// So many more pass, what follows is held.
    HoldAfter(u64),
    /// So many more pass, then the connection is cut.
    CutAfter(u64),
}

/// One way of a connection.
#[derive(Debug)]
pub struct Way {
    rule: watch::Sender<Rule>,
    bytes: AtomicU64,
    /// Bytes that came in, passed or not.
    received: AtomicU64,
    ended: AtomicBool,
}

impl Way {
    fn new(rule: Rule) -> Self {
        Self {
            rule: watch::Sender::new(rule),
            bytes: AtomicU64::new(0),
            received: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    pub fn set(&self, rule: Rule) {
        self.rule.send_replace(rule);
    }

    /// How many bytes have passed.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// How many bytes wait here, or were swallowed.
    pub fn kept(&self) -> u64 {
        // In this order: what comes and passes between the two is not kept.
        let passed = self.bytes();
        self.received.load(Ordering::SeqCst) - passed
    }

    /// Whether whoever sends here has closed its end, or the connection was cut.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits until some of so many bytes may go on. Some(0): they are swallowed. None: the end.
    async fn admit(&self, wanted: usize, came: Instant) -> Option<usize> {
        let mut rules = self.rule.subscribe();
        loop {
            let rule = *rules.borrow_and_update();
            let admitted = match rule {
                Rule::Pass => return Some(wanted),
                Rule::Delay(delay) if came.elapsed() >= delay => return Some(wanted),
                Rule::Delay(delay) => {
                    // Another rule counts at once.
                    let _ = timeout_at(came + delay, rules.changed()).await;
                    continue;
                }
                Rule::Slow(rate) => {
                    let seconds = u64::try_from(wanted).unwrap();
                    let time = Duration::from_secs(seconds) / u32::try_from(rate).unwrap();
                    // Another rule counts at once.
                    if timeout_at(Instant::now() + time, rules.changed()).await.is_err() {
                        return Some(wanted);
                    }
                    continue;
                }
                Rule::Swallow => return Some(0),
                Rule::CutAfter(0) => return None,
                Rule::HoldAfter(left) | Rule::CutAfter(left) => self.spend(rule, left, wanted),
                Rule::HoldLarge(size) if wanted < size => return Some(wanted),
                Rule::HoldLarge(_) => {
                    self.change(rule, Rule::Hold);
                    0
                }
                Rule::Hold => 0,
            };
            if admitted > 0 {
                return Some(admitted);
            }
            rules.changed().await.ok()?;
        }
    }

    /// Follows up a rule, unless there is another by now.
    fn change(&self, seen: Rule, then: Rule) {
        self.rule.send_if_modified(|rule| {
            if *rule == seen {
                *rule = then;
            }
            false
        });
    }

    /// Takes bytes from what a rule still lets pass.
    fn spend(&self, seen: Rule, left: u64, wanted: usize) -> usize {
        let admitted = left.min(wanted as u64);
        let rest = left - admitted;
        let then = match seen {
            Rule::HoldAfter(_) => Rule::HoldAfter(rest),
            _ => Rule::CutAfter(rest),
        };
        self.change(seen, then);
        usize::try_from(admitted).unwrap()
    }
}

/// One connection through the proxy.
#[derive(Debug)]
pub struct Link {
    pub to_server: Way,
    pub to_client: Way,
    end: CancellationToken,
}

impl Link {
    /// Closes both sides at once; what was held is lost.
    pub fn cut(&self) {
        self.end.cancel();
    }
}

#[derive(Default)]
struct Shared {
    links: Mutex<Vec<Arc<Link>>>,
    /// For connections to come: to the server, to the client.
    rules: Mutex<(Rule, Rule)>,
    /// Where they lead.
    server_port: AtomicU16,
    refusing: AtomicBool,
}

/// The proxy; it ends when it is dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    _accept: AbortOnDropHandle<()>,
}

impl Proxy {
    /// A way to a server on this machine.
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Shared { server_port: AtomicU16::new(server_port), ..Shared::default() };
        let shared = Arc::new(shared);
        let accept = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { port, shared, _accept: AbortOnDropHandle::new(accept) }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A URL that leads to the server, as one that leads here.
    pub fn url(&self, url: &str) -> String {
        through(url, self.port)
    }

    /// A rule for what goes to the server, on connections that are open and those to come.
    pub fn to_server(&self, rule: Rule) {
        self.to_server_but_on(rule, None);
    }

    /// The same, but for one connection, which keeps its own.
    pub fn to_server_but_on(&self, rule: Rule, kept: Option<&Arc<Link>>) {
        self.shared.rules.lock().unwrap().0 = rule;
        for link in self.links() {
            if kept.is_none_or(|kept| !Arc::ptr_eq(kept, &link)) {
                link.to_server.set(rule);
            }
        }
    }

    /// A rule for what goes to the client.
    pub fn to_client(&self, rule: Rule) {
        self.shared.rules.lock().unwrap().1 = rule;
        self.links().iter().for_each(|link| link.to_client.set(rule));
    }

    /// All that were opened since the proxy started or was cut, also those whose client has gone.
    pub fn links(&self) -> Vec<Arc<Link>> {
        self.shared.links.lock().unwrap().clone()
    }

    /// A connection that holds at least so many bytes back on their way to the server: more than what
    /// is about to pass at any moment.
    pub fn holding(&self, bytes: u64) -> Option<Arc<Link>> {
        self.links().into_iter().find(|link| link.to_server.kept() >= bytes)
    }

    /// Cuts all open connections. New ones are taken.
    pub fn cut(&self) {
        let links = std::mem::take(&mut *self.shared.links.lock().unwrap());
        links.iter().for_each(|link| link.cut());
    }

    /// Where connections to come lead from now on.
    pub fn lead_to(&self, server_port: u16) {
        self.shared.server_port.store(server_port, Ordering::SeqCst);
    }

    /// Whether connections to come are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        if shared.refusing.load(Ordering::SeqCst) {
            continue;
        }
        let server_port = shared.server_port.load(Ordering::SeqCst);
        let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else {
            continue;
        };
        let (to_server, to_client) = *shared.rules.lock().unwrap();
        let link = Arc::new(Link {
            to_server: Way::new(to_server),
            to_client: Way::new(to_client),
            end: CancellationToken::new(),
        });
        shared.links.lock().unwrap().push(Arc::clone(&link));
        tokio::spawn(carry(stream, server, link));
    }
}

async fn carry(client: TcpStream, server: TcpStream, link: Arc<Link>) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) =
        (client.into_split(), server.into_split());
    let both = async {
        tokio::join!(
            one_way(from_client, to_server, &link.to_server, &link.end),
            one_way(from_server, to_client, &link.to_client, &link.end),
        )
    };
    link.end.run_until_cancelled(both).await;
    for way in [&link.to_server, &link.to_client] {
        way.ended.store(true, Ordering::SeqCst);
    }
}

/// Takes bytes as they come and gives them on as the rule says. The end is given on after them.
async fn one_way(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: &Way,
    end: &CancellationToken,
) {
    let (sender, mut arrived) = mpsc::unbounded_channel();
    let take = async move {
        loop {
            let mut chunk = bytes::BytesMut::with_capacity(16 << 10);
            match from.read_buf(&mut chunk).await {
                Ok(read) if read > 0 => {
                    way.received.fetch_add(read as u64, Ordering::SeqCst);
                    let _ = sender.send((chunk, Instant::now()));
                }
                _ => break,
            }
        }
        way.ended.store(true, Ordering::SeqCst);
    };
    let give = async {
        while let Some((mut chunk, came)) = arrived.recv().await {
            while !chunk.is_empty() {
                let Some(admitted) = way.admit(chunk.len(), came).await else {
                    return end.cancel();
                };
                if admitted == 0 {
                    break;
                }
                if to.write_all(&chunk.split_to(admitted)).await.is_err() {
                    return end.cancel();
                }
                way.bytes.fetch_add(admitted as u64, Ordering::SeqCst);
            }
        }
        let _ = way.admit(1, Instant::now()).await;
        let _ = to.shutdown().await;
    };
    tokio::join!(take, give);
}

/// A cluster of one node that the library reaches through a proxy; the control database, and the
/// test's own SQL, go straight.
pub async fn cluster_behind_proxy() -> (TestCluster, Proxy) {
    let server = shared_server().await;
    let proxy = Proxy::start(server.port()).await;
    let url = database(server).await;
    let cluster = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
    let node = NodeId::new(1).unwrap();
    cluster.add_node(node, &proxy.url(&url)).await.unwrap();
    let test = TestCluster { cluster, control_url: url.clone(), node_urls: vec![url] };
    (test, proxy)
}

#[tokio::test]
async fn a_proxy_holds_counts_releases_and_cuts() {
    let server = shared_server().await;
    let proxy = Proxy::start(server.port()).await;
    let sql = client(&proxy.url(&server.url("postgres"))).await;
    sql.batch_execute("select 1").await.unwrap();
    let before = proxy.links()[0].to_server.bytes();
    proxy.to_server(Rule::HoldAfter(3));
    let asked = tokio::spawn(async move {
        let answer = sql.query_one("select 1 + 1", &[]).await;
        (sql, answer.map(|row| row.get::<_, i32>(0)))
    });
    let held = || async { proxy.links()[0].to_server.kept() > 0 };
    super::eventually("bytes are held", Duration::from_secs(5), held).await;
    assert_eq!(proxy.links()[0].to_server.bytes(), before + 3);
    assert!(!asked.is_finished());
    proxy.to_server(Rule::Pass);
    let (sql, answer) = asked.await.unwrap();
    assert_eq!(answer.unwrap(), 2);
    proxy.cut();
    assert!(sql.query_one("select 1", &[]).await.is_err());
}
