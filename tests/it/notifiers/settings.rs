//! Which notifier a process has: its own setting, or the cluster's.

use shardmq::embedded::{Redis, StopMode};
use shardmq::notifier::NotifierKind;
use shardmq::{Cluster, ErrorKind, Message};
use tokio::process::Command;

use super::{SECOND, SOON};
use crate::support::authority::Authority;
use crate::support::reading::next_text;
use crate::support::redis::subscribed_channels;
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, own_server};

async fn connect(test: &TestCluster) -> Cluster {
    Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_have_what_the_cluster_has_when_they_connect() {
    let redis = Redis::builder().password("secret").start().await.unwrap();
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 2).await;
    let setting = test.cluster.notifier_setting().await.unwrap();
    assert_eq!((setting.notifier, setting.redis_url), (NotifierKind::Postgres, None));
    test.cluster.set_notifier(NotifierKind::Redis, Some(&redis.url())).await.unwrap();
    let setting = test.cluster.notifier_setting().await.unwrap();
    let url = setting.redis_url.unwrap();
    assert!(setting.notifier == NotifierKind::Redis && !url.contains("secret"), "{url}");
    // The password is each process' own business.
    let builder = || Cluster::builder(&test.control_url).upkeep(false);
    let builder = || builder().redis_url(&redis.url());
    let producing = builder().connect().await.unwrap();
    let consuming = builder().connect().await.unwrap();
    let health = consuming.notifier_health().await.unwrap();
    assert!(health.len() == 1 && health[0].health.is_ok(), "{health:?}");
    let mut messages = consuming.consumer("orders", "g").stream().await.unwrap();
    let producer = producing.producer("orders").build().await.unwrap();
    producer.send(Message::new("through Redis")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "through Redis");
    messages.shutdown(SECOND).await.unwrap();
    // Who has no password says so, and works all the same.
    let without = connect(&test).await;
    let health = without.notifier_health().await.unwrap();
    let error = health[0].health.error.clone().unwrap();
    assert!(error.to_lowercase().contains("auth"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_notifier_to_another_by_way_of_both_no_hint_is_lost() {
    let redis = Redis::builder().start().await.unwrap();
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let of_before = connect(&test).await;
    test.cluster.set_notifier(NotifierKind::Both, Some(&redis.url())).await.unwrap();
    let of_both = connect(&test).await;
    test.cluster.set_notifier(NotifierKind::Redis, None).await.unwrap();
    let of_redis = connect(&test).await;
    let never = std::time::Duration::from_mins(10);
    for (producing, consuming) in [
        (&of_before, &of_both),
        (&of_both, &of_before),
        (&of_both, &of_redis),
        (&of_redis, &of_both),
    ] {
        let consumer = consuming.consumer("orders", "g").poll_interval(never);
        let mut messages = consumer.stream().await.unwrap();
        let handle = messages.handle();
        let all_well = async || {
            let status = handle.status();
            !status.notifier.is_empty() && status.notifier.iter().all(|node| node.health.is_ok())
        };
        eventually("hints arrive", SOON, all_well).await;
        let producer = producing.producer("orders").build().await.unwrap();
        for n in 0..10 {
            producer.send(Message::new(n.to_string())).await.unwrap();
            assert_eq!(next_text(&mut messages).await, n.to_string());
        }
        producer.shutdown(SECOND).await.unwrap();
        messages.shutdown(SECOND).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_does_not_answer_or_is_none_is_not_set() {
    let test = TestCluster::new(1).await;
    let redis = Redis::builder().start().await.unwrap();
    let url = redis.url();
    redis.stop_server(StopMode::Immediate).await.unwrap();
    for (kind, url, expected) in [
        (NotifierKind::Redis, Some(url.as_str()), ErrorKind::Unavailable),
        (NotifierKind::Both, Some("redis://host:port"), ErrorKind::Invalid),
        (NotifierKind::Both, None, ErrorKind::Invalid),
    ] {
        let error = test.cluster.set_notifier(kind, url).await.unwrap_err();
        assert_eq!(error.kind(), expected, "{}", error.chain());
    }
    assert_eq!(test.cluster.notifier_setting().await.unwrap().notifier, NotifierKind::Postgres);
    let builder = || Cluster::builder(&test.control_url).upkeep(false);
    let error = builder().notifier_kind(NotifierKind::Redis).connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let error = builder().redis_url("redis://u:secret@h:port").connect().await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && !error.chain().contains("secret"));
    // One that does not answer keeps nobody from starting, nor from leaving it.
    builder().redis_url(&url).connect().await.unwrap();
    test.cluster.set_notifier(NotifierKind::None, Some(&url)).await.unwrap();
    // Nor does what the cluster has wrong.
    let sql = test.sql(0).await;
    sql.batch_execute("update shardmq_control.setting set value = 'pigeons'").await.unwrap();
    builder().connect().await.unwrap();
    test.cluster.set_notifier(NotifierKind::Postgres, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_could_not_connect_leaves_nothing_behind() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let sessions = "select count(*) from pg_stat_activity where datname = current_database()";
    let sessions = async || sql.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0);
    let before = sessions().await;
    for _ in 0..10 {
        let builder = Cluster::builder(&test.control_url).notifier_kind(NotifierKind::Redis);
        builder.connect().await.unwrap_err();
    }
    eventually("all sessions end", SOON, async || sessions().await <= before + 2).await;
}

/// Runs `shardmq notifier` with variables: whether it succeeded, and what it said.
async fn by_command(
    test: &TestCluster,
    arguments: &str,
    variables: &[(&str, &str)],
) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command.args(["--url", &test.control_url, "notifier"]).args(arguments.split(' '));
    let output = command.envs(variables.iter().copied()).output().await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_says_what_a_process_has_and_nothing_of_the_cluster() {
    let redis = Redis::builder().start().await.unwrap();
    let (test, url) = (TestCluster::new(1).await, redis.url());
    let at = ("SHARDMQ_REDIS_URL", url.as_str());
    let [of_redis, of_postgres, none] =
        ["redis", "postgres", "none"].map(|name| ("SHARDMQ_NOTIFIER", name));
    // Where a Redis is, but not which notifier: both.
    for variables in [&[at][..], &[at, of_redis], &[of_postgres]] {
        let (well, said) = by_command(&test, "show", variables).await;
        assert!(well, "{said}");
    }
    let (well, said) = by_command(&test, "show", &[none]).await;
    assert!(!well && said.contains("polling"), "{said}");
    let (well, said) = by_command(&test, "set both", &[at]).await;
    assert!(!well && said.contains("address of a Redis is needed"), "{said}");
    redis.stop_server(StopMode::Immediate).await.unwrap();
    let (well, said) = by_command(&test, "show", &[at]).await;
    assert!(!well && said.contains("by one of two notifiers only"), "{said}");
    assert!(said.contains(&redis.port().to_string()), "{said}");
    let (well, said) = by_command(&test, "show", &[at, of_redis]).await;
    assert!(!well && said.contains("hints of 1 nodes do not arrive here"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_was_set_before_is_tried_again() {
    let redis = Redis::builder().start().await.unwrap();
    let test = TestCluster::new(1).await;
    test.cluster.set_notifier(NotifierKind::Both, Some(&redis.url())).await.unwrap();
    redis.stop_server(StopMode::Immediate).await.unwrap();
    let error = test.cluster.set_notifier(NotifierKind::Redis, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(test.cluster.notifier_setting().await.unwrap().notifier, NotifierKind::Both);
    redis.start_server().await.unwrap();
    test.cluster.set_notifier(NotifierKind::Redis, None).await.unwrap();
}

/// Its commands have an environment of their own, in which the authority is trusted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_may_want_tls() {
    let authority = Authority::new("hints");
    let signed = authority.sign("redis", &["127.0.0.1"]);
    let builder = Redis::builder().tls(signed.certificate, signed.key).password("secret");
    let redis = builder.start().await.unwrap();
    let test = TestCluster::new(1).await;
    let other = Authority::new("another");
    let url = format!("rediss://127.0.0.1:{}", redis.port());
    let set = async |authorities: String| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
        command.args(["--url", &test.control_url, "notifier", "set", "redis", "--redis-url", &url]);
        command.env("SSL_CERT_FILE", authorities).env("SHARDMQ_REDIS_PASSWORD", "secret");
        command.output().await.unwrap()
    };
    let refused = set(other.file()).await;
    assert!(!refused.status.success());
    let set = set(authority.file()).await;
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_setting_is_known_where_the_control_database_is_away() {
    let (control, redis) = (own_server().await, Redis::builder().start().await.unwrap());
    let test = TestCluster::on(&control, 1).await;
    test.cluster.set_notifier(NotifierKind::Redis, Some(&redis.url())).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("topology.json");
    let start = || Cluster::builder(&test.control_url).topology_file(&path).connect();
    let first = start().await.unwrap();
    eventually("the file is there", SOON, async || path.exists()).await;
    first.shutdown().await;
    control.stop_server(StopMode::Immediate).await.unwrap();
    let second = start().await.unwrap();
    let partition = shardmq::PartitionId::new(1, 1).unwrap();
    let _hints = second.notifier().subscribe(&[partition]);
    let subscribed = async || subscribed_channels(redis.port()).await == 2;
    eventually("it subscribes to Redis", SOON, subscribed).await;
}
