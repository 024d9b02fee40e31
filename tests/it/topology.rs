//! Nodes that move to another address, go, or turn out to be another's, under running clients.

use std::time::Duration;

use shardmq::{Cluster, ErrorKind, Message, NodeId, NodeState, TopicOptions};

use crate::support::proxy::Proxy;
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

fn node(number: u8) -> NodeId {
    NodeId::new(number).unwrap()
}

/// Two nodes; the second one's address is a proxy's.
async fn pair() -> (TestCluster, Proxy) {
    let server = shared_server().await;
    let node_urls = vec![database(server).await, database(server).await];
    let proxy = Proxy::start(server.port()).await;
    let cluster = Cluster::builder(&node_urls[0]).upkeep(false).connect().await.unwrap();
    cluster.add_node(node(1), &node_urls[0]).await.unwrap();
    cluster.add_node(node(2), &proxy.url(&node_urls[1])).await.unwrap();
    (TestCluster { cluster, control_url: node_urls[0].clone(), node_urls }, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_clients_follow_a_node_to_its_new_address() {
    let (test, proxy) = pair().await;
    let options = TopicOptions::partitions(1).nodes([node(2)]);
    test.cluster.create_topic("orders", options).await.unwrap();
    let producer = test.cluster.producer("orders").send_timeout(20 * SECOND).build().await.unwrap();
    // It hears of a message, or waits for an hour.
    let consumer = test.cluster.consumer("orders", "g").poll_interval(3_600 * SECOND);
    let mut messages = consumer.stream().await.unwrap();
    producer.send(Message::new("before").key("k")).await.unwrap();
    within(10 * SECOND, "the first", messages.next()).await.unwrap().unwrap().ack().unwrap();

    // Somebody else moves it; the old address goes away later.
    let other = Cluster::connect(&test.control_url).await.unwrap();
    other.replace_node(node(2), &test.node_urls[1]).await.unwrap();
    let old = || async { proxy.links().iter().all(|link| link.to_server.ended()) };
    eventually("nobody uses the old address any more", 20 * SECOND, old).await;
    proxy.refuse(true);
    proxy.cut();
    producer.send(Message::new("after").key("k")).await.unwrap();
    let after = within(10 * SECOND, "a hint at the new address", messages.next()).await;
    assert_eq!(after.unwrap().unwrap().payload(), b"after");
    assert_eq!(other.nodes().await.unwrap()[1].url, test.node_urls[1]);
}

/// The address of one node is another one's: nothing is stored there, what has no key goes on
/// through the right one, and all is well again when the address is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_address_is_found_out_before_anything_is_stored() {
    let (test, _proxy) = pair().await;
    test.cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
    let sql = client(&test.control_url).await;
    let swap = |url: &str| {
        format!(
            "update shardmq_control.node set dsn = '{url}' where node = 2;
             update shardmq_control.cluster set version = version + 1"
        )
    };
    sql.batch_execute(&swap(&test.node_urls[0])).await.unwrap();
    let cluster = Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap();
    let builder = cluster.producer("orders").probe_interval(SECOND / 20, SECOND / 5);
    let producer = builder.build().await.unwrap();
    for n in 0..10 {
        let sent = producer.send(Message::new(n.to_string()));
        let id = within(4 * SECOND, "an answer", sent).await.unwrap();
        assert_eq!(id.partition().node(), node(1));
    }
    let status = producer.status();
    assert_eq!(status.nodes[1].state, NodeState::Down);
    let why = status.nodes[1].error.as_ref().unwrap();
    assert!(why.contains("leads to node 01"), "{why}");
    let mut keyed = Vec::new();
    for n in 0..20 {
        keyed.push(producer.send(Message::new("k").key(format!("key-{n}"))).await);
    }
    let refused = keyed.into_iter().find_map(Result::err).unwrap();
    assert_eq!(refused.kind(), ErrorKind::Conflict);

    sql.batch_execute(&swap(&test.node_urls[1])).await.unwrap();
    let back = || async { producer.status().nodes[1].state == NodeState::Up };
    eventually("it is back", 20 * SECOND, back).await;
}

/// A control database that was restored from a backup says what was true before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_topology_than_the_one_that_is_known_is_not_taken_over() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let sql = client(&test.control_url).await;
    sql.batch_execute(
        "update shardmq_control.cluster set version = 1;
         update shardmq_control.node set dsn = 'postgresql://nobody@127.0.0.1:1/nowhere'",
    )
    .await
    .unwrap();
    let error = test.cluster.nodes().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("version 1 "), "{error}");
    producer.send(Message::new("x")).await.unwrap();
}

/// The control database lost the last change, and gives its number to the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_change_that_follows_one_that_was_lost_is_taken_over_and_the_loss_is_told() {
    let (test, _proxy) = pair().await;
    let before = control_state(&test.control_url).await;
    topic(&test, "orders", 2).await;
    let running = Cluster::connect(&test.control_url).await.unwrap();
    let seen = control_state(&test.control_url).await;
    let sql = client(&test.control_url).await;
    let restore = "update shardmq_control.cluster set (version, token, history) = ($1, $2::text::uuid, $3::text::uuid[])";
    sql.execute(restore, &[&before.0, &before.1, &before.2]).await.unwrap();
    let error = running.nodes().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    // Who starts now does not know what was lost.
    let another = Cluster::connect(&test.control_url).await.unwrap();
    another.replace_node(node(2), &test.node_urls[1]).await.unwrap();
    assert_eq!(control_state(&test.control_url).await.0, seen.0, "the same number");
    assert_eq!(running.nodes().await.unwrap()[1].url, test.node_urls[1]);
    running.shutdown().await;
    another.shutdown().await;
}

async fn control_state(url: &str) -> (i64, String, String) {
    let read = "select version, token::text, history::text from shardmq_control.cluster";
    let row = client(url).await.query_one(read, &[]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_node_without_partitions_is_removed_and_can_be_used_again() {
    let (test, _proxy) = pair().await;
    let cluster = &test.cluster;
    cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
    let error = cluster.remove_node(node(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("orders"), "{error}");
    cluster.delete_topic("orders", true).await.unwrap();
    cluster.remove_node(node(2)).await.unwrap();
    assert_eq!(cluster.nodes().await.unwrap().len(), 1);
    for gone in [cluster.remove_node(node(2)).await, cluster.replace_node(node(2), "x").await] {
        assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
    }
    cluster.add_node(node(3), &test.node_urls[1]).await.unwrap();
    let stranger = cluster.replace_node(node(3), &test.node_urls[0]).await.unwrap_err();
    assert_eq!(stranger.kind(), ErrorKind::Conflict);
}

/// As one that was written by a library with other features, or a newer one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_address_cannot_be_used_keeps_nobody_from_the_others() {
    let (test, _proxy) = pair().await;
    test.cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
    let connect = || {
        let builder = Cluster::builder(&test.control_url).upkeep(false);
        builder.look_interval(SECOND / 10).connect()
    };
    let running = connect().await.unwrap();
    let sql = client(&test.control_url).await;
    let change = "update shardmq_control.cluster set version = version + 1;
                  update shardmq_control.node set dsn =";
    let bad = format!("{change} dsn || '?unheard_of=1' where node = 2");
    sql.batch_execute(&bad).await.unwrap();
    let starting = connect().await.unwrap();
    for cluster in [running, starting] {
        let builder = cluster.producer("orders").probe_interval(SECOND / 20, SECOND / 5);
        let producer = builder.build().await.unwrap();
        let is = |state: NodeState| {
            let producer = producer.clone();
            move || {
                let producer = producer.clone();
                async move {
                    let sent = producer.send(Message::new("x"));
                    let sent = within(20 * SECOND, "a send", sent).await.unwrap();
                    let nodes = producer.status().nodes;
                    nodes[1].state == state
                        && (state == NodeState::Up || sent.partition().node() == node(1))
                }
            }
        };
        eventually("the node is gone around", 20 * SECOND, is(NodeState::Down)).await;
        let good = format!("{change} replace(dsn, '?unheard_of=1', '') where node = 2");
        sql.batch_execute(&good).await.unwrap();
        eventually("the node is used again", 20 * SECOND, is(NodeState::Up)).await;
        sql.batch_execute(&bad).await.unwrap();
    }
}
