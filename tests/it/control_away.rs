//! The control database falls silent or goes: whoever works goes on, and processes start from a
//! file.

use std::path::Path;
use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use shardmq::{Cluster, ClusterBuilder, ErrorKind, Message, NodeId, TopicOptions};

use crate::command::run_with;
use crate::support::proxy::{Proxy, Rule};
use crate::support::reading::{next, text};
use crate::support::{client, database, eventually, own_server, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);
/// So that nothing is found by looking.
const NEVER: Duration = Duration::from_hours(1);

/// A control database on a server of its own, and one node that stays.
struct Setting {
    control: Server,
    url: String,
    node_url: String,
    folder: tempfile::TempDir,
}

impl Setting {
    async fn new() -> Self {
        let control = own_server().await;
        let url = database(&control).await;
        let node_url = database(shared_server().await).await;
        let cluster = Cluster::connect(&url).await.unwrap();
        cluster.add_node(NodeId::new(1).unwrap(), &node_url).await.unwrap();
        cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
        cluster.shutdown().await;
        Self { control, url, node_url, folder: tempfile::tempdir().unwrap() }
    }

    /// What a process that keeps the topology in a file begins with.
    fn process(&self) -> ClusterBuilder {
        Cluster::builder(&self.url).upkeep(false).topology_file(self.file())
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("topology.json")
    }

    /// Waits until the file has something in it.
    async fn kept(&self, what: &str) {
        eventually(&format!("{what} in the file"), SOON, async || has(&self.file(), what)).await;
    }
}

fn has(file: &Path, what: &str) -> bool {
    std::fs::read_to_string(file).is_ok_and(|text| text.contains(what))
}

/// One message through a cluster, from its own producer to its own consumer.
async fn works(cluster: &Cluster, name: &str) {
    let consumer = cluster.consumer("orders", "g").lease(SECOND).poll_interval(SECOND / 5);
    let mut messages = within(SOON, "a stream", consumer.stream()).await.unwrap();
    let producer = within(SOON, "a producer", cluster.producer("orders").build()).await.unwrap();
    producer.send(Message::new(name.to_owned()).key("k")).await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(text(&delivery), name);
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_on_without_it_and_processes_start_from_their_file() {
    let setting = Setting::new().await;
    let running = setting.process().connect().await.unwrap();
    let consumer = running.consumer("orders", "always").poll_interval(SECOND / 5);
    let mut messages = consumer.stream().await.unwrap();
    let producer = running.producer("orders").build().await.unwrap();
    works(&running, "before").await;
    setting.kept("orders").await;

    setting.control.stop_server(StopMode::Immediate).await.unwrap();
    let unknown = running.producer("payments").build().await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Unavailable, "{}", unknown.chain());
    works(&running, "meanwhile").await;
    let without = Cluster::connect(&setting.url).await.unwrap_err();
    assert_eq!(without.kind(), ErrorKind::Unavailable, "{}", without.chain());
    let started = within(SOON, "a start", setting.process().connect()).await.unwrap();
    works(&started, "started").await;
    let produce =
        format!("produce orders --key-field k --topology-file {}", setting.file().display());
    run_with(&setting.url, &produce, b"{\"k\": \"k\"}\n").await.good();
    let new_group = started.consumer("orders", "new").stream().await.unwrap_err();
    assert_eq!(new_group.kind(), ErrorKind::Unavailable);
    assert!(new_group.to_string().contains("no node that answers knows group new"), "{new_group}");
    producer.send(Message::new("last").key("k")).await.unwrap();
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last| last != "last") {
        let delivery = next(&mut messages).await;
        seen.push(text(&delivery));
        delivery.ack().unwrap();
    }
    assert_eq!(seen, ["before", "meanwhile", "started", "{\"k\": \"k\"}", "last"]);
    messages.flush().await.unwrap();

    setting.control.start_server().await.unwrap();
    // Whoever started without it hears of what is new.
    let back = || async { running.topics().await.is_ok() };
    eventually("it is back", SOON, back).await;
    running.create_topic("payments", TopicOptions::partitions(1)).await.unwrap();
    started.producer("payments").build().await.unwrap();
    setting.kept("payments").await;
    let second = database(shared_server().await).await;
    running.add_node(NodeId::new(2).unwrap(), &second).await.unwrap();
    setting.kept(&second).await;
    messages.shutdown(SECOND).await.unwrap();
}

/// By notification, and by the look that follows where listening was interrupted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_told_to_processes_that_run() {
    let setting = Setting::new().await;
    let process = setting.process().look_interval(NEVER).connect().await.unwrap();
    let other = Cluster::builder(&setting.url).upkeep(false).connect().await.unwrap();
    let sql = client(&setting.url).await;
    let listening = "select pid from pg_stat_activity
                      where datname = current_database() and application_name like 'shardmq topology %'
                        and query like '%; listen shardmq_topology%'";
    let listens = || async { sql.query(listening, &[]).await.unwrap().len() == 2 };
    eventually("both listen", SOON, listens).await;
    for (number, ended) in [(2, false), (3, true)] {
        let url = database(shared_server().await).await;
        other.add_node(NodeId::new(number).unwrap(), &url).await.unwrap();
        setting.kept(&url).await;
        if !ended {
            let end = format!("select pg_terminate_backend(pid) from ({listening}) as l");
            sql.batch_execute(&end).await.unwrap();
        }
    }
    drop(process);
}

/// While nobody can say who else is in the group, what is free for long is taken whoever's it
/// should be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_leaves_while_it_is_away_is_taken_by_the_others() {
    let setting = Setting::new().await;
    let cluster = setting.process().connect().await.unwrap();
    let sql = client(&setting.url).await;
    // One that will not come, and is not known to be gone.
    sql.batch_execute(
        "insert into shardmq_control.member (member, topic, group_name, host, pid, heartbeat_at)
         values (gen_random_uuid(), 'orders', 'g', 'elsewhere', 1, now() + interval '1 hour')",
    )
    .await
    .unwrap();
    let messages = cluster.consumer("orders", "g").lease(SECOND).stream().await.unwrap();
    let handle = messages.handle();
    eventually("its share", SOON, async || handle.held_partitions() == 1).await;
    setting.control.stop_server(StopMode::Immediate).await.unwrap();
    eventually("all that is free", SOON, async || handle.held_partitions() == 2).await;
    setting.control.start_server().await.unwrap();
    eventually("its share again", SOON, async || handle.held_partitions() == 1).await;
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_hangs_holds_no_running_process_up() {
    let setting = Setting::new().await;
    let proxy = Proxy::start(setting.control.port()).await;
    let url = proxy.url(&setting.url);
    let running = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
    works(&running, "before").await;
    let producer = running.producer("orders").build().await.unwrap();
    proxy.to_server(Rule::Hold);
    producer.send(Message::new("meanwhile").key("k")).await.unwrap();
    works(&running, "meanwhile").await;
    proxy.to_server(Rule::Pass);
    let back = || async { running.topics().await.is_ok() };
    eventually("it is back", SOON, back).await;
}

/// A heartbeat that arrives after its member has left would keep the others waiting for its
/// partitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_is_not_put_back_by_a_heartbeat_under_way() {
    let setting = Setting::new().await;
    let proxy = Proxy::start(setting.control.port()).await;
    let builder = Cluster::builder(&proxy.url(&setting.url)).upkeep(false);
    let cluster = builder.look_interval(NEVER).connect().await.unwrap();
    let messages = cluster.consumer("orders", "g").lease(SECOND).stream().await.unwrap();
    let handle = messages.handle();
    eventually("its share", SOON, async || handle.held_partitions() == 2).await;
    proxy.to_server(Rule::Hold);
    eventually("a heartbeat", SOON, async || proxy.holding(1).is_some()).await;
    let heartbeat = proxy.holding(1).unwrap();
    proxy.to_server_but_on(Rule::Pass, Some(&heartbeat));
    let mut leaving = tokio::spawn(async move { messages.shutdown(SECOND).await });
    eventually("all is given back", SOON, async || handle.held_partitions() == 0).await;
    // Who does not wait for the heartbeat is off the list by then.
    let early = tokio::time::timeout(SECOND / 2, &mut leaving).await;
    heartbeat.to_server.set(Rule::Pass);
    if early.is_err() {
        within(SOON, "the shutdown", leaving).await.unwrap().unwrap();
    }
    let sql = client(&setting.url).await;
    let busy = "select count(*) from pg_stat_activity where state <> 'idle'
                   and datname = current_database() and application_name = 'shardmq'";
    let idle = async || {
        let busy: i64 = sql.query_one(busy, &[]).await.unwrap().get(0);
        // The server closes what was given up when it has come to its end.
        let done = !heartbeat.to_server.ended() || heartbeat.to_client.ended();
        busy == 0 && heartbeat.to_server.kept() == 0 && done
    };
    eventually("the heartbeat is through", SOON, idle).await;
    let listed = "select count(*) from shardmq_control.member where left_at is null";
    assert_eq!(sql.query_one(listed, &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_restored_from_a_backup_does_not_undo_what_the_file_knows() {
    let setting = Setting::new().await;
    setting.process().connect().await.unwrap();
    setting.kept(&setting.node_url).await;
    let sql = client(&setting.url).await;
    sql.batch_execute(
        "update shardmq_control.cluster set version = 1;
         update shardmq_control.node set dsn = 'postgresql://nobody@127.0.0.1:1/nowhere'",
    )
    .await
    .unwrap();
    let started = setting.process().connect().await.unwrap();
    let refused = started.nodes().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    works(&started, "started").await;
    assert!(has(&setting.file(), &setting.node_url));
}
