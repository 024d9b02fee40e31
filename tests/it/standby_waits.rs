//! A commit whose wait for a standby was cancelled counts as unknown, not as done.

use std::fmt::Debug;
use std::time::Duration;

use shardmq::{Cluster, ErrorKind, Message, NodeId, Producer, TopicOptions};
use tokio::task::JoinHandle;

use crate::support::pgbouncer::{PgBouncer, Unknown, cluster_through};
use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::reading::{cursors, next, text};
use crate::support::relays::{Relay, publish, through};
use crate::support::standby_away::StandbyAway;
use crate::support::stored::{Stored, all_stored, topic};
use crate::support::{TestCluster, client, database, own_server, prepared, shared_server, within};

const SOON: Duration = Duration::from_secs(20);

/// A call whose commit waits, again and again: each wait is cancelled, twice. It has an answer only
/// once a commit did wait to its end.
async fn outlasts<T: Debug + Send + 'static>(
    mut away: StandbyAway,
    call: JoinHandle<shardmq::Result<T>>,
) -> T {
    for _ in 0..2 {
        away.cancel().await;
        away.next().await;
        assert!(!call.is_finished(), "answered: {:?}", call.await);
    }
    away.over().await;
    within(SOON, "the answer", call).await.unwrap().unwrap()
}

fn sending(
    producer: &Producer,
    message: Message,
) -> JoinHandle<shardmq::Result<shardmq::MessageId>> {
    let producer = producer.clone();
    tokio::spawn(async move { producer.send(message).await })
}

/// Sent with and without a dedup key, where each commit but the last is cancelled while it waits:
/// stored once.
async fn all_sends_outlast(server: &shardmq::embedded::Server, test: &TestCluster) {
    let partitions = topic(test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    for message in [Message::new("plain"), Message::new("once").dedup_key("k")] {
        let away = StandbyAway::begin(server).await;
        outlasts(away, sending(&producer, message)).await;
    }
    let stored = all_stored(&test.sql(0).await, &partitions).await;
    let texts: Vec<&str> = stored.iter().map(Stored::text).collect();
    assert_eq!(texts, ["before", "plain", "once"]);
}

/// Also where the database's default lets no warning through.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_has_its_id_only_once_the_standby_has_it() {
    let silent = shardmq::embedded::Server::builder().durable(false).trusts_everybody();
    let server = prepared(silent.setting("client_min_messages", "error")).await;
    let test = TestCluster::on(&server, 1).await;
    all_sends_outlast(&server, &test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_through_a_pooler_has_its_id_only_once_the_standby_has_it() {
    let server = own_server().await;
    let pooler = PgBouncer::start(&server, 4, Unknown::Ignored).await;
    let test = cluster_through(&server, pooler.port()).await;
    all_sends_outlast(&server, &test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_whose_session_is_ended_has_its_id_only_once_the_standby_has_it() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut away = StandbyAway::begin(&server).await;
    let call = sending(&producer, Message::new("one"));
    away.terminate().await;
    away.next().await;
    assert!(!call.is_finished());
    away.over().await;
    within(SOON, "the id", call).await.unwrap().unwrap();
    assert_eq!(all_stored(&test.sql(0).await, &partitions).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_is_confirmed_only_once_the_standby_has_the_cursors() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let id = producer.send(Message::new("one")).await.unwrap();
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let delivery = next(&mut messages).await;
    let away = StandbyAway::begin(&server).await;
    delivery.ack().unwrap();
    let flushing = tokio::spawn(async move {
        let flushed = messages.flush().await;
        flushed.map(|()| messages)
    });
    let messages = outlasts(away, flushing).await;
    let moved = cursors(&test.sql(0).await, "g").await;
    assert_eq!(moved[0].1.acked_id, id.number());
    drop(messages);
}

/// What is forgotten in the outbox is on the node's standby.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_forgets_what_the_standby_has() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 1).await;
    let shop = database(shared_server().await).await;
    let shop_sql = client(&shop).await;
    let _relay = Relay::with(&test, "orders", |builder| builder.outbox(&shop)).await;
    publish(&shop_sql, "orders", "one", None).await;
    through(&shop_sql).await;
    let mut away = StandbyAway::begin(&server).await;
    publish(&shop_sql, "orders", "two", None).await;
    for _ in 0..2 {
        away.cancel().await;
        away.next().await;
        let left = "select (select count(*) from shardmq.outbox) + (select count(*) from shardmq.outbox_batch)";
        let left: i64 = shop_sql.query_one(left, &[]).await.unwrap().get(0);
        assert_eq!(left, 1, "it is forgotten");
    }
    away.over().await;
    through(&shop_sql).await;
    assert_eq!(all_stored(&test.sql(0).await, &partitions).await.len(), 2);
}

/// A change of the topology whose commit did not wait is unknown; that it is there already is told
/// only once the standby has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_is_made_only_once_the_standby_of_the_control_database_has_it() {
    let server = own_server().await;
    let (control, node) = (database(&server).await, database(shared_server().await).await);
    let cluster = Cluster::builder(&control).upkeep(false).connect().await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &node).await.unwrap();
    let mut away = StandbyAway::begin(&server).await;
    let create = || {
        let (cluster, options) = (cluster.clone(), TopicOptions::partitions(1).if_missing());
        tokio::spawn(async move { cluster.create_topic("orders", options).await.map(drop) })
    };
    for _ in 0..2 {
        let call = create();
        away.cancel().await;
        let error = within(SOON, "an answer", call).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unknown, "{}", error.chain());
    }
    let call = create();
    away.next().await;
    away.over().await;
    within(SOON, "the answer", call).await.unwrap().unwrap();
}

/// Whatever is tried, and however often, while a standby is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_hang_keep_their_connections_and_open_no_others() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "orders", 4).await;
    let builder = test.cluster.producer("orders").append_timeout(Duration::from_millis(50));
    let producer = builder.build().await.unwrap();
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.flush().await.unwrap();
    let away = StandbyAway::begin(&server).await;
    let message = |number: u32| Message::new(number.to_string()).key(number.to_string());
    let calls: Vec<_> = (0..20).map(|number| sending(&producer, message(number))).collect();
    let sql = test.sql(0).await;
    let count =
        "select count(*) filter (where wait_event = 'SyncRep'), count(*) from pg_stat_activity
                  where application_name = 'shardmq' and datname = current_database()";
    let (mut most_hang, mut most) = (0, 0);
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        let row = sql.query_one(count, &[]).await.unwrap();
        most_hang = most_hang.max(row.get::<_, i64>(0));
        most = most.max(row.get::<_, i64>(1));
    }
    assert_eq!(most_hang, 2, "commits hang on all data connections");
    // Two for data and one beside them while they hang; three to the control database.
    assert!(most <= 6, "{most} connections");
    assert!(calls.iter().all(|call| !call.is_finished()));
    away.over().await;
    for call in calls {
        within(SOON, "the id", call).await.unwrap().unwrap();
    }
    let mut came = std::collections::BTreeSet::new();
    while came.len() < 20 {
        let delivery = next(&mut messages).await;
        came.insert(text(&delivery));
        delivery.ack().unwrap();
    }
}

/// Nothing ends the connections, and nothing comes on them any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_whose_answers_are_lost_keep_their_places_only_until_that_is_seen() {
    let (test, proxy) = cluster_behind_proxy().await;
    topic(&test, "orders", 4).await;
    let builder = test.cluster.producer("orders").append_timeout(Duration::from_millis(200));
    let producer = builder.build().await.unwrap();
    let message = |number: u32| Message::new(number.to_string()).key(number.to_string());
    for id in producer.send_all((0..20).map(message)).await {
        id.unwrap();
    }
    proxy.links().iter().for_each(|link| link.to_client.set(Rule::Swallow));
    let sent = within(SOON, "the ids", producer.send_all((0..20).map(message))).await;
    for id in sent {
        id.unwrap();
    }
}
