//! Connections are opened when they are first needed, and closed when they are not any more.

use std::time::Duration;

use shardmq::{Cluster, Message, NodeId, TopicOptions};

use crate::support::reading::next;
use crate::support::{TestCluster, client, database, eventually, shared_server};

const SECOND: Duration = Duration::from_secs(1);

/// Two nodes, neither of which is the control database.
async fn pair() -> TestCluster {
    let server = shared_server().await;
    let control_url = database(server).await;
    let node_urls = vec![database(server).await, database(server).await];
    let builder = Cluster::builder(&control_url).upkeep(false);
    let cluster = builder.idle_timeout(SECOND / 5).connect().await.unwrap();
    for (url, number) in node_urls.iter().zip(1..) {
        cluster.add_node(NodeId::new(number).unwrap(), url).await.unwrap();
    }
    TestCluster { cluster, control_url, node_urls }
}

/// How many connections the library has to a database.
async fn connections(url: &str) -> i64 {
    let (_, name) = url.rsplit_once('/').unwrap();
    let sql = client(&shared_server().await.url("postgres")).await;
    let count = "select count(*) from pg_stat_activity
                  where datname = $1 and application_name like 'shardmq%'";
    sql.query_one(count, &[&name]).await.unwrap().get(0)
}

/// How many sessions a database has had so far.
async fn sessions(sql: &tokio_postgres::Client) -> i64 {
    let count = "select sessions from pg_stat_database where datname = current_database()";
    sql.query_one(count, &[]).await.unwrap().get(0)
}

async fn none_is_left(url: &str) {
    let none = || async { connections(url).await == 0 };
    eventually("idle connections are closed", 10 * SECOND, none).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_connections_are_opened_when_needed_and_closed_when_idle() {
    let test = pair().await;
    // `add_node` looks at them through connections of its own, which end soon after.
    none_is_left(&test.node_urls[0]).await;
    none_is_left(&test.node_urls[1]).await;
    let options = TopicOptions::partitions(4).nodes([NodeId::new(2).unwrap()]);
    test.cluster.create_topic("orders", options).await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for n in 0..3 {
        producer.send(Message::new(n.to_string())).await.unwrap();
        assert_eq!(connections(&test.node_urls[0]).await, 0);
        none_is_left(&test.node_urls[1]).await;
    }
}

/// Of the processes of a cluster one looks after a node; the others keep no connection to a node that they have
/// no use for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_another_process_looks_after_has_no_connection_of_those_that_do_not_use_it() {
    let test = pair().await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    test.cluster.create_topic("orders", options).await.unwrap();
    let unused = client(&test.node_urls[0]).await;
    let one = Cluster::connect(&test.control_url).await.unwrap();
    let _holder = one.producer("orders").build().await.unwrap();
    let held = "select exists (select from shardmq.upkeep) and holder is not null
                  from shardmq.outbox_relay";
    eventually("one process has both leases", 20 * SECOND, async || {
        unused.query_one(held, &[]).await.unwrap().get(0)
    })
    .await;
    let (before, sessions) = (connections(&test.node_urls[0]).await, sessions(&unused).await);
    let other = Cluster::connect(&test.control_url).await.unwrap();
    let producer = other.producer("orders").build().await.unwrap();
    producer.send(Message::new("x")).await.unwrap();
    let asked = async || self::sessions(&unused).await > sessions;
    eventually("the other process has asked", 20 * SECOND, asked).await;
    let gone = async || connections(&test.node_urls[0]).await <= before;
    eventually("its connections are closed", 20 * SECOND, gone).await;
    other.shutdown().await;
    one.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_listening_connection_lives_as_long_as_somebody_consumes() {
    let test = pair().await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    test.cluster.create_topic("orders", options).await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for text in ["first", "second"] {
        // It hears of a message, or waits for an hour.
        let consumer = test.cluster.consumer("orders", "g").poll_interval(3_600 * SECOND);
        let mut messages = consumer.stream().await.unwrap();
        producer.send(Message::new(text)).await.unwrap();
        let delivery = next(&mut messages).await;
        assert_eq!(delivery.payload(), text.as_bytes());
        delivery.ack().unwrap();
        assert!(connections(&test.node_urls[1]).await >= 1);
        messages.shutdown(SECOND).await.unwrap();
        none_is_left(&test.node_urls[1]).await;
    }
}
