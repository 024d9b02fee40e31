//! Where a password comes from, that it can be replaced, and that nobody shows it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::{Cluster, Message};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::authority::put;
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, prepared, within};

const SOON: Duration = Duration::from_secs(10);
const RIGHT: &str = "geheim:1";
const WRONG: &str = "vermutet";

/// A server that wants a password of `app`, whose is [`RIGHT`].
async fn server() -> Server {
    let hba = "host all app 127.0.0.1/32 scram-sha-256\nhost all shardmq 127.0.0.1/32 trust\n";
    let server = prepared(Server::builder().durable(false).file("pg_hba.conf", hba)).await;
    let sql = client(&server.url("postgres")).await;
    let role = format!("create role app superuser login password '{RIGHT}'");
    sql.batch_execute(&role).await.unwrap();
    server
}

fn escaped(password: &str) -> String {
    password.replace('\\', r"\\").replace(':', r"\:")
}

/// A file with this password for all.
fn passfile(dir: &TempDir, password: &str) -> String {
    put(dir.path(), "pass", &format!("# ours\n*:*:*:app:{}\n", escaped(password)))
}

type Variable<'a> = (&'a str, &'a str);

struct Said {
    entered: bool,
    stderr: String,
}

/// Whether the command gets in, with these variables, and all that it says at the highest level.
async fn ask(url: &str, variables: &[Variable<'_>]) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command.args(["topic", "list"]).env("SHARDMQ_URL", url).env("RUST_LOG", "trace");
    command.env_remove("PGPASSWORD").env_remove("PGPASSFILE").env("HOME", "/nowhere");
    command.envs(variables.iter().copied());
    let output = within(SOON, "the program's end", command.output()).await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    for password in [RIGHT, &escaped(RIGHT), "geheim%3A1", WRONG] {
        assert!(!stderr.contains(password), "{password} in {stderr}");
    }
    Said { entered: output.status.success(), stderr }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_address_goes_before_the_variable_and_the_variable_before_the_file() {
    let server = server().await;
    let url = database(&server).await.replace("shardmq@", "app@");
    let with = |password: &str| url.replace("app@", &format!("app:{password}@"));
    let (right, wrong) = (with("geheim%3A1"), with(WRONG));
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (good, bad) = (passfile(&dirs[0], RIGHT), passfile(&dirs[1], WRONG));
    let named = format!("{url}?passfile={good}");
    let cases: [(&str, &[Variable<'_>], bool); 9] = [
        (&url, &[], false),
        (&right, &[("PGPASSWORD", WRONG), ("PGPASSFILE", &bad)], true),
        (&wrong, &[("PGPASSWORD", RIGHT), ("PGPASSFILE", &good)], false),
        (&url, &[("PGPASSWORD", RIGHT), ("PGPASSFILE", &bad)], true),
        (&url, &[("PGPASSWORD", WRONG), ("PGPASSFILE", &good)], false),
        (&url, &[("PGPASSFILE", &good)], true),
        (&url, &[("PGPASSWORD", ""), ("PGPASSFILE", &good)], true),
        (&named, &[("PGPASSFILE", &bad)], true),
        (&named, &[("PGPASSWORD", WRONG)], false),
    ];
    for (url, variables, entered) in cases {
        let said = ask(url, variables).await;
        assert_eq!(said.entered, entered, "{url} {variables:?}: {}", said.stderr);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_at_home_counts_unless_others_may_read_it() {
    let server = server().await;
    let url = database(&server).await.replace("shardmq@", "app@");
    let home = tempfile::tempdir().unwrap();
    let file = put(home.path(), ".pgpass", &format!("*:*:*:app:{}", escaped(RIGHT)));
    let variables = [("HOME", home.path().to_str().unwrap())];
    assert!(ask(&url, &variables).await.entered);
    fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    let said = ask(&url, &variables).await;
    assert!(!said.entered);
    assert!(said.stderr.contains("the password file is ignored"), "{}", said.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_is_replaced_in_the_file_serves_the_next_connection() {
    let server = server().await;
    let plain = database(&server).await;
    let dir = tempfile::tempdir().unwrap();
    let file = passfile(&dir, RIGHT);
    let url = format!("{}?passfile={file}", plain.replace("shardmq@", "app@"));
    let test = TestCluster::of(vec![url]).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();

    let sql = client(&plain).await;
    sql.batch_execute("alter role app password 'another'").await.unwrap();
    passfile(&dir, "another");
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'";
    sql.batch_execute(end).await.unwrap();
    within(SOON, "a message", producer.send(Message::new("after"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_waits_where_a_password_is_replaced_on_the_server_first() {
    let server = server().await;
    let plain = database(&server).await;
    let dir = tempfile::tempdir().unwrap();
    let file = passfile(&dir, RIGHT);
    let url = format!("{}?passfile={file}", plain.replace("shardmq@", "app@"));
    let test = TestCluster::of(vec![url]).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();

    let sql = client(&plain).await;
    sql.batch_execute("alter role app password 'another'").await.unwrap();
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'";
    sql.batch_execute(end).await.unwrap();
    let sending = tokio::spawn(async move { producer.send(Message::new("after")).await });
    let refusals = || server.log().matches("password authentication failed").count();
    let before = refusals();
    let refused = async || refusals() > before + 2;
    eventually("several attempts are refused", 2 * SOON, refused).await;
    assert!(!sending.is_finished(), "{:?}", sending.await);
    passfile(&dir, "another");
    within(2 * SOON, "the id", sending).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_about_a_password_does_not_show_it() {
    let server = server().await;
    let url = database(&server).await;
    let dir = tempfile::tempdir().unwrap();
    let file = passfile(&dir, WRONG);
    let plain = url.replace("shardmq@", "app@");
    for url in [url.replace("shardmq@", "app:vermutet@"), format!("{plain}?passfile={file}")] {
        let error = Cluster::connect(&url).await.unwrap_err();
        assert!(error.chain().contains("password authentication failed"), "{}", error.chain());
        assert!(!format!("{error:?} {error}").contains(WRONG), "{error:?}");
    }
    assert!(
        !format!("{:?}", Cluster::builder(&url.replace("shardmq@", "app:vermutet@")))
            .contains(WRONG)
    );
}
