//! Outboxes in databases that are no nodes.

use std::time::Duration;

use shardmq::migrate::{Schema, migrate};
use shardmq::{ErrorKind, Message};
use tokio::process::Command;
use tracing::Level;

use crate::command::run;
use crate::support::relays::{Relay, arrive, publish, texts, through};
use crate::support::said::said;
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, shared_server, within};

const SOON: Duration = Duration::from_secs(15);

/// A database with nothing in it.
async fn empty(name: &str) -> String {
    let server = shared_server().await;
    let name = format!("{name}_{}", std::process::id());
    server.create_database(&name).await.unwrap();
    server.url(&name)
}

async fn migrate_outbox(url: &str, control: Option<&str>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardmq"));
    command.args(["migrate", "--outbox", url]).env_remove("SHARDMQ_URL");
    if let Some(control) = control {
        command.env("SHARDMQ_URL", control);
    }
    let output = command.output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_registered_is_relayed_from_by_all() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    let url = empty("shop").await;
    let _relay = Relay::start(&test, "orders").await;
    for _ in 0..2 {
        migrate_outbox(&url, Some(&test.control_url)).await;
    }
    let shop = client(&url).await;
    let (one, two) = (test.sql(0).await, test.sql(1).await);
    let keys: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    for key in &keys {
        publish(&shop, "orders", key, Some(key)).await;
    }
    let far = keys.iter().filter(|key| shardmq::key_slot(key) >= shardmq::SLOTS / 2).count();
    arrive(&one, &partitions[..1], 20 - far).await;
    arrive(&two, &partitions[1..], far).await;
    through(&shop).await;
    // Nobody relays from it any more once it is forgotten.
    let held = "select holder is not null from shardmq.outbox_relay";
    let is_held = async || shop.query_one(held, &[]).await.unwrap().get::<_, bool>(0);
    assert!(is_held().await);
    let listed = run(&test.control_url, "outbox list --json").await.good().json();
    assert_eq!(listed[0]["url"], url);
    let rest = run(&test.control_url, &format!("outbox remove {url} --json")).await.good().json();
    assert!(rest.is_empty(), "{rest:?}");
    eventually("its relay ends", SOON, async || !is_held().await).await;
    let error = test.cluster.remove_outbox(&url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // It is nobody else's from now on.
    let node = database(shared_server().await).await;
    let draw = "update shardmq_control.cluster set id = gen_random_uuid()";
    client(&node).await.batch_execute(draw).await.unwrap();
    let other = TestCluster::of(vec![node]).await;
    topic(&other, "orders", 1).await;
    other.cluster.add_outbox(&url).await.unwrap();
    let _other = Relay::start(&other, "orders").await;
    let (_, name) = url.split_once("127.0.0.1").unwrap();
    let name = format!("127.0.0.1{name}");
    let told = async || !said(Level::ERROR, "outbox", &name).is_empty();
    eventually("it is told", SOON, told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_one_process_was_told_of_is_relayed_from_by_it() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let url = empty("books").await;
    let mut books = client(&url).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let transaction = books.transaction().await.unwrap();
    let error = producer.send_in(&transaction, Message::new("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("shardmq migrate --outbox"), "{error}");
    transaction.rollback().await.unwrap();
    migrate_outbox(&url, None).await;
    let _relay = Relay::with(&test, "orders", |builder| builder.outbox(&url)).await;
    let transaction = books.transaction().await.unwrap();
    producer.send_in(&transaction, Message::new("x")).await.unwrap();
    transaction.commit().await.unwrap();
    let sql = test.sql(0).await;
    assert_eq!(texts(&arrive(&sql, &partitions, 1).await), ["x"]);
    // The control database may have one too, and a node has.
    migrate_outbox(&test.control_url, Some(&test.control_url)).await;
    assert!(migrate(&test.control_url, Schema::Outbox).await.unwrap().is_empty());
    publish(&sql, "orders", "y", None).await;
    assert_eq!(texts(&arrive(&sql, &partitions, 2).await), ["x", "y"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_go_on_while_the_control_database_does_not_tell_which_outboxes_there_are() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let mut control = client(&test.control_url).await;
    let silent = control.transaction().await.unwrap();
    let lock = "lock table shardmq_control.outbox in access exclusive mode";
    silent.batch_execute(lock).await.unwrap();
    let relay = Relay::start(&test, "orders").await;
    let sql = test.sql(0).await;
    publish(&sql, "orders", "meanwhile", Some("k")).await;
    arrive(&sql, &partitions, 1).await;
    within(SOON, "a shutdown", relay.cluster.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registered_database_whose_outbox_is_gone_is_told() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let url = empty("closed").await;
    migrate_outbox(&url, Some(&test.control_url)).await;
    client(&url).await.batch_execute("drop schema shardmq cascade").await.unwrap();
    let _relay = Relay::start(&test, "orders").await;
    let (_, name) = url.split_once("127.0.0.1").unwrap();
    let name = format!("127.0.0.1{name}");
    let told = async || !said(Level::WARN, "outbox", &name).is_empty();
    eventually("it is told", SOON, told).await;
}
