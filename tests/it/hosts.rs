//! Addresses with several hosts: the one that takes writes is found, and followed when it changes.

use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use shardmq::{Cluster, Message};

use crate::support::proxy::{Proxy, Rule};
use crate::support::reading::{next, text};
use crate::support::standbys::{caught_up, follow, url};
use crate::support::stored::topic;
use crate::support::{
    TestCluster, client, database, eventually, own_server, shared_server, within,
};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_finds_the_primary_behind_a_standby_and_follows_a_failover() {
    let (primary, standby) = (own_server().await, Server::builder().durable(false));
    let standby = standby.start().await.unwrap();
    let plain = database(&primary).await;
    follow(std::slice::from_ref(&standby), &primary).await;
    let both = url(&[standby.port(), primary.port()], &plain, "target_session_attrs=read-write");
    let test = TestCluster::of(vec![both]).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut messages =
        test.cluster.consumer("orders", "g").poll_interval(SECOND).stream().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(text(&delivery), "before");
    delivery.ack().unwrap();
    messages.flush().await.unwrap();
    caught_up(&client(&plain).await, 1).await;

    primary.stop_server(StopMode::Immediate).await.unwrap();
    let promoted = client(&standby.url("postgres")).await;
    promoted.batch_execute("select pg_promote()").await.unwrap();
    within(SOON, "the answer", producer.send(Message::new("after"))).await.unwrap();
    let found = async {
        loop {
            // What is lost with the old primary is news, and not the end.
            if let Ok(delivery) = messages.next().await.expect("the stream goes on") {
                return delivery;
            }
        }
    };
    let delivery = within(SOON, "the message of the new primary", found).await;
    assert_eq!(text(&delivery), "after");
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    let lag = within(SOON, "the lag", test.cluster.lag("orders")).await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_word_on_it_a_session_that_writes_is_wanted() {
    let (first, second) = (own_server().await, own_server().await);
    let plain = database(&first).await;
    let sql = client(&first.url("postgres")).await;
    let name = plain.rsplit_once('/').unwrap().1;
    sql.batch_execute(&format!("alter database {name} set default_transaction_read_only = on"))
        .await
        .unwrap();
    client(&second.url("postgres"))
        .await
        .batch_execute(&format!("create database {name} template shardmq_template"))
        .await
        .unwrap();
    let id = async |parameters: &str| {
        let url = url(&[first.port(), second.port()], &plain, parameters);
        Cluster::connect(&url).await.map(|cluster| cluster.id())
    };
    let alone = Cluster::connect(&url(&[second.port()], &plain, "")).await.unwrap();
    assert_eq!(id("").await.unwrap(), alone.id());
    assert_ne!(id("target_session_attrs=any").await.unwrap(), alone.id());
    second.stop_server(StopMode::Fast).await.unwrap();
    let error = id("").await.unwrap_err();
    assert!(error.is_transient());
    let text = error.chain();
    assert!(text.contains(&format!("127.0.0.1:{}: ", first.port())), "{text}");
    assert!(text.contains("does not allow writes") && text.contains("refused"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_holds_nobody_up_for_long_and_the_next_time_not_at_all() {
    let server = shared_server().await;
    let plain = database(server).await;
    let proxy = Proxy::start(server.port()).await;
    proxy.to_server(Rule::Hold);
    let test = TestCluster::of(vec![plain.clone()]).await;
    topic(&test, "orders", 1).await;
    let hosts = [proxy.port(), server.port()];
    // Long enough for the other host on a busy machine: where that does not answer, this one is
    // asked again.
    let cluster =
        within(SOON, "the way in", Cluster::connect(&url(&hosts, &plain, "connect_timeout=3")))
            .await
            .unwrap();
    let sql = client(&plain).await;
    // Whoever connects for the first time tries it. That is the pool, and the session that listens.
    // One that is just coming in is there, and does not listen yet.
    let listens = "select count(*) from pg_stat_activity
                    where application_name like 'shardmq topology %' and datname = current_database()
                      and state = 'idle' and query like '%; listen %'";
    let both = async || sql.query_one(listens, &[]).await.unwrap().get::<_, i64>(0) == 2;
    eventually("both clusters listen", SOON, both).await;
    let knocked = proxy.links().len();
    assert!(knocked > 0);
    // The control database is where it was found: the silent host is not asked again.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
                where (application_name = 'shardmq' or application_name like 'shardmq topology %')
                  and datname = current_database()";
    sql.batch_execute(end).await.unwrap();
    let listed = async || cluster.topics().await.is_ok();
    eventually("the topics", SOON, listed).await;
    eventually("both listen again", SOON, both).await;
    assert_eq!(proxy.links().len(), knocked);
}
