//! How fast the relay is: alone, while a snapshot is held, and while a transaction with an id is open, so that
//! nothing that is deleted can be cleaned up. How long a message takes. And what a million pending delayed
//! messages cost the log.

use std::time::{Duration, SystemTime};

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, Message, NodeId, PartitionId, Producer, TopicOptions};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::Size;
use crate::spread::Spread;

const PARTITIONS: usize = 4;
/// Bytes of a payload.
const BYTES: usize = 100;
/// Between messages whose way is timed.
const BETWEEN: Duration = Duration::from_millis(10);
/// Batches of 1,000 that a producer has under way in each partition, nearly.
const UNDER_WAY: usize = 8;

#[derive(Clone, Copy)]
struct Plan {
    rounds: usize,
    /// Messages of a slice of the relay, and such slices while something is held.
    messages: i64,
    held: usize,
    /// Pending delayed messages, and slices of the log with and without them.
    pending: i64,
    slices: usize,
    slice: Duration,
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

struct Node {
    cluster: Cluster,
    producer: Producer,
    partitions: Vec<PartitionId>,
    url: String,
}

/// A cluster of one node in a database of its own.
async fn node(server: &Server, name: &str, relays: bool) -> Node {
    server.create_database(name).await.unwrap();
    let url = server.url(name);
    for schema in [Schema::Node, Schema::Control] {
        migrate(&url, schema).await.unwrap();
    }
    let cluster = Cluster::builder(&url).upkeep(relays).connect().await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &url).await.unwrap();
    let made = cluster.create_topic("outbox", TopicOptions::partitions(PARTITIONS)).await.unwrap();
    let producer = cluster.producer("outbox").build().await.unwrap();
    let partitions = made.partitions.iter().map(|p| p.partition).collect();
    Node { cluster, producer, partitions, url }
}

impl Node {
    /// How many messages are stored, by their last ids.
    async fn stored(&self, sql: &Client) -> i64 {
        let mut all = 0;
        for partition in &self.partitions {
            let number = i32::try_from(partition.number()).unwrap();
            let last = "select shardmq.last_id($1) % 100000000";
            all += sql.query_one(last, &[&number]).await.unwrap().get::<_, i64>(0);
        }
        all
    }

    /// Publishes messages in one transaction, and measures how many a second are relayed once it commits.
    async fn relayed(&self, sql: &Client, messages: i64) -> f64 {
        let before = self.stored(sql).await;
        // Many at once; the last one wakes the relay.
        let insert = "insert into shardmq.outbox (topic, key, payload)
                      select 'outbox', 'k' || n % 1000, convert_to(repeat('x', $2), 'UTF8')
                        from generate_series(2, $1::bigint) n";
        let publish = "select shardmq.publish('outbox', convert_to(repeat('x', $1), 'UTF8'), 'k')";
        let bytes = i32::try_from(BYTES).unwrap();
        sql.batch_execute("begin").await.unwrap();
        sql.execute(insert, &[&messages, &bytes]).await.unwrap();
        sql.query_one(publish, &[&bytes]).await.unwrap();
        let began = Instant::now();
        sql.batch_execute("commit").await.unwrap();
        while self.stored(sql).await < before + messages {
            sleep(Duration::from_millis(2)).await;
        }
        messages as f64 / began.elapsed().as_secs_f64()
    }

    /// Sends for so long; messages a second.
    async fn produced(&self, slice: Duration) -> f64 {
        let (began, mut sent) = (Instant::now(), 0);
        while began.elapsed() < slice {
            let batch =
                (0..1_000 * PARTITIONS * UNDER_WAY).map(|_| Message::new(vec![b'x'; BYTES]));
            for result in self.producer.send_all(batch).await {
                result.unwrap();
                sent += 1;
            }
        }
        f64::from(sent) / began.elapsed().as_secs_f64()
    }
}

/// Makes the outbox as it was: what is deleted is cleaned up.
async fn clean(sql: &Client) {
    for table in ["outbox", "outbox_batch"] {
        sql.batch_execute(&format!("vacuum shardmq.{table}")).await.unwrap();
    }
}

async fn relay(server: &Server, plan: Plan) {
    let node = node(server, "relayed", true).await;
    let (sql, holder) = (connect(&node.url).await, connect(&node.url).await);
    node.relayed(&sql, plan.messages).await;
    let holds = [
        (
            "a snapshot",
            "begin isolation level repeatable read; select count(*) from shardmq.outbox",
        ),
        ("a transaction id", "begin; select pg_current_xact_id()"),
    ];
    let mut free = Vec::new();
    let (mut ratios, mut late) = (holds.map(|_| Vec::new()), holds.map(|_| Vec::new()));
    for _ in 0..plan.rounds {
        for (held, (_, hold)) in holds.iter().enumerate() {
            clean(&sql).await;
            let alone = node.relayed(&sql, plan.messages).await;
            free.push(alone);
            holder.batch_execute(hold).await.unwrap();
            let mut rates = Vec::new();
            for _ in 0..plan.held {
                rates.push(node.relayed(&sql, plan.messages).await);
            }
            holder.batch_execute("commit").await.unwrap();
            let quarter = plan.held.div_ceil(4);
            let sum = |rates: &[f64]| rates.iter().sum::<f64>();
            late[held].push(sum(&rates[plan.held - quarter..]) / sum(&rates[..quarter]));
            ratios[held].extend(rates.iter().map(|rate| rate / alone));
        }
    }
    println!(
        "outbox: {BYTES} byte messages to {PARTITIONS} partitions, {} at a time",
        plan.messages
    );
    println!("  relayed: {} messages/s", Spread::of(free).text());
    for (((what, _), ratios), late) in holds.iter().zip(ratios).zip(late) {
        let passed = plan.messages * i64::try_from(plan.held).unwrap();
        println!("  while {what} is held, {passed} messages: {}", Spread::of(ratios).text());
        println!("    the last quarter of them to the first: {}", Spread::of(late).text());
    }
    node.cluster.shutdown().await;
}

async fn pending(server: &Server, plan: Plan) {
    let (with, without) = (node(server, "with", true).await, node(server, "without", true).await);
    let sql = connect(&with.url).await;
    let publish = "select count(shardmq.publish('outbox', convert_to(repeat('x', $2), 'UTF8'), null, null,
                                                now() + interval '1 year' + n * interval '1 second'))
                     from generate_series(1, $1::bigint) n";
    let bytes = i32::try_from(BYTES).unwrap();
    sql.query_one(publish, &[&plan.pending, &bytes]).await.unwrap();
    sql.batch_execute("vacuum analyze shardmq.delayed").await.unwrap();
    sql.batch_execute("checkpoint").await.unwrap();
    let (mut rates, mut ratios) = (Vec::new(), Vec::new());
    for slice in 0..plan.slices {
        // In turns, and each first in turns.
        let (one, two) = if slice % 2 == 0 { (&with, &without) } else { (&without, &with) };
        let (first, second) = (one.produced(plan.slice).await, two.produced(plan.slice).await);
        let (there, none) = if slice % 2 == 0 { (first, second) } else { (second, first) };
        rates.push(there);
        ratios.push(there / none);
    }
    println!(
        "  produced while {} are pending: {:.0} messages/s",
        plan.pending,
        Spread::of(rates).quantile(0.5)
    );
    println!("  to those while none are: {}", Spread::of(ratios).text());
    with.cluster.shutdown().await;
    without.cluster.shutdown().await;
}

/// How long a message takes to its consumer from the commit of the transaction that publishes it, and how late one
/// is that is for later.
pub(crate) async fn latency(size: Size) {
    let timed = if size == Size::Small { 20 } else { 1_000 };
    let server = crate::server(100).await;
    let node = node(&server, "timed", true).await;
    let sql = connect(&node.url).await;
    let mut messages = node.cluster.consumer("outbox", "g").stream().await.unwrap();
    let mut next = async || {
        let delivery = messages.next().await.unwrap().unwrap();
        let text = String::from_utf8(delivery.payload().to_vec()).unwrap();
        delivery.ack().unwrap();
        text.parse::<usize>().unwrap()
    };
    let publish = "select shardmq.publish('outbox', convert_to($1::text, 'UTF8'))";
    let mut took = Vec::new();
    for n in 0..=timed {
        sleep(BETWEEN).await;
        sql.query_one(publish, &[&n.to_string()]).await.unwrap();
        let committed = Instant::now();
        next().await;
        // The first one finds nothing prepared.
        if n > 0 {
            took.push(committed.elapsed().as_secs_f64() * 1e3);
        }
    }
    println!("published: {BETWEEN:?} apart");
    println!("  from the commit to the consumer: {}", milliseconds(took));
    let first = SystemTime::now() + Duration::from_secs(5);
    let due = |n: usize| first + BETWEEN * u32::try_from(n).unwrap();
    for n in 0..timed {
        let message = Message::new(n.to_string());
        node.producer.deliver_at(due(n), message).await.unwrap();
    }
    let mut late = Vec::new();
    for _ in 0..timed {
        let n = next().await;
        late.push(due(n).elapsed().map_or(0.0, |late| late.as_secs_f64() * 1e3));
    }
    println!("  at the consumer after they were due: {}", milliseconds(late));
    node.cluster.shutdown().await;
    server.stop().await.unwrap();
}

fn milliseconds(times: Vec<f64>) -> String {
    let count = times.len();
    let times = Spread::of(times);
    let [median, p99, most] = [0.5, 0.99, 1.0].map(|part| times.quantile(part));
    format!("p50 {median:.2} ms, p99 {p99:.2} ms, at most {most:.2} ms ({count})")
}

pub(crate) async fn measure(size: Size) {
    let plan = match size {
        Size::Small => Plan {
            rounds: 1,
            messages: 5_000,
            held: 2,
            pending: 5_000,
            slices: 2,
            slice: Duration::from_millis(200),
        },
        Size::Whole => Plan {
            rounds: 3,
            messages: 250_000,
            held: 20,
            pending: 1_000_000,
            slices: 30,
            slice: Duration::from_secs(1),
        },
    };
    let server = crate::server(100).await;
    relay(&server, plan).await;
    pending(&server, plan).await;
    server.stop().await.unwrap();
}
