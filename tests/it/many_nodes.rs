//! As many nodes as there can be, on two servers: everything works, and nothing is used beyond bounds.
//!
//! The databases are clones of one that was migrated. To migrate each would take longer than all the
//! rest, and what is proved here is not that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use shardmq::embedded::Server;
use shardmq::{Cluster, Message, MessageId, Messages, NodeId, PartitionId, TopicOptions, key_slot};
use tokio::time::Instant;

use crate::support::reading::next;
use crate::support::{TestCluster, client, database, eventually, own_server, within};

const NODES: u8 = 99;
const EACH: usize = 9;
const PARTITIONS: usize = NODES as usize * EACH;
/// Messages without a key, from so many tasks.
const FREE: (usize, usize) = (2_000, 16);
/// On a machine that does other things as well; alone it takes a tenth of that.
const LONGEST_STAGE: Duration = Duration::from_secs(40);
/// Connections that one process may have to a node.
const MOST_CONNECTIONS: i64 = 3;
/// Those to the control database: two that ask it, and one that listens.
const CONTROL_CONNECTIONS: i64 = 3;
/// Of the whole test process, in which other tests run as well.
const MOST_MEMORY_MIB: u64 = 1_024;
/// An empty database has 9 MB here; a partition's tables are 50 kB.
const MOST_DISK_MIB: i64 = 2_560;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ninety_nine_nodes_are_one_cluster() {
    within(Duration::from_mins(2), "the whole", async {
        let mut watch = Watch::new();
        let servers = tokio::join!(own_server(), own_server());
        watch.lap("two servers started, one database migrated on each");
        let (test, servers) = clones(servers).await;
        watch.lap("99 databases cloned");
        register(&test).await;
        watch.lap("99 nodes registered");
        // `add_node` looks at them through connections of its own, which end soon after.
        let none = || async { connections(&test, &servers).await.values().all(|open| *open == 0) };
        eventually("no connection is needed yet", LONGEST_STAGE, none).await;
        let made = test.cluster.create_topic("all", TopicOptions::partitions(PARTITIONS)).await;
        let partitions: Vec<PartitionId> =
            made.unwrap().partitions.iter().map(|p| p.partition).collect();
        watch.lap("a topic of 891 partitions made");
        check_spread(&test, &partitions).await;
        watch.lap("described");
        let sent = send(&test, &partitions).await;
        watch.lap("sent to all");
        let messages = receive(&test, &sent).await;
        watch.lap("received and acknowledged");
        check_use(&test, &servers).await;
        leave(&test, messages).await;
        watch.lap("left the group, and no lag");
        test.cluster.delete_topic("all", false).await.unwrap();
        watch.lap("the topic deleted");
        test.cluster.shutdown().await;
        watch.lap("shut down");
    })
    .await;
}

/// Prints how long each stage took, and sees to it that it was not too long.
struct Watch(Instant);

impl Watch {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, stage: &str) {
        println!("{:6.2} s  {stage}", self.0.elapsed().as_secs_f64());
        assert!(self.0.elapsed() < LONGEST_STAGE, "{stage}");
        self.0 = Instant::now();
    }
}

/// Half of the nodes on each server; the first one's database is the control database too.
async fn clones((one, two): (Server, Server)) -> (TestCluster, [Server; 2]) {
    let some = |server, count| {
        let cloned = stream::iter(0..count).map(move |_| database(server));
        cloned.buffer_unordered(2).collect::<Vec<String>>()
    };
    let (mut node_urls, others) = tokio::join!(some(&one, 50), some(&two, NODES - 50));
    node_urls.extend(others);
    let control_url = node_urls[0].clone();
    let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
    (TestCluster { cluster, control_url, node_urls }, [one, two])
}

async fn register(test: &TestCluster) {
    let numbered = test.node_urls.iter().zip(1..);
    let added = stream::iter(numbered).map(|(url, number)| async move {
        test.cluster.add_node(NodeId::new(number).unwrap(), url).await.unwrap();
    });
    added.buffer_unordered(4).collect::<Vec<()>>().await;
    assert_eq!(test.cluster.nodes().await.unwrap().len(), usize::from(NODES));
}

/// Nine partitions on each node, and as many key slots for each, or one more.
async fn check_spread(test: &TestCluster, made: &[PartitionId]) {
    let described = test.cluster.topic("all").await.unwrap();
    assert!(described.partitions.iter().all(|p| p.state == "open" && p.messages == 0));
    let described: Vec<PartitionId> = described.partitions.iter().map(|p| p.partition).collect();
    assert_eq!(described, made);
    let mut by_node: BTreeMap<NodeId, usize> = BTreeMap::new();
    made.iter().for_each(|partition| *by_node.entry(partition.node()).or_default() += 1);
    assert_eq!(by_node.len(), usize::from(NODES));
    assert!(by_node.values().all(|count| *count == EACH), "{by_node:?}");
    let slots = slots(test).await;
    assert_eq!(slots.len(), PARTITIONS);
    let widths: Vec<i32> = slots.values().map(|(first, last)| last - first + 1).collect();
    assert_eq!(widths.iter().sum::<i32>(), 16_384);
    assert!(widths.iter().max().unwrap() - widths.iter().min().unwrap() <= 1);
}

/// The first and the last key slot of each partition.
async fn slots(test: &TestCluster) -> HashMap<PartitionId, (i32, i32)> {
    let sql = client(&test.control_url).await;
    let all = "select partition, first_slot, last_slot from shardmq_control.slots";
    let rows = sql.query(all, &[]).await.unwrap();
    let partition = |number: i32| PartitionId::try_from(number.unsigned_abs()).unwrap();
    rows.iter().map(|row| (partition(row.get(0)), (row.get(1), row.get(2)))).collect()
}

/// A message with a key for each partition, and many without.
async fn send(test: &TestCluster, partitions: &[PartitionId]) -> HashMap<String, MessageId> {
    let slots = slots(test).await;
    let of_slot: HashMap<i32, String> = (0..200_000)
        .map(|n| format!("key-{n}"))
        .map(|key| (i32::from(key_slot(&key)), key))
        .collect();
    let producer = test.cluster.producer("all").build().await.unwrap();
    let keys = partitions.iter().map(|partition| of_slot[&slots[partition].0].clone());
    let keys: Vec<String> = keys.collect();
    let keyed = keys.iter().map(|key| Message::new(format!("with {key}")).key(key));
    let keyed = producer.send_all(keyed).await;
    let mut sent = HashMap::new();
    for ((key, partition), id) in keys.iter().zip(partitions).zip(keyed) {
        let id = id.unwrap();
        assert_eq!(id.partition(), *partition);
        sent.insert(format!("with {key}"), id);
    }
    let free = stream::iter(0..FREE.0).map(|n| {
        let producer = producer.clone();
        async move {
            let text = format!("without {n}");
            (text.clone(), producer.send(Message::new(text)).await.unwrap())
        }
    });
    sent.extend(free.buffer_unordered(FREE.1).collect::<Vec<_>>().await);
    producer.shutdown(Duration::from_secs(10)).await.unwrap();
    assert_eq!(sent.values().collect::<HashSet<_>>().len(), PARTITIONS + FREE.0);
    sent
}

/// Everything comes once, as it was sent.
async fn receive(test: &TestCluster, sent: &HashMap<String, MessageId>) -> Messages {
    let mut messages = test.cluster.consumer("all", "g").stream().await.unwrap();
    let mut missing = sent.clone();
    while !missing.is_empty() {
        let delivery = next(&mut messages).await;
        let text = std::str::from_utf8(delivery.payload()).unwrap();
        assert_eq!(missing.remove(text), Some(delivery.id()), "{text}");
        delivery.ack().unwrap();
    }
    messages
}

/// Nothing is left to receive.
async fn leave(test: &TestCluster, messages: Messages) {
    messages.shutdown(Duration::from_secs(10)).await.unwrap();
    let lag = test.cluster.lag("all").await.unwrap();
    assert_eq!(lag.len(), PARTITIONS);
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

/// While a consumer listens to all nodes, and what was used to send is not closed yet.
async fn check_use(test: &TestCluster, servers: &[Server; 2]) {
    let open = connections(test, servers).await;
    let (most, all) = (open.values().max().unwrap(), open.values().sum::<i64>());
    println!("{all} connections to 99 nodes, at most {most} to one");
    assert!(*most <= MOST_CONNECTIONS, "{open:?}");
    let mut disk = 0;
    for server in servers {
        let sql = client(&server.url("postgres")).await;
        let used = "select sum(pg_database_size(oid))::bigint from pg_database";
        disk += sql.query_one(used, &[]).await.unwrap().get::<_, i64>(0) >> 20;
    }
    println!("{disk} MiB on disk, {} a node", disk / i64::from(NODES));
    assert!(disk <= MOST_DISK_MIB);
    if let Some(memory) = memory_mib() {
        println!("{memory} MiB of memory");
        assert!(memory <= MOST_MEMORY_MIB);
    }
}

/// How many connections the library has to each node's database.
async fn connections(test: &TestCluster, servers: &[Server; 2]) -> BTreeMap<String, i64> {
    let mut found: BTreeMap<String, i64> = BTreeMap::new();
    for server in servers {
        let sql = client(&server.url("postgres")).await;
        // Those of the server's template and of tests have other names.
        let count =
            "select d.datname, count(a.pid) filter (where a.application_name like 'shardmq%')
                       from pg_database d left join pg_stat_activity a using (datname)
                      where d.datname like 't%' and not d.datistemplate group by 1";
        for row in sql.query(count, &[]).await.unwrap() {
            found.insert(format!("{}/{}", server.port(), row.get::<_, &str>(0)), row.get(1));
        }
    }
    let (_, control) = test.control_url.rsplit_once('/').unwrap();
    let control = found.get_mut(&format!("{}/{control}", servers[0].port())).unwrap();
    *control = (*control - CONTROL_CONNECTIONS).max(0);
    assert_eq!(found.len(), usize::from(NODES));
    found
}

/// What this process has in memory; none where that is not to be seen.
fn memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib >> 10)
}
