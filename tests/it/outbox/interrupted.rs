//! Relays that stop in the middle, and nodes that are away: what was published comes once, and in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shardmq::{Cluster, NodeId, PartitionId, TopicOptions};
use tokio_postgres::Client;
use tracing::Level;

use crate::support::proxy::{Proxy, Rule};
use crate::support::relays::{Relay, arrive, publish, through};
use crate::support::said::said;
use crate::support::stored::{Stored, all_stored, topic};
use crate::support::{TestCluster, client, database, eventually, shared_server};

const SOON: Duration = Duration::from_secs(15);

/// Publishes so many messages of three keys and of none.
async fn publish_all(sql: &Client, from: usize, to: usize) {
    for n in from..to {
        let key = ["a", "b", "c", ""][n % 4];
        publish(sql, "orders", &n.to_string(), Some(key).filter(|key| !key.is_empty())).await;
    }
}

/// Each is there once, those of a key in order.
fn check(all: &[Stored], count: usize) {
    let mut numbers: Vec<usize> = all.iter().map(|m| m.text().parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..count).collect::<Vec<_>>());
    for (nth, key) in ["a", "b", "c"].into_iter().enumerate() {
        let expected: Vec<String> =
            (0..count).filter(|n| n % 4 == nth).map(|n| n.to_string()).collect();
        let of_key = all.iter().filter(|m| m.key.as_deref() == Some(key));
        assert_eq!(of_key.map(Stored::text).collect::<Vec<_>>(), expected, "{key}");
    }
}

/// A relay that stops for ever when it comes to a place; whether it has.
async fn stopping(test: &TestCluster, place: &'static str) -> (Relay, Arc<AtomicBool>) {
    let stopped = Arc::new(AtomicBool::new(false));
    let there = Arc::clone(&stopped);
    let relay = Relay::with(test, "orders", |builder| {
        builder.relay_failpoint(move |name| {
            let there = Arc::clone(&there);
            Box::pin(async move {
                if name == place {
                    there.store(true, Ordering::SeqCst);
                    std::future::pending::<()>().await;
                }
            })
        })
    })
    .await;
    (relay, stopped)
}

/// What is published on node 01 is for partitions of this node.
async fn stops_at(place: &'static str, target: u8) {
    let test = TestCluster::new(target).await;
    let options = TopicOptions::partitions(3).nodes([NodeId::new(target).unwrap()]);
    let made = test.cluster.create_topic("orders", options).await.unwrap();
    let partitions: Vec<PartitionId> = made.partitions.iter().map(|p| p.partition).collect();
    let (sql, there) = (test.sql(0).await, test.sql(usize::from(target) - 1).await);
    publish_all(&sql, 0, 100).await;
    let (relay, stopped) = stopping(&test, place).await;
    let has_stopped = async || stopped.load(Ordering::SeqCst);
    eventually(place, SOON, has_stopped).await;
    // Another, that waits for the lease.
    let _next = Relay::start(&test, "orders").await;
    publish_all(&sql, 100, 200).await;
    relay.cluster.shutdown().await;
    check(&arrive(&there, &partitions, 200).await, 200);
    through(&sql).await;
}

macro_rules! stops {
    ($($test:ident = $place:literal, $target:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            stops_at($place, $target).await;
        }
    )*};
}

stops! {
    a_relay_that_stops_after_a_look_is_replaced = "looked", 1;
    a_relay_that_stops_after_freezing_is_replaced = "frozen", 1;
    a_relay_that_stops_after_appending_is_replaced = "appended", 1;
    a_relay_that_stops_after_forgetting_is_replaced = "forgotten", 1;
    a_relay_to_another_node_that_stops_after_a_look_is_replaced = "looked", 2;
    a_relay_to_another_node_that_stops_after_freezing_is_replaced = "frozen", 2;
    a_relay_to_another_node_that_stops_after_appending_is_replaced = "appended", 2;
    a_relay_to_another_node_that_stops_after_forgetting_is_replaced = "forgotten", 2;
}

/// The partition on the other node is sealed for a while: what was frozen for it is withdrawn and put back.
async fn stops_while_it_puts_back(place: &'static str) {
    let test = TestCluster::new(2).await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    let made = test.cluster.create_topic("orders", options).await.unwrap();
    let (sql, there) = (test.sql(0).await, test.sql(1).await);
    there.batch_execute("update shardmq.partition set state = 'sealed'").await.unwrap();
    publish_all(&sql, 0, 100).await;
    let (relay, stopped) = stopping(&test, place).await;
    eventually(place, SOON, async || stopped.load(Ordering::SeqCst)).await;
    let _next = Relay::start(&test, "orders").await;
    relay.cluster.shutdown().await;
    there.batch_execute("update shardmq.partition set state = 'open'").await.unwrap();
    let partition = made.partitions[0].partition;
    arrive(&there, &[partition], 100).await;
    publish_all(&sql, 100, 200).await;
    check(&arrive(&there, &[partition], 200).await, 200);
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stops_where_a_batch_was_refused_is_replaced() {
    stops_while_it_puts_back("refused").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stops_where_a_batch_was_withdrawn_is_replaced() {
    stops_while_it_puts_back("withdrawn").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stops_where_a_batch_is_divided_is_replaced() {
    let test = TestCluster::new(2).await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    let made = test.cluster.create_topic("orders", options).await.unwrap();
    let (sql, there) = (test.sql(0).await, test.sql(1).await);
    let unchecked = "alter table shardmq.outbox drop constraint headers_of_65536_bytes";
    sql.batch_execute(unchecked).await.unwrap();
    publish_all(&sql, 0, 50).await;
    let bad =
        "insert into shardmq.outbox (topic, headers, payload) values ('orders', '[1]', 'bad')";
    sql.batch_execute(bad).await.unwrap();
    publish_all(&sql, 50, 100).await;
    let (relay, stopped) = stopping(&test, "divided").await;
    eventually("it divides", SOON, async || stopped.load(Ordering::SeqCst)).await;
    let _next = Relay::start(&test, "orders").await;
    relay.cluster.shutdown().await;
    check(&arrive(&there, &[made.partitions[0].partition], 100).await, 100);
    through(&sql).await;
    let dead = "select convert_from(payload, 'UTF8') from shardmq.outbox_dead";
    assert_eq!(sql.query_one(dead, &[]).await.unwrap().get::<_, String>(0), "bad");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_that_lose_their_lease_without_knowing_do_no_harm() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let sql = test.sql(0).await;
    let _one = Relay::start(&test, "orders").await;
    let _other = Relay::start(&test, "orders").await;
    let mut published = 0;
    for _ in 0..20 {
        publish_all(&sql, published, published + 20).await;
        published += 20;
        // Whoever has it goes on for a while; another may take it.
        let free = "update shardmq.outbox_relay set holder = null, until = '-infinity'";
        sql.batch_execute(free).await.unwrap();
    }
    check(&arrive(&sql, &partitions, published).await, published);
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_end_at_any_time_do_no_harm() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let (sql, killer) = (test.sql(0).await, client(&test.node_urls[0]).await);
    let _relay = Relay::start(&test, "orders").await;
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where application_name in ('shardmq', 'shardmq relay')
                   and datname = current_database()";
    for part in 0..10 {
        publish_all(&sql, part * 40, part * 40 + 40).await;
        killer.query_one(kill, &[]).await.unwrap();
    }
    check(&arrive(&sql, &partitions, 400).await, 400);
    through(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_another_node_that_are_cut_at_any_time_do_no_harm() {
    let options = TopicOptions::partitions(3).nodes([NodeId::new(2).unwrap()]);
    let (test, proxy, partitions) = with_a_node_apart(options).await;
    let _relay = Relay::start(&test, "orders").await;
    let (sql, there) = (test.sql(0).await, test.sql(1).await);
    for part in 0..9 {
        let before = all_stored(&there, &partitions).await.len();
        match part % 3 {
            0 => {}
            // What is stored is not told.
            1 => proxy.to_client(Rule::Hold),
            // It does not come wholly.
            _ => proxy.to_server(Rule::CutAfter(600)),
        }
        publish_all(&sql, part * 40, part * 40 + 40).await;
        if part % 3 == 1 {
            let more = async || all_stored(&there, &partitions).await.len() > before;
            eventually("something is stored", SOON, more).await;
        }
        proxy.cut();
        proxy.to_client(Rule::Pass);
        proxy.to_server(Rule::Pass);
        arrive(&there, &partitions, part * 40 + 40).await;
    }
    check(&all_stored(&there, &partitions).await, 360);
    through(&sql).await;
}

/// A cluster whose second node is reached through a proxy, with a topic.
async fn with_a_node_apart(topic: TopicOptions) -> (TestCluster, Proxy, Vec<PartitionId>) {
    let server = shared_server().await;
    let node_urls = vec![database(server).await, database(server).await];
    let proxy = Proxy::start(server.port()).await;
    let control_url = node_urls[0].clone();
    let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
    for (number, url) in [(1, node_urls[0].clone()), (2, proxy.url(&node_urls[1]))] {
        cluster.add_node(NodeId::new(number).unwrap(), &url).await.unwrap();
    }
    let made = cluster.create_topic("orders", topic).await.unwrap();
    let partitions = made.partitions.iter().map(|p| p.partition).collect();
    (TestCluster { cluster, control_url, node_urls }, proxy, partitions)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_makes_its_own_messages_wait_and_no_others() {
    let (test, proxy, partitions) = with_a_node_apart(TopicOptions::partitions(4)).await;
    let of = |node: u8| -> Vec<PartitionId> {
        partitions.iter().copied().filter(|p| p.node().number() == node).collect()
    };
    let (here, there) = (of(1), of(2));
    let _relay = Relay::start(&test, "orders").await;
    let (sql, far) = (test.sql(0).await, test.sql(1).await);
    // Slots go to the nodes in turn, a quarter at a time.
    let is_far = |key: &str| shardmq::key_slot(key) / (shardmq::SLOTS / 4) % 2 == 1;
    let key = |far: bool| (0..).map(|n: u32| n.to_string()).find(|key| is_far(key) == far).unwrap();
    let (near_key, far_key) = (key(false), key(true));
    publish(&sql, "orders", "first", Some(&far_key)).await;
    arrive(&far, &there, 1).await;
    proxy.refuse(true);
    proxy.cut();
    for n in 0..100 {
        publish(&sql, "orders", &format!("far{n}"), Some(&far_key)).await;
        publish(&sql, "orders", &format!("near{n}"), Some(&near_key)).await;
    }
    arrive(&sql, &here, 100).await;
    // Without keys they go where somebody answers.
    let waits = "messages from an outbox wait for the node";
    let told =
        async || said(Level::WARN, "node", "02").iter().any(|said| said.has("message", waits));
    eventually("it is told", SOON, told).await;
    for n in 0..20 {
        publish(&sql, "orders", &n.to_string(), None).await;
        arrive(&sql, &here, 101 + n).await;
    }
    proxy.refuse(false);
    let all = arrive(&far, &there, 101).await;
    let expected: Vec<String> = (0..100).map(|n| format!("far{n}")).collect();
    assert_eq!(all.iter().skip(1).map(Stored::text).collect::<Vec<_>>(), expected);
    through(&sql).await;
}
