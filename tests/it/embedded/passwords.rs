//! Only who has the address, with its password, reaches a private server: no other user of the machine.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, Message, NodeId, TopicOptions};
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use super::{connect, server};

/// Why nobody gets in with this address; none where somebody does.
async fn refusal(url: &str) -> Option<SqlState> {
    match tokio_postgres::connect(url, NoTls).await {
        Ok(_) => None,
        // Without a code it is the client's: there is no password.
        Err(error) => Some(error.code().cloned().unwrap_or(SqlState::INVALID_PASSWORD)),
    }
}

/// The address without its password, or with another one.
fn with_password(url: &str, password: &str) -> String {
    let (before, rest) = url.split_once("://shardmq:").unwrap();
    let (_, hosts) = rest.split_once('@').unwrap();
    format!("{before}://shardmq{password}@{hosts}")
}

#[tokio::test]
async fn nobody_gets_in_without_the_password_and_each_server_has_its_own() {
    let (server, other) = (server().await, server().await);
    let url = server.url("postgres");
    connect(&url).await;
    let others = other.url("postgres");
    let (_, of_other) = others.split_once("://shardmq").unwrap();
    let of_other = of_other.split_once('@').unwrap().0;
    for password in ["", ":", ":shardmq", of_other] {
        let refused = refusal(&with_password(&url, password)).await;
        assert_eq!(refused, Some(SqlState::INVALID_PASSWORD), "{password}");
    }
    let rules = std::fs::read_to_string(server.data_dir().join("pg_hba.conf")).unwrap();
    let lines = rules.lines().filter(|line| line.starts_with("host"));
    assert!(lines.clone().count() > 0 && lines.clone().all(|l| l.ends_with("scram-sha-256")));
    assert!(
        !format!("{server:?}").contains(url.split_once('@').unwrap().0.rsplit_once(':').unwrap().1)
    );
}

#[tokio::test]
async fn the_password_stays_when_the_server_is_started_again() {
    let server = server().await;
    let url = server.url("postgres");
    server.restart(shardmq::embedded::StopMode::Immediate).await.unwrap();
    assert_eq!(server.url("postgres"), url);
    connect(&url).await;
    let refused = refusal(&with_password(&url, "")).await;
    assert_eq!(refused, Some(SqlState::INVALID_PASSWORD));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_added_by_its_own_address_is_reached_by_whoever_reaches_control() {
    let server = server().await;
    server.create_database("app").await.unwrap();
    let url = server.url("app");
    for schema in [Schema::Control, Schema::Node] {
        migrate(&url, schema).await.unwrap();
    }
    let cluster = Cluster::connect(&url).await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &server.node_url("app")).await.unwrap();
    cluster.create_topic("orders", TopicOptions::partitions(1)).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("one")).await.unwrap();
    cluster.shutdown().await;
}

/// Only root can become somebody else.
fn as_nobody(program: &str, argument: &Path) -> Option<bool> {
    let id = |flag: &str| {
        let output = Command::new("id").args([flag, "nobody"]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse::<u32>().ok()
    };
    let own = Command::new("id").arg("-u").output().unwrap().stdout;
    if own != b"0\n" {
        return None;
    }
    let mut command = Command::new(program);
    command.arg(argument).current_dir("/").uid(id("-u")?).gid(id("-g")?);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Some(command.status().unwrap().success())
}

#[tokio::test]
async fn the_password_file_and_the_socket_are_for_the_user_of_the_server() {
    let server = server().await;
    let file = server.password_file();
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&file).unwrap();
    let password = text.trim_end().rsplit_once(':').unwrap().1;
    assert!(server.url("x").contains(&format!(":{password}@")));
    assert!(server.node_url("x").ends_with(&file.display().to_string().replace('/', "%2F")));
    let socket = server.socket_dir();
    for (program, path) in [("cat", &file), ("ls", &socket), ("ls", &server.data_dir())] {
        assert_ne!(as_nobody(program, path), Some(true), "{program} {}", path.display());
    }
}

#[tokio::test]
async fn a_server_that_trusts_everybody_was_asked_to() {
    let server = Server::builder().durable(false).trusts_everybody().start().await.unwrap();
    let url = server.url("postgres");
    assert!(url.starts_with("postgresql://shardmq@127.0.0.1:"), "{url}");
    assert_eq!(server.node_url("postgres"), url);
    connect(&url).await;
}
