//! Topics and nodes come and go: evenly spread, once, and never over what somebody still needs.

use std::collections::BTreeMap;
use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{Cluster, ErrorKind, NodeId, PartitionId, TopicOptions};

use crate::support::clocks::Clocks;
use crate::support::reading::{append_texts, cursors, next, take};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, database, own_server, shared_server};

const SECOND: Duration = Duration::from_secs(1);

fn node(number: u8) -> NodeId {
    NodeId::new(number).unwrap()
}

fn per_node(partitions: &[PartitionId]) -> BTreeMap<u8, usize> {
    let mut counts = BTreeMap::new();
    for partition in partitions {
        *counts.entry(partition.node().number()).or_default() += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_are_spread_evenly_and_only_where_they_are_asked_for() {
    let test = TestCluster::new(3).await;
    let seven = topic(&test, "seven", 7).await;
    assert_eq!(per_node(&seven), BTreeMap::from([(1, 3), (2, 2), (3, 2)]));
    // The emptier ones come first.
    assert_eq!(per_node(&topic(&test, "one", 1).await), BTreeMap::from([(2, 1)]));
    assert_eq!(per_node(&topic(&test, "other", 1).await), BTreeMap::from([(3, 1)]));
    let chosen = TopicOptions::partitions(4).nodes([node(1), node(3)]);
    let made = test.cluster.create_topic("chosen", chosen).await.unwrap();
    let ids: Vec<_> = made.partitions.iter().map(|p| p.partition).collect();
    assert_eq!(per_node(&ids), BTreeMap::from([(1, 2), (3, 2)]));
    let stranger = TopicOptions::partitions(1).nodes([node(9)]);
    let error = test.cluster.create_topic("stranger", stranger).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let all = test.cluster.topics().await.unwrap();
    let shown: Vec<_> = all.iter().map(|t| (t.topic.as_str(), t.partitions)).collect();
    assert_eq!(shown, [("chosen", 4), ("one", 1), ("other", 1), ("seven", 7)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_there_is_a_conflict_unless_that_is_fine() {
    let test = TestCluster::new(1).await;
    let made = topic(&test, "orders", 2).await;
    let again = test.cluster.create_topic("orders", TopicOptions::partitions(2)).await;
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Conflict);
    let missing = TopicOptions::partitions(9).if_missing();
    let found = test.cluster.create_topic("orders", missing).await.unwrap();
    let found: Vec<_> = found.partitions.iter().map(|p| p.partition).collect();
    assert_eq!(found, made);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_partitions_than_fit_are_refused_and_leave_nothing_behind() {
    let test = TestCluster::new(2).await;
    topic(&test, "most", 190).await;
    let error = test.cluster.create_topic("more", TopicOptions::partitions(9)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    for n in 0..2 {
        let count = "select count(*) from shardmq.partition where topic = 'more'";
        let left: i64 = test.sql(n).await.query_one(count, &[]).await.unwrap().get(0);
        assert_eq!(left, 0);
    }
    assert_eq!(topic(&test, "rest", 8).await.len(), 8);
    for count in [0, 9_802] {
        let options = TopicOptions::partitions(count);
        let error = test.cluster.create_topic("none", options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_make_the_same_topic_at_once_one_does() {
    let test = TestCluster::new(2).await;
    let mut making = Vec::new();
    for n in 0..6 {
        // Processes of their own; half of them would take what is there.
        let cluster = Cluster::connect(&test.control_url).await.unwrap();
        making.push(tokio::spawn(async move {
            let options = TopicOptions::partitions(5);
            let options = if n % 2 == 0 { options.if_missing() } else { options };
            let made = cluster.create_topic("orders", options).await;
            made.map(|topic| topic.partitions.iter().map(|p| p.partition).collect::<Vec<_>>())
        }));
    }
    let mut found = Vec::new();
    for task in making {
        match task.await.unwrap() {
            Ok(partitions) => found.push(partitions),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Conflict, "{error}"),
        }
    }
    assert!(found.len() >= 3);
    found.dedup();
    assert_eq!(found.len(), 1);
    let claimed: i64 = {
        let count = "select count(*) from shardmq.partition";
        let one: i64 = test.sql(0).await.query_one(count, &[]).await.unwrap().get(0);
        let two: i64 = test.sql(1).await.query_one(count, &[]).await.unwrap().get(0);
        one + two
    };
    assert_eq!(claimed, 5, "nobody left a claim behind");
}

/// The nodes' claims were committed, and then the process died.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_that_was_cut_off_is_taken_up_again() {
    let test = TestCluster::new(2).await;
    let mut claimed = Vec::new();
    for n in 0..2 {
        let claim = "select shardmq.claim_partitions('orders', gen_random_uuid(), 1, 2, 1, '{}')";
        let rows = test.sql(n).await.query(claim, &[]).await.unwrap();
        claimed.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
    }
    assert!(test.cluster.topics().await.unwrap().is_empty());
    let made = topic(&test, "orders", 4).await;
    assert_eq!(made.iter().map(|p| number(*p)).collect::<Vec<_>>(), claimed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_with_messages_left_is_deleted_by_force_only() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    for (n, partition) in partitions.iter().enumerate() {
        append_texts(&test.sql(n).await, *partition, ["a", "b"]).await;
    }
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    for delivery in take(&mut messages, 4).await.into_iter().skip(1) {
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let error = test.cluster.delete_topic("orders", false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let told = error.to_string();
    assert!(told.contains('g') && told.contains('1') && told.contains("orders"), "{told}");
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    test.cluster.delete_topic("orders", false).await.unwrap();
    assert!(test.cluster.topics().await.unwrap().is_empty());
    let gone = test.cluster.topic("orders").await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    for n in 0..2 {
        let sql = test.sql(n).await;
        assert!(cursors(&sql, "g").await.is_empty());
        let count = "select count(*) from pg_class where relname like 'batch%' and relkind = 'r'";
        let tables: i64 = sql.query_one(count, &[]).await.unwrap().get(0);
        assert_eq!(tables, 0);
    }
    topic(&test, "full", 2).await;
    append_texts(&test.sql(0).await, topic(&test, "unread", 1).await[0], ["x"]).await;
    test.cluster.delete_topic("unread", true).await.unwrap();
}

/// A number that is used again on the same day would go on with ids that somebody may remember.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_is_not_used_again_within_a_day() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set_server("12 hours").await;
    let sql = test.sql(0).await;
    let first = topic(&test, "first", 1).await[0];
    append_texts(&sql, first, ["old"]).await;
    test.cluster.delete_topic("first", true).await.unwrap();
    let second = topic(&test, "second", 1).await[0];
    assert_ne!(first, second);
    clocks.set_server("35 hours").await;
    assert_ne!(topic(&test, "third", 1).await[0], first);
    clocks.set_server("37 hours").await;
    assert_eq!(topic(&test, "fourth", 1).await[0], first);
    append_texts(&sql, first, ["new"]).await;
    let mut messages = test.cluster.consumer("fourth", "g").stream().await.unwrap();
    assert_eq!(next(&mut messages).await.payload(), b"new");
    messages.shutdown(Duration::ZERO).await.unwrap();

    // All numbers of a node are taken for a day: full, and not a matter of trying again.
    topic(&test, "rest", 96).await;
    test.cluster.delete_topic("rest", true).await.unwrap();
    let error = test.cluster.create_topic("again", TopicOptions::partitions(96)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_dead_node_a_topic_is_described_and_neither_made_nor_deleted() {
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 2).await;
    append_texts(&test.sql(0).await, partitions[0], ["a", "b"]).await;
    dying.stop_server(StopMode::Immediate).await.unwrap();
    let described = test.cluster.topic("orders").await.unwrap();
    let states: Vec<_> =
        described.partitions.iter().map(|p| (p.state.as_str(), p.messages)).collect();
    assert_eq!(states, [("open", 2), ("unreachable", 0)]);
    let made = test.cluster.create_topic("more", TopicOptions::partitions(2)).await;
    assert_eq!(made.unwrap_err().kind(), ErrorKind::Unavailable);
    let deleted = test.cluster.delete_topic("orders", true).await;
    assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(test.cluster.topics().await.unwrap().len(), 1);
    // What was begun is finished by the next attempt.
    dying.start_server().await.unwrap();
    test.cluster.delete_topic("orders", true).await.unwrap();
    topic(&test, "more", 2).await;
    assert_eq!(test.cluster.topics().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_another_node_or_anothers_is_refused() {
    let test = TestCluster::new(2).await;
    let other = TestCluster::new(1).await;
    let register = async |number, url: &str| test.cluster.add_node(node(number), url).await;
    // Once more, as a fleet does at each start.
    register(1, &test.node_urls[0]).await.unwrap();
    for (number, url) in
        [(2, &test.node_urls[0]), (3, &test.node_urls[1]), (3, &other.node_urls[0])]
    {
        let error = register(number, url).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    }
    // An empty database in a node's place would hide all that the node has.
    let empty = database(shared_server().await).await;
    let error = register(2, &empty).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    let nodes = test.cluster.nodes().await.unwrap();
    let known: Vec<_> = nodes.iter().map(|n| (n.node.number(), n.url.as_str())).collect();
    assert_eq!(known, [(1, test.node_urls[0].as_str()), (2, test.node_urls[1].as_str())]);
    // It was not marked either.
    register(3, &empty).await.unwrap();
}
