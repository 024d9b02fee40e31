//! Through PgBouncer in transaction mode, which gives each transaction any of its server connections:
//! all works, nothing is left in a session, and nothing that is promised is lost.

use std::collections::HashMap;
use std::time::Duration;

use shardmq::migrate::{Schema, migrate};
use shardmq::notifier::{HealthState, LocalNotifier};
use shardmq::testing::NotifierSuite;
use shardmq::{
    Cluster, ErrorKind, Message, Messages, NodeId, PartitionId, PreparedStatements, Retention,
    TopicOptions,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::support::held::Way;
use crate::support::pgbouncer::{
    PgBouncer, Unknown, cluster_through, cluster_with, left_in_session,
};
use crate::support::proxy::{Proxy, Rule};
use crate::support::reading::{append_texts, next_text, take, text, texts_until};
use crate::support::stored::{all_stored, assert_acknowledged, assert_dense, stored, topic};
use crate::support::{TestCluster, database, eventually, shared_server, within};

/// A server that comes back without the end of its log, while clients' connections go on.
mod lost_tail;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(10);
/// Long, where what is tested must not come from a look.
const NEVER: Duration = Duration::from_mins(10);

async fn pooler(pool_size: u8) -> PgBouncer {
    PgBouncer::start(shared_server().await, pool_size, Unknown::Refused).await
}

async fn consume(cluster: &Cluster) -> Messages {
    let builder = cluster.consumer("orders", "g").poll_interval(SECOND / 20);
    builder.stream().await.unwrap()
}

/// A topic of one partition. Through the pooler it takes two server connections, one for the control
/// database and one for the node.
async fn topic_made_directly(test: &TestCluster) -> PartitionId {
    let direct = Cluster::builder(&test.node_urls[0]).connect().await.unwrap();
    let made = direct.create_topic("orders", TopicOptions::partitions(1)).await.unwrap();
    direct.shutdown().await;
    made.partitions[0].partition
}

/// Sends three messages and consumes them.
async fn round_trip(cluster: &Cluster) {
    let producer = cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(cluster).await;
    for n in 0..3 {
        producer.send(Message::new(n.to_string()).key("k").header("n", "v")).await.unwrap();
    }
    for (n, delivery) in take(&mut messages, 3).await.into_iter().enumerate() {
        assert_eq!((text(&delivery), delivery.key()), (n.to_string(), Some("k")));
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(cluster.lag("orders").await.unwrap()[0].lag, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_is_found_out_whether_it_refuses_a_parameter_or_leaves_it_out() {
    for unknown in [Unknown::Refused, Unknown::Ignored] {
        let pooler = PgBouncer::start(shared_server().await, 1, unknown).await;
        let test = cluster_through(shared_server().await, pooler.port()).await;
        topic_made_directly(&test).await;
        round_trip(&test.cluster).await;
        let left = left_in_session(&test.control_url).await;
        assert!(left.is_empty(), "{unknown:?}: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_are_kept_where_the_user_says_so() {
    let pooler = pooler(1).await;
    let server = shared_server().await;
    let always = |builder: shardmq::ClusterBuilder| {
        // With one server connection they stay where they were made.
        builder.prepared_statements(PreparedStatements::Always).connections_per_node(1)
    };
    let test = cluster_with(server, pooler.port(), always).await;
    assert!(!left_in_session(&test.control_url).await.is_empty());
    let direct = TestCluster::new(1).await;
    let never = Cluster::builder(&direct.control_url);
    let never = never.upkeep(false).prepared_statements(PreparedStatements::Never);
    let never = never.connect().await.unwrap();
    topic(&direct, "orders", 1).await;
    round_trip(&never).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producers_and_consumers_of_two_processes_worth_share_two_server_connections() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partitions = topic(&test, "orders", 4).await;
    let builder = Cluster::builder(&test.control_url).connections_per_node(4);
    let other = builder.connect().await.unwrap();
    let mut senders = JoinSet::new();
    for (sender, cluster) in [&test.cluster, &other, &test.cluster, &other].into_iter().enumerate()
    {
        let producer = cluster.producer("orders").build().await.unwrap();
        senders.spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0..50 {
                let text = format!("{sender}:{n}");
                let message = Message::new(text.clone()).key(sender.to_string());
                acknowledged.push((text, producer.send(message).await.unwrap()));
            }
            acknowledged
        });
    }
    let (mut consumers, end) = (JoinSet::new(), CancellationToken::new());
    for cluster in [&test.cluster, &other, &other] {
        let messages = consume(cluster).await;
        consumers.spawn(consume_until(messages, end.clone()));
    }
    let mut acknowledged = Vec::new();
    while let Some(sent) = senders.join_next().await {
        acknowledged.extend(sent.unwrap());
    }
    let lag = async || other.lag("orders").await.unwrap().iter().map(|lag| lag.lag).sum::<u64>();
    eventually("all is consumed", 3 * SOON, async || lag().await == 0).await;
    end.cancel();
    let mut delivered: HashMap<String, Vec<u32>> = HashMap::new();
    while let Some(texts) = consumers.join_next().await {
        for text in texts.unwrap() {
            let (sender, n) = text.split_once(':').unwrap();
            delivered.entry(sender.to_owned()).or_default().push(n.parse().unwrap());
        }
    }
    assert_eq!(delivered.len(), 4);
    for (sender, mut numbers) in delivered {
        // A partition that changed hands may have been read again from its cursor.
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers, (0..50).collect::<Vec<_>>(), "{sender}");
    }
    let sql = test.sql(0).await;
    let all = all_stored(&sql, &partitions).await;
    assert_acknowledged(&all, &acknowledged);
    assert!(pooler.servers().await <= 2 && pooler.clients().await > 2);
    assert_eq!(lag().await, 0);
}

/// Acknowledges everything until it is told to end.
async fn consume_until(mut messages: Messages, end: CancellationToken) -> Vec<String> {
    let mut texts = Vec::new();
    while let Some(delivery) = end.run_until_cancelled(messages.next()).await {
        // An error is news: a partition went to another consumer.
        let Ok(delivery) = delivery.unwrap() else { continue };
        texts.push(text(&delivery));
        let _ = delivery.ack();
    }
    messages.shutdown(SECOND).await.unwrap();
    texts
}

/// Their statements would have the same names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_do_not_run_each_others_statements() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partitions = topic(&test, "orders", 2).await;
    let mut processes = JoinSet::new();
    for process in 0..3 {
        let url = test.control_url.clone();
        processes.spawn(async move {
            let lines: Vec<String> = (0..40).map(|n| format!("{process}-{n}")).collect();
            let lines = lines.join("\n");
            let run = crate::command::run_with(&url, "produce orders", lines.as_bytes());
            run.await.good();
        });
    }
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for n in 0..40 {
        producer.send(Message::new(format!("here-{n}"))).await.unwrap();
    }
    processes.join_all().await;
    let sql = test.sql(0).await;
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 160);
}

/// Several partitions in one commit: who has another's lock does not hold up the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_is_locked_does_not_hold_up_the_others() {
    let pooler = pooler(4).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partitions = topic(&test, "orders", 6).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let holder = test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", partitions[0]);
    holder.batch_execute(&lock).await.unwrap();
    let mut receipts = Vec::new();
    for n in 0..600 {
        let message = Message::new(n.to_string()).key(n.to_string());
        receipts.push(producer.enqueue(message).await.unwrap());
    }
    let sql = test.sql(0).await;
    let others = || async {
        let all = all_stored(&sql, &partitions[1..]).await;
        all.len() > 450
    };
    eventually("the others have theirs", 20 * SECOND, others).await;
    assert!(stored(&sql, partitions[0]).await.is_empty());
    holder.batch_execute("commit").await.unwrap();
    for receipt in receipts {
        within(SOON, "a receipt", receipt).await.unwrap();
    }
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 600);
}

/// A producer that goes to a proxy, that goes to the pooler, that goes to the server.
async fn held(
    pooler: &PgBouncer,
    settings: impl FnOnce(shardmq::ProducerBuilder) -> shardmq::ProducerBuilder,
) -> Way {
    let proxy = Proxy::start(pooler.port()).await;
    // Hints stay in this process: one on its way would keep a connection that the test needs.
    let quiet = |builder: shardmq::ClusterBuilder| builder.notifier(LocalNotifier::new());
    let test = cluster_with(shared_server().await, proxy.port(), quiet).await;
    Way::of((test, proxy), settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_answer_was_lost_is_stored_once() {
    let pooler = pooler(4).await;
    let way = held(&pooler, |builder| builder.append_timeout(8 * SECOND)).await;
    way.proxy.to_client(Rule::Hold);
    let send = way.send("x");
    way.eventually_stored(2).await;
    way.proxy.cut();
    way.proxy.to_client(Rule::Pass);
    let id = within(SOON, "the repeat", send).await.unwrap().unwrap();
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dedup_key_is_stored_once_and_no_statement_is_left() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partitions = topic(&test, "orders", 2).await;
    let other = Cluster::builder(&test.control_url).connections_per_node(4);
    let other = other.connect().await.unwrap();
    let mut sends = JoinSet::new();
    for cluster in [&test.cluster, &other, &test.cluster, &other] {
        let producer = cluster.producer("orders").build().await.unwrap();
        sends.spawn(async move {
            let message = |n: u32| Message::new(n.to_string()).dedup_key(n.to_string());
            let sent = producer.send_all((0..50).map(message)).await;
            sent.into_iter().map(Result::unwrap).collect::<Vec<_>>()
        });
    }
    let sent = within(SOON, "all", sends.join_all()).await;
    assert!(sent.iter().all(|ids| *ids == sent[0]));
    let sql = test.sql(0).await;
    assert_eq!(all_stored(&sql, &partitions).await.len(), 50);
    assert!(left_in_session(&test.control_url).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dedup_key_whose_answer_was_lost_or_original_is_late_is_stored_once() {
    let pooler = pooler(4).await;
    let way = held(&pooler, |builder| builder.append_timeout(3 * SECOND)).await;
    way.proxy.to_client(Rule::Hold);
    let send = way.send_message(Message::new("x").dedup_key("x"));
    way.eventually_stored(2).await;
    way.proxy.cut();
    way.proxy.to_client(Rule::Pass);
    let id = within(SOON, "the repeat", send).await.unwrap().unwrap();
    assert_eq!(way.stored().await[1].id, id);
    let large = Message::new("m".repeat(12_000)).dedup_key("y");
    let (send, original) = way.send_held_message(large).await;
    way.free_all_but(&original);
    let id = within(SOON, "the repeat", send).await.unwrap().unwrap();
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[2].id), (3, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_that_comes_after_its_repeat_is_not_stored_again() {
    let pooler = pooler(4).await;
    let way = held(&pooler, |builder| builder).await;
    let (send, original) = way.send_held().await;
    way.free_all_but(&original);
    let id = within(SOON, "the repeat", send).await.unwrap().unwrap();
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_given_up_is_fenced_and_its_late_original_turned_away() {
    let pooler = pooler(4).await;
    // Its repeat waits for the lock until the send timeout is over, and then the fence does.
    let settings = |builder: shardmq::ProducerBuilder| {
        builder.send_timeout(5 * SECOND).append_timeout(4 * SECOND)
    };
    let way = held(&pooler, settings).await;
    let holder = way.test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", way.partition);
    holder.batch_execute(&lock).await.unwrap();
    let (send, original) = way.send_held().await;
    way.free_all_but(&original);
    let asks = "select exists (select from pg_stat_activity where datname = current_database()
                   and wait_event_type = 'Lock' and query like '%fence_batch%')";
    let fences = || async { way.sql.query_one(asks, &[]).await.unwrap().get(0) };
    eventually("the fence waits for the lock", 20 * SECOND, fences).await;
    holder.batch_execute("commit").await.unwrap();
    let outcome = within(SOON, "an answer", send).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(way.refused().await, 1);
    way.release(&original).await;
    assert_eq!(way.stored().await.len(), 1, "what was said not to be sent is stored");
}

/// The lock is taken when all of the batch has arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_falls_silent_in_the_middle_of_a_batch_keeps_nobody_out() {
    let pooler = pooler(4).await;
    let way = held(&pooler, |builder| builder.append_timeout(5 * SECOND)).await;
    way.proxy.to_server(Rule::HoldAfter(200_000));
    let send = way.send(&"x".repeat(600_000));
    let begun = "select exists (select from pg_stat_activity where datname = current_database()
                   and query like 'begin%' or query like '%append_batch%'
                   and pid <> pg_backend_pid() and xact_start is not null)";
    let half = || async {
        let kept = way.proxy.links().iter().any(|link| link.to_server.kept() > 0);
        kept && way.sql.query_one(begun, &[]).await.unwrap().get(0)
    };
    eventually("half of it is there", 20 * SECOND, half).await;
    let others = append_texts(&way.sql, way.partition, ["other"]);
    // Sooner than the server ends a transaction that nobody goes on with.
    within(4 * SECOND, "another's append", others).await;
    way.proxy.to_server(Rule::Pass);
    let id = within(SOON, "the rest", send).await.unwrap().unwrap();
    let all = way.stored().await;
    assert_eq!((all.len(), all[2].id), (3, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_looks_after_a_cluster_goes_through_it() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let cluster = &test.cluster;
    topic(&test, "orders", 2).await;
    let retention = Retention { days: 3, drop_unread: true, ..Retention::default() };
    cluster.create_topic("other", TopicOptions::partitions(1)).await.unwrap();
    cluster.set_retention("orders", retention).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let id = producer.send(Message::new("x")).await.unwrap();
    cluster.look_after_nodes().await.unwrap();
    assert_eq!(cluster.message(id).await.unwrap().unwrap().payload, b"x");
    assert_eq!(cluster.peek(id.partition(), None, 9).await.unwrap().len(), 1);
    assert_eq!(cluster.topic("orders").await.unwrap().partitions.len(), 2);
    cluster.delete_topic("other", false).await.unwrap();
    assert_eq!(cluster.topics().await.unwrap().len(), 1);
    let start = shardmq::Start::Id(id);
    let mut messages = cluster.consumer("orders", "late").start(start).stream().await.unwrap();
    assert_eq!(texts_until(&mut messages, "x").await.len(), 0);
    messages.shutdown(SECOND).await.unwrap();
}

/// It needs a session, which it would leave locked to whoever comes next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_are_refused_before_anything_is_done() {
    for unknown in [Unknown::Refused, Unknown::Ignored] {
        let pooler = PgBouncer::start(shared_server().await, 1, unknown).await;
        let url = database(shared_server().await).await;
        let error = migrate(&pooler.url(&url), Schema::Node).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("Postgres itself"), "{error}");
        assert!(migrate(&url, Schema::Node).await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_are_heard_at_the_address_that_is_given_for_listening() {
    let pooler = pooler(1).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partition = topic_made_directly(&test).await;
    let node = partition.node();
    let builder = Cluster::builder(&test.control_url).listen_url(node, &test.node_urls[0]);
    let cluster = builder.connect().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let mut messages = cluster.consumer("orders", "g").poll_interval(NEVER).stream().await.unwrap();
    let hints = || messages.handle().status().notifier;
    let listens = async || hints().iter().any(|node| node.health.is_ok());
    eventually("somebody listens", SOON, listens).await;
    producer.send(Message::new("first")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "first");
    producer.send(Message::new("at once")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "at once");
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_notifier_conforms_also_where_only_listening_goes_straight() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let node = NodeId::new(1).unwrap();
    let builder = || Cluster::builder(&test.control_url).upkeep(false);
    let other = builder().listen_url(node, &test.node_urls[0]).connect().await.unwrap();
    let partition = PartitionId::new(1, 1).unwrap();
    let suite = NotifierSuite::new(test.cluster.notifier(), other.notifier(), partition);
    suite.check().await.unwrap();
    let sql = test.sql(0).await;
    // Nobody gets through the pooler, and who listens is ended.
    let console = pooler.console().await;
    let cut = async {
        let kill = "select pg_terminate_backend(pid) from pg_stat_activity
                     where application_name like 'shardmq listen %' and datname = current_database()";
        console.simple_query("pause").await.unwrap();
        sql.query(kill, &[]).await.unwrap();
    };
    let mend = async { drop(console.simple_query("resume").await.unwrap()) };
    suite.check_interruption(cut, mend).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_one_messages_come_with_the_next_look_and_nobodys_session_listens() {
    let pooler = pooler(1).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    let partition = topic_made_directly(&test).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let sql = test.sql(0).await;
    let handle = messages.handle();
    let pooled = async || {
        let hints = handle.status().notifier;
        hints.iter().any(|node| node.health.state == HealthState::Polling)
    };
    eventually("the pooler is found out", SOON, pooled).await;
    let what_to_set = handle.status().notifier[0].health.error.clone().unwrap();
    assert!(what_to_set.contains("listen_url"), "{what_to_set}");
    for n in 0..3 {
        append_texts(&sql, partition, [n]).await;
        assert_eq!(next_text(&mut messages).await, n.to_string());
    }
    assert!(left_in_session(&test.control_url).await.is_empty());
    assert_dense(&stored(&sql, partition).await);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_says_where_to_listen_and_it_must_lead_to_the_node() {
    let pooler = pooler(2).await;
    let test = cluster_through(shared_server().await, pooler.port()).await;
    topic_made_directly(&test).await;
    let node = NodeId::new(1).unwrap();
    let elsewhere = database(shared_server().await).await;
    let error = test.cluster.set_listen_url(node, Some(&elsewhere)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.chain());
    let two = NodeId::new(2).unwrap();
    let error = test.cluster.set_listen_url(two, Some(&elsewhere)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = test.cluster.set_listen_url(node, Some(&test.control_url)).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("pooler"), "{error}");
    test.cluster.set_listen_url(node, Some(&test.node_urls[0])).await.unwrap();
    let health = async |builder: shardmq::ClusterBuilder| {
        let cluster = builder.connect().await.unwrap();
        cluster.notifier_health().await.unwrap().remove(0).health
    };
    let builder = || Cluster::builder(&test.control_url).upkeep(false);
    let well = health(builder()).await;
    assert!(well.is_ok(), "{well:?}");
    // A process that was told otherwise, and wrong, hears nothing there, and knows.
    let deaf = health(builder().listen_url(node, &elsewhere)).await;
    assert!(!deaf.is_ok() && deaf.error.is_some(), "{deaf:?}");
    test.cluster.set_listen_url(node, None).await.unwrap();
    assert_eq!(health(builder()).await.state, HealthState::Polling);
}

#[tokio::test]
async fn an_address_for_listening_that_is_none_is_refused_and_not_shown() {
    let test = TestCluster::new(1).await;
    let node = NodeId::new(1).unwrap();
    let builder = Cluster::builder("postgresql://u:secret@h/d");
    let builder = builder.listen_url(node, "postgresql://u:secret@h:port/d");
    assert!(!format!("{builder:?}").contains("secret"));
    let builder = Cluster::builder(&test.control_url);
    let error = builder.listen_url(node, "postgresql://u:secret@h:port/d").connect().await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(!error.chain().contains("secret"));
}
