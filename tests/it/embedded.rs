//! Private servers: that they work, can be restarted, and leave nothing behind.

// The linter knows tests, but not the functions that they call.
#![allow(clippy::unwrap_used)]

mod endings;
mod passwords;
mod redis_server;

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use shardmq::ErrorKind;
use shardmq::embedded::{Server, StopMode};
use tokio_postgres::{Client, NoTls};

async fn server() -> Server {
    Server::builder().durable(false).start().await.unwrap()
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn show(server: &Server, setting: &str) -> String {
    let client = connect(&server.url("postgres")).await;
    client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0)
}

/// Asks again and again until the answer is yes.
async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let asked = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(20), asked).await;
    in_time.unwrap_or_else(|_| panic!("never happened: {what}"));
}

async fn eventually_gone(pid: u32, folder: &Path) {
    eventually("the folder is gone", || async { !folder.exists() }).await;
    eventually("the server is gone", || async { !is_alive(pid) }).await;
}

fn is_alive(pid: u32) -> bool {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "kill -0 \"$1\" 2>/dev/null", "sh", &pid.to_string()]);
    command.status().unwrap().success()
}

fn kill(pid: u32, signal: &str) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "kill -\"$1\" \"$2\"", "sh", signal, &pid.to_string()]);
    assert!(command.status().unwrap().success());
}

fn folder_of(server: &Server) -> PathBuf {
    server.data_dir().parent().unwrap().to_owned()
}

#[tokio::test]
async fn a_server_answers_and_has_the_defaults() {
    let server = server().await;
    for (setting, value) in [
        ("listen_addresses", "127.0.0.1"),
        ("max_connections", "200"),
        ("shared_buffers", "128MB"),
        ("TimeZone", "UTC"),
        ("server_encoding", "UTF8"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
    ] {
        assert_eq!(show(&server, setting).await, value, "{setting}");
    }
    // A setting no more since Postgres 16.
    let sql = connect(&server.url("postgres")).await;
    let collation = "select datcollate from pg_database where datname = current_database()";
    assert_eq!(sql.query_one(collation, &[]).await.unwrap().get::<_, String>(0), "C");
    assert!(server.url("app").ends_with(&format!("@127.0.0.1:{}/app", server.port())));
    assert!(server.log().contains("database system is ready to accept connections"));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_listens_on_its_socket() {
    let server = server().await;
    let mut config = tokio_postgres::Config::new();
    config.user("shardmq").dbname("postgres").port(server.port()).host_path(server.socket_dir());
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let answer: i32 = client.query_one("SELECT 1", &[]).await.unwrap().get(0);
    assert_eq!(answer, 1);
}

#[tokio::test]
async fn settings_and_variables_reach_the_server() {
    let builder = Server::builder().setting("cluster_name", "it's \\ a \"name\"");
    let builder = builder.setting("shared_buffers", "16MB").env("PGTZ", "ignored").env("LANG", "C");
    let server = builder.start().await.unwrap();
    assert_eq!(show(&server, "cluster_name").await, "it's \\ a \"name\"");
    assert_eq!(show(&server, "shared_buffers").await, "16MB");
    assert_eq!(show(&server, "fsync").await, "on");
    if cfg!(target_os = "linux") {
        let environment = format!("/proc/{}/environ", server.pid().unwrap());
        let environment = std::fs::read(environment).unwrap();
        let mut variables = environment.split(|byte| *byte == 0);
        assert!(variables.any(|variable| variable == b"PGTZ=ignored"));
    }
}

#[tokio::test]
async fn a_setting_that_the_server_refuses_is_an_error_with_its_log() {
    let error = Server::builder().setting("max_connections", "many").start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("max_connections"), "{error:?}");
    let error = Server::builder().setting("port", "5432").start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn servers_at_once_do_not_meet() {
    let (first, second, third) = tokio::join!(server(), server(), server());
    let ports = [first.port(), second.port(), third.port()];
    assert!(ports[0] != ports[1] && ports[1] != ports[2] && ports[0] != ports[2]);
    first.create_database("app").await.unwrap();
    second.create_database("app").await.unwrap();
    connect(&first.url("app")).await.batch_execute("CREATE TABLE t (x int)").await.unwrap();
    connect(&second.url("app")).await.batch_execute("CREATE TABLE t (x int)").await.unwrap();
    // The end of one does not touch the others.
    let (pid, folder) = (first.pid().unwrap(), folder_of(&first));
    drop(first);
    eventually_gone(pid, &folder).await;
    assert_eq!(show(&second, "port").await, ports[1].to_string());
    assert_eq!(show(&third, "port").await, ports[2].to_string());
}

#[tokio::test]
async fn the_folder_is_private() {
    let server = server().await;
    for path in [folder_of(&server), server.data_dir(), server.socket_dir()] {
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{}", path.display());
    }
}

#[tokio::test]
async fn databases_are_created_once_and_under_any_name() {
    let server = server().await;
    for name in ["plain", "With \"quotes\" / and ü"] {
        server.create_database(name).await.unwrap();
        let client = connect(&server.url(name)).await;
        let found: String =
            client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
        assert_eq!(found, name);
        let again = server.create_database(name).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Conflict);
    }
    for name in ["", &"x".repeat(64), "a\0b"] {
        let error = server.create_database(name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    server.stop_server(StopMode::Immediate).await.unwrap();
    let error = server.create_database("other").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn an_immediate_restart_keeps_port_and_data() {
    let server = server().await;
    let (port, pid) = (server.port(), server.pid().unwrap());
    let client = connect(&server.url("postgres")).await;
    client.batch_execute("CREATE TABLE t AS SELECT 42 AS x").await.unwrap();
    for mode in [StopMode::Immediate, StopMode::Fast] {
        server.restart(mode).await.unwrap();
        assert_eq!(server.port(), port);
        assert_ne!(server.pid().unwrap(), pid);
        let client = connect(&server.url("postgres")).await;
        let kept: i32 = client.query_one("SELECT x FROM t", &[]).await.unwrap().get(0);
        assert_eq!(kept, 42);
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_stopped_server_stays_down_until_it_is_started() {
    let server = server().await;
    let (port, folder) = (server.port(), folder_of(&server));
    assert_eq!(server.start_server().await.unwrap_err().kind(), ErrorKind::Conflict);
    server.stop_server(StopMode::Fast).await.unwrap();
    server.stop_server(StopMode::Immediate).await.unwrap();
    assert_eq!(server.pid(), None);
    assert!(server.exited().await.unwrap().success());
    assert!(tokio_postgres::connect(&server.url("postgres"), NoTls).await.is_err());
    server.start_server().await.unwrap();
    assert_eq!(show(&server, "port").await, port.to_string());
    server.stop_server(StopMode::Immediate).await.unwrap();
    server.stop().await.unwrap();
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_crash_is_noticed_and_the_server_can_be_started_again() {
    let server = server().await;
    let client = connect(&server.url("postgres")).await;
    client.batch_execute("CREATE TABLE t AS SELECT 42 AS x").await.unwrap();
    kill(server.pid().unwrap(), "KILL");
    assert!(!server.exited().await.unwrap().success());
    assert_eq!(server.pid(), None);
    server.start_server().await.unwrap();
    let client = connect(&server.url("postgres")).await;
    let kept: i32 = client.query_one("SELECT x FROM t", &[]).await.unwrap().get(0);
    assert_eq!(kept, 42);
    let (pid, folder) = (server.pid().unwrap(), folder_of(&server));
    drop(server);
    eventually_gone(pid, &folder).await;
}

#[tokio::test]
async fn a_start_waits_for_its_port_to_become_free() {
    let server = server().await;
    server.stop_server(StopMode::Fast).await.unwrap();
    let other = std::net::TcpListener::bind(("127.0.0.1", server.port())).unwrap();
    let give_way = async {
        let in_vain = || async { server.log().contains("could not bind") };
        eventually("it tried", in_vain).await;
        drop(other);
    };
    let (started, ()) = tokio::join!(server.start_server(), give_way);
    started.unwrap();
    assert_eq!(show(&server, "port").await, server.port().to_string());
}
