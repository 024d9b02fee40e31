//! `LISTEN/NOTIFY` in every kind of trouble. The server that notifies is the node itself: where it
//! is away, messages are stored later, and come at once then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use shardmq::embedded::{Server, StopMode};
use shardmq::notifier::{HealthState, Hint, Notifier};
use shardmq::testing::NotifierSuite;
use shardmq::{Cluster, Message, NodeId, PartitionId};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::{LATEST, READ, SECOND, SOON, nothing_is_late};
use crate::support::hints::{arrive, hears};
use crate::support::proxy::{Proxy, Rule, cluster_behind_proxy};
use crate::support::reading::{append_texts, next_text};
use crate::support::signals::{signal, signal_all};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, eventually, own_server, prepared, within};

fn partition() -> PartitionId {
    PartitionId::new(1, 1).unwrap()
}

async fn another(test: &TestCluster) -> Cluster {
    Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap()
}

/// As of two processes.
async fn suite_of(test: &TestCluster) -> (NotifierSuite, Cluster) {
    let other = another(test).await;
    let suite = NotifierSuite::new(test.cluster.notifier(), other.notifier(), partition());
    (suite, other)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_comes_back() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let (suite, _other) = suite_of(&test).await;
    let kill = async { server.stop_server(StopMode::Immediate).await.unwrap() };
    let mend = async { server.start_server().await.unwrap() };
    suite.check_interruption(kill, mend).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_suspended() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let (suite, _other) = suite_of(&test).await;
    let stop = async { signal_all(&server, "STOP").await };
    let mend = async { signal_all(&server, "CONT").await };
    suite.check_interruption(stop, mend).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_everything() {
    let (test, proxy) = cluster_behind_proxy().await;
    let (suite, _other) = suite_of(&test).await;
    let rule = async |rule: Rule| {
        proxy.to_client(rule);
        proxy.to_server(rule);
    };
    suite.check_interruption(rule(Rule::Swallow), rule(Rule::Pass)).await.unwrap();
}

/// A server, a cluster, and another that listens as a user of its own by another way.
async fn listener_apart() -> (Server, TestCluster, Cluster, Proxy) {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    test.sql(0).await.batch_execute("create role listener login").await.unwrap();
    let proxy = Proxy::start(server.port()).await;
    let url = proxy.url(&test.node_urls[0]).replace("shardmq@", "listener@");
    let builder = Cluster::builder(&test.control_url).upkeep(false);
    let other = builder.listen_url(NodeId::new(1).unwrap(), &url).connect().await.unwrap();
    (server, test, other, proxy)
}

async fn lock_out(sql: &Client) {
    sql.batch_execute("alter role listener nologin").await.unwrap();
    let kill = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'listener'";
    sql.query(kill, &[]).await.unwrap();
}

async fn let_in(sql: &Client) {
    sql.batch_execute("alter role listener login").await.unwrap();
}

/// The listener's own user, who is locked out for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_may_not_log_in_any_more() {
    let (_server, test, other, _proxy) = listener_apart().await;
    let sql = test.sql(0).await;
    let suite = NotifierSuite::new(test.cluster.notifier(), other.notifier(), partition());
    suite.check_interruption(lock_out(&sql), let_in(&sql)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_while_the_listener_is_locked_out_and_its_network_swallows_everything() {
    let (_server, test, other, proxy) = listener_apart().await;
    topic(&test, "orders", 4).await;
    let sql = test.sql(0).await;
    let trouble = async {
        lock_out(&sql).await;
        tokio::time::sleep(6 * SECOND).await;
        let_in(&sql).await;
        let well = async || other.notifier().health(NodeId::new(1).unwrap()).is_ok();
        eventually("hints arrive again", SOON, well).await;
        for rule in [Rule::Swallow, Rule::Pass] {
            proxy.to_client(rule);
            proxy.to_server(rule);
            tokio::time::sleep(6 * SECOND).await;
        }
    };
    nothing_is_late(&test.cluster, &other, "orders", trouble).await;
}

/// What comes there is not of the node, however much it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listening_address_of_another_node_is_found_out() {
    let test = TestCluster::new(2).await;
    let two = NodeId::new(2).unwrap();
    let builder = Cluster::builder(&test.control_url).upkeep(false);
    let other = builder.listen_url(two, &test.node_urls[0]).connect().await.unwrap();
    let notifier = other.notifier();
    let mut hints = notifier.subscribe(&[partition(), PartitionId::new(2, 1).unwrap()]);
    let ill = async || {
        test.cluster.notifier().publish(&[partition()]);
        notifier.health(two).error.is_some_and(|error| error.contains("did not come back"))
    };
    eventually("it is found out", SOON, ill).await;
    assert!(notifier.health(NodeId::new(1).unwrap()).is_ok());
    test.cluster.notifier().publish(&[partition()]);
    hears(&mut hints, partition()).await;
    assert!(!notifier.health(two).is_ok());
}

/// A commit that takes the server's one lock of those who notify, and hangs with it.
struct Hanging {
    pid: u32,
    commit: JoinHandle<()>,
}

impl Hanging {
    async fn begin(sql: &Client, holder: Client) -> Self {
        sql.batch_execute("create table public.written (n int)").await.unwrap();
        let pid = holder.query_one("select pg_backend_pid()", &[]).await.unwrap();
        let pid = u32::try_from(pid.get::<_, i32>(0)).unwrap();
        // It waits for a standby that there is not, and is suspended there, so that nobody else
        // need wait. What is committed before the checkpointer has read the setting waits for
        // nobody.
        standby(sql, "nobody").await;
        let waits = Arc::new(AtomicBool::new(false));
        let waited = Arc::clone(&waits);
        let commit = tokio::spawn(async move {
            let notify = "begin; insert into public.written values (1); notify noise; commit";
            while !waited.load(Ordering::SeqCst) {
                holder.batch_execute(notify).await.unwrap();
            }
        });
        let look = format!(
            "select exists (select from pg_stat_activity where pid = {pid} and wait_event = 'SyncRep')"
        );
        let look = async || sql.query_one(&look, &[]).await.unwrap().get(0);
        eventually("the commit waits", SOON, look).await;
        waits.store(true, Ordering::SeqCst);
        signal(pid, "STOP").await;
        standby(sql, "").await;
        // When this is done the checkpointer knows of that, too.
        sql.batch_execute("insert into public.written values (2)").await.unwrap();
        Self { pid, commit }
    }

    async fn end(self, sql: &Client) {
        signal(self.pid, "CONT").await;
        // What it waited for is there no more, and nobody told it while it was suspended.
        let waits = format!(
            "select pg_cancel_backend(pid) from pg_stat_activity
              where pid = {} and wait_event = 'SyncRep'",
            self.pid
        );
        sql.query(&waits, &[]).await.unwrap();
        within(SOON, "the end of the commit", self.commit).await.unwrap();
    }
}

/// The standby that commits wait for.
async fn standby(sql: &Client, name: &str) {
    let set = format!("alter system set synchronous_standby_names = '{name}'");
    sql.batch_execute(&set).await.unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    let shown = async || {
        let shown = sql.query_one("show synchronous_standby_names", &[]).await.unwrap();
        shown.get::<_, String>(0) == name
    };
    eventually("the setting holds", SOON, shown).await;
}

/// Somebody else's commit has the lock that all who notify take. Producers do not take it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_producer_waits_for_a_notification_that_hangs() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "orders", 4).await;
    let sql = test.sql(0).await;
    let one = Cluster::builder(&test.control_url).upkeep(false).connections_per_node(1);
    let (one, consuming) = (one.connect().await.unwrap(), another(&test).await);
    let producer = one.producer("orders").build().await.unwrap();
    let mut events = producer.events();
    let trouble = async {
        let hanging = Hanging::begin(&sql, test.sql(0).await).await;
        let begun = Instant::now();
        let mut longest = Duration::ZERO;
        while begun.elapsed() < 8 * SECOND {
            let sent = Instant::now();
            producer.send(Message::new("one more")).await.unwrap();
            longest = longest.max(sent.elapsed());
        }
        let left = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'
                      and query like '%pg_notify%'";
        let left: i64 = sql.query_one(left, &[]).await.unwrap().get(0);
        assert!(left <= 2, "{left} sessions wait");
        assert!(longest < 2 * SECOND, "{longest:?}");
        hanging.end(&sql).await;
        let well = async || consuming.notifier().health(NodeId::new(1).unwrap()).is_ok();
        eventually("it is well again", SOON, well).await;
    };
    nothing_is_late(&one, &consuming, "orders", trouble).await;
    let down = futures_util::FutureExt::now_or_never(events.next());
    assert!(down.is_none(), "{down:?}");
}

/// From 17 on the queue of notifications has a size that can be set; it is full where somebody
/// listens in a transaction that does not end.
async fn fill_the_queue(sql: &Client, holder: &Client) {
    // In one go it would listen from the end of the transaction on.
    holder.batch_execute("listen noise").await.unwrap();
    holder.batch_execute("begin; select 1").await.unwrap();
    let fill = "select pg_notify('noise', n || repeat('x', 7000)) from generate_series(1, 20) as n";
    while sql.query(fill, &[]).await.is_ok() {}
}

/// Nobody who listens holds it any more. The server does not look at that by itself.
async fn empty_the_queue(holder: &Client) {
    holder.batch_execute("commit; unlisten noise").await.unwrap();
}

/// Before that no notification can be sent: what they are sent with has another name, and no
/// session has it prepared.
async fn forbid(sql: &Client) {
    let rename = "alter function pg_notify(text, text) rename to pg_notify_away";
    sql.batch_execute(rename).await.unwrap();
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
                where application_name = 'shardmq' and datname = current_database()";
    sql.query(end, &[]).await.unwrap();
}

async fn allow(sql: &Client) {
    sql.batch_execute("alter function pg_notify_away(text, text) rename to pg_notify")
        .await
        .unwrap();
}

async fn is_17(sql: &Client) -> bool {
    let version = sql.query_one("select current_setting('server_version_num')::int", &[]).await;
    version.unwrap().get::<_, i32>(0) >= 170_000
}

async fn server_with_a_small_queue() -> Server {
    let server = own_server().await;
    let sql = client(&server.url("postgres")).await;
    if !is_17(&sql).await {
        return server;
    }
    drop((sql, server));
    let builder = Server::builder().durable(false).setting("max_notify_queue_pages", "64");
    prepared(builder).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_though_no_notification_can_be_sent() {
    let server = server_with_a_small_queue().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "orders", 4).await;
    let (sql, holder, other) = (test.sql(0).await, test.sql(0).await, another(&test).await);
    let full = is_17(&sql).await;
    let trouble = async {
        if full {
            fill_the_queue(&sql, &holder).await;
        } else {
            forbid(&sql).await;
        }
        // Until it is found out, and longer. That takes longest where no hint was heard before.
        let ill = async || !other.notifier().health(NodeId::new(1).unwrap()).is_ok();
        eventually("it is found out", 30 * SECOND, ill).await;
        tokio::time::sleep(SECOND).await;
        if full {
            empty_the_queue(&holder).await;
        } else {
            allow(&sql).await;
        }
        let well = async || other.notifier().health(NodeId::new(1).unwrap()).is_ok();
        eventually("it is well again", SOON, well).await;
    };
    nothing_is_late(&test.cluster, &other, "orders", trouble).await;
}

/// Before 17 nobody can fill the queue in a test: it takes 8 GB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_publishes_in_a_transaction_can_commit_though_the_queue_is_full() {
    let server = server_with_a_small_queue().await;
    let test = TestCluster::on(&server, 1).await;
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    if !is_17(&sql).await {
        return;
    }
    topic(&test, "orders", 1).await;
    let relaying = Cluster::builder(&test.control_url).connect().await.unwrap();
    let mut messages = relaying.consumer("orders", "g").stream().await.unwrap();
    let asleep = "select last_value from shardmq.outbox_flag";
    let asleep = async || sql.query_one(asleep, &[]).await.unwrap().get::<_, i64>(0) == 1;
    eventually("the relay sleeps", SOON, asleep).await;
    fill_the_queue(&sql, &holder).await;
    for n in 0..3 {
        eventually("the relay sleeps", SOON, asleep).await;
        let publish = format!("select shardmq.publish('orders', '{n}')");
        sql.batch_execute(&publish).await.unwrap();
        assert_eq!(next_text(&mut messages).await, n.to_string());
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_while_the_server_restarts_and_listeners_are_killed() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    topic(&test, "orders", 4).await;
    let other = another(&test).await;
    let trouble = async {
        for _ in 0..5 {
            let sql = test.sql(0).await;
            let kill = "select pg_terminate_backend(pid) from pg_stat_activity
                         where application_name like 'shardmq listen %'";
            sql.query(kill, &[]).await.unwrap();
            tokio::time::sleep(SECOND / 2).await;
        }
        server.restart(StopMode::Immediate).await.unwrap();
    };
    nothing_is_late(&test.cluster, &other, "orders", trouble).await;
}

/// What is stored while nobody can send hints, nor tell that, comes by looking.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_without_a_hint_comes_within_five_seconds() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let handle = messages.handle();
    let well = async || handle.status().notifier.iter().any(|node| node.health.is_ok());
    eventually("hints arrive", SOON, well).await;
    for n in 0..3 {
        append_texts(&sql, partition, [n]).await;
        let stored = Instant::now();
        assert_eq!(next_text(&mut messages).await, n.to_string());
        assert!(stored.elapsed() < LATEST + READ, "{:?}", stored.elapsed());
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_notifications_while_nobody_listens() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let many =
        "select count(pg_notify('shardmq', '10101,' || n)) from generate_series(1, 1000000) as n";
    sql.query(many, &[]).await.unwrap();
    let (suite, other) = suite_of(&test).await;
    for _ in 0..1_000_000 {
        other.notifier().publish(&[partition()]);
    }
    suite.check().await.unwrap();
}

/// The first at once, the others together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_are_merged_for_as_long_as_was_asked_for() {
    let test = TestCluster::new(1).await;
    let interval = Duration::from_millis(400);
    let builder = Cluster::builder(&test.control_url).upkeep(false);
    let slow = builder.hint_interval(interval).connect().await.unwrap();
    let all: Vec<_> = (1..=50).map(|table| PartitionId::new(1, table).unwrap()).collect();
    let mut hints = test.cluster.notifier().subscribe(&all);
    arrive(&mut hints).await;
    // Connected, and rested.
    slow.notifier().publish(&all[..1]);
    hears(&mut hints, all[0]).await;
    tokio::time::sleep(2 * interval).await;
    let began = Instant::now();
    slow.notifier().publish(&all[..1]);
    hears(&mut hints, all[0]).await;
    assert!(began.elapsed() < interval, "{:?}", began.elapsed());
    for partition in &all[1..] {
        slow.notifier().publish(&[*partition]);
    }
    let second = hints.next().await.unwrap();
    assert_eq!(second, Hint::Partitions(all[1..].to_vec()));
    assert!(began.elapsed() >= interval, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_listeners_hear_all_at_once() {
    let builder = Server::builder().durable(false).setting("max_connections", "1100");
    let server = prepared(builder.setting("shared_buffers", "16MB")).await;
    let test = TestCluster::on(&server, 1).await;
    let url = &test.node_urls[0];
    let mut listeners = Vec::new();
    for _ in 0..20 {
        let some = join_all((0..50).map(|_| async {
            let listener = client(url).await;
            listener.batch_execute("listen shardmq").await.unwrap();
            listener
        }));
        listeners.extend(some.await);
    }
    let other = another(&test).await;
    let mut hints = other.notifier().subscribe(&[partition()]);
    arrive(&mut hints).await;
    let began = Instant::now();
    for _ in 0..10 {
        test.cluster.notifier().publish(&[partition()]);
        hears(&mut hints, partition()).await;
    }
    assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_of_one_process_look_one_at_a_time() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 4).await;
    let builder = Cluster::builder(&test.control_url).upkeep(false).connections_per_node(8);
    let none = shardmq::notifier::NotifierKind::None;
    let cluster = builder.notifier_kind(none).connect().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let mut consumers = Vec::new();
    // Not so many that one waits for its turn longer than it would.
    for n in 0..5 {
        let group = format!("g{n}");
        consumers.push(cluster.consumer("orders", &group).stream().await.unwrap());
    }
    let all = async || consumers.iter().all(|one| one.handle().held_partitions() == 4);
    eventually("all have all", SOON, all).await;
    let states = consumers.iter().map(|one| one.handle().status().notifier[0].health.state);
    assert!(states.into_iter().all(|state| state == HealthState::Polling));
    let sql = test.sql(0).await;
    // Each look takes a tenth of a second.
    sql.batch_execute(
        "begin; alter table shardmq.partition rename to partition_behind;
         create view shardmq.partition as
             select p.* from shardmq.partition_behind p cross join (select pg_sleep(0.1)) slow;
         commit",
    )
    .await
    .unwrap();
    let looking = "select count(*) from pg_stat_activity
                    where datname = current_database() and state = 'active'
                      and query like 'select l.partition, p.day, l.last_id%'";
    let (one, more) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let seen = async || {
        match sql.query_one(looking, &[]).await.unwrap().get::<_, i64>(0) {
            0 => {}
            1 => drop(one.fetch_add(1, Ordering::SeqCst)),
            _ => drop(more.fetch_add(1, Ordering::SeqCst)),
        }
        one.load(Ordering::SeqCst) + more.load(Ordering::SeqCst) >= 50
    };
    eventually("enough looks are seen", SOON, seen).await;
    let (one, more) = (one.into_inner(), more.into_inner());
    // On a busy machine a turn lasts longer than anybody waits for it.
    assert!(more * 3 <= one, "{more} times more than one, {one} times one");
    sql.batch_execute(
        "begin; drop view shardmq.partition;
         alter table shardmq.partition_behind rename to partition; commit",
    )
    .await
    .unwrap();
    producer.send(Message::new("to all")).await.unwrap();
    for messages in &mut consumers {
        assert_eq!(next_text(messages).await, "to all");
    }
}
