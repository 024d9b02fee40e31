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
