//! A standby is promoted: what was acknowledged before is there, as far as it was to wait for the
//! standby.

use std::time::Duration;

use shardmq::Message;
use shardmq::embedded::StopMode;

use crate::support::reading::next;
use crate::support::senders::Senders;
use crate::support::signals::signal_all;
use crate::support::standbys::{Replicated, caught_up};
use crate::support::stored::{all_stored, topic};
use crate::support::{TestCluster, eventually, within};

const SOON: Duration = Duration::from_secs(20);

/// Ends all waits for a standby by a function, as soon as there is one.
async fn end_waits(sql: &tokio_postgres::Client, function: &str) {
    let end = format!("select {function}(pid) from pg_stat_activity where wait_event = 'SyncRep'");
    let ended = async || !sql.query(&end, &[]).await.unwrap().is_empty();
    eventually("a commit waits", SOON, ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_with_synchronous_standbys_whatever_ends_a_wait() {
    let servers = Replicated::start("ANY 1 (s1, s2)").await;
    let test = TestCluster::of(vec![servers.url.clone()]).await;
    let partitions = topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let senders = Senders::start(&producer, "a");
    senders.go_on(200).await;
    servers.stop_standbys().await;
    let sql = servers.sql(&servers.primary).await;
    for _ in 0..5 {
        end_waits(&sql, "pg_cancel_backend").await;
        end_waits(&sql, "pg_terminate_backend").await;
    }
    servers.primary.stop_server(StopMode::Immediate).await.unwrap();
    servers.promote().await;
    senders.go_on(200).await;
    let acknowledged = senders.end().await;
    let stored = all_stored(&servers.sql(&servers.standbys[0]).await, &partitions).await;
    let stored: std::collections::HashSet<_> =
        stored.iter().map(|stored| (stored.id, stored.text().to_owned())).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|sent| !stored.contains(*sent)).collect();
    assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), acknowledged.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_asynchronous_standbys_only_what_the_standby_lacks_is_lost() {
    let servers = Replicated::start("").await;
    let test = TestCluster::of(vec![servers.url.clone()]).await;
    let partitions = topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let send = async |name: &str| {
        let texts = (0..100).map(|number| Message::new(format!("{name}-{number}")));
        for id in producer.send_all(texts).await {
            id.unwrap();
        }
    };
    send("kept").await;
    caught_up(&servers.sql(&servers.primary).await, 2).await;
    servers.stop_standbys().await;
    send("lost").await;
    servers.primary.stop_server(StopMode::Immediate).await.unwrap();
    servers.promote().await;
    within(2 * SOON, "new messages are taken", send("new")).await;
    let stored = all_stored(&servers.sql(&servers.standbys[0]).await, &partitions).await;
    for (name, count) in [("kept", 100), ("lost", 0), ("new", 100)] {
        let there = stored.iter().filter(|stored| stored.text().starts_with(name)).count();
        assert_eq!(there, count, "{name}");
    }
}

/// Commits hang on a primary that is suspended then; the address leads to another one meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_hang_on_an_old_primary_keep_nobody_from_the_new_one() {
    let servers = Replicated::start("ANY 1 (s1, s2)").await;
    let test = TestCluster::of(vec![servers.url.clone()]).await;
    topic(&test, "orders", 4).await;
    let builder = test.cluster.producer("orders").append_timeout(Duration::from_millis(300));
    let producer = builder.build().await.unwrap();
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.flush().await.unwrap();
    servers.stop_standbys().await;
    let send = |number: u32| {
        let (producer, message) = (producer.clone(), Message::new("after").key(number.to_string()));
        tokio::spawn(async move { producer.send(message).await })
    };
    let sends: Vec<_> = (0..20).map(send).collect();
    let sql = servers.sql(&servers.primary).await;
    let hang = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    let all = async || sql.query_one(hang, &[]).await.unwrap().get::<_, i64>(0) == 2;
    eventually("commits hang on all connections", SOON, all).await;
    signal_all(&servers.primary, "STOP").await;
    servers.promote().await;
    for sent in sends {
        within(2 * SOON, "the id", sent).await.unwrap().unwrap();
    }
    let mut count = 0;
    while count < 20 {
        let came = within(2 * SOON, "a delivery", messages.next()).await.unwrap();
        // What was lost with the old primary is news, and not the end.
        count += usize::from(came.is_ok_and(|delivery| delivery.ack().is_ok()));
    }
    signal_all(&servers.primary, "CONT").await;
}
