//! A day table that somebody has locked, or that is broken, stops its own partition and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use shardmq::{Cluster, Delivery, ErrorKind, Messages, NodeId, PartitionId};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::Client;

use crate::support::reading::text;
use crate::support::stored::{number, table, topic};
use crate::support::{TestCluster, database, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// A node apart from the control database: its sessions are those of data connections, and one that
/// listens.
async fn apart() -> TestCluster {
    let server = shared_server().await;
    let (control_url, node_url) = (database(server).await, database(server).await);
    let cluster = Cluster::builder(&control_url).connect().await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &node_url).await.unwrap();
    TestCluster { cluster, control_url, node_urls: vec![node_url] }
}

/// The next delivery. The stream also tells of the partition that stands still.
async fn next(messages: &mut Messages) -> Delivery {
    loop {
        let next = within(20 * SECOND, "a delivery", messages.next()).await;
        match next.expect("the stream goes on") {
            Ok(delivery) => return delivery,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain()),
        }
    }
}

/// The text of the next delivery, which is acknowledged.
async fn next_text(messages: &mut Messages) -> String {
    let delivery = next(messages).await;
    let text = text(&delivery);
    delivery.ack().unwrap();
    text
}

/// Appends a message and gives a hint of it.
async fn append(sql: &Client, partition: PartitionId, text: &str) {
    let append =
        "select shardmq.append($1, array[$2::text::bytea]), pg_notify('shardmq', $1::text)";
    sql.query_one(append, &[&number(partition), &text]).await.unwrap();
}

/// Sessions of the library on a node, but for the one that listens for its relay, and how many of
/// them wait for a lock: the most that were seen.
#[derive(Default)]
struct Most {
    sessions: AtomicI64,
    waiting: AtomicI64,
    over: AtomicBool,
}

impl Most {
    async fn watch(self: Arc<Self>, sql: Client) {
        let count = "select count(*), count(*) filter (where wait_event_type = 'Lock')
                       from pg_stat_activity
                      where datname = current_database() and application_name like 'shardmq%'
                        and application_name <> 'shardmq relay'";
        let mut ticks = interval(SECOND / 10);
        while !self.over.load(Ordering::SeqCst) {
            ticks.tick().await;
            let row = sql.query_one(count, &[]).await.unwrap();
            self.sessions.fetch_max(row.get(0), Ordering::SeqCst);
            self.waiting.fetch_max(row.get(1), Ordering::SeqCst);
        }
    }
}

/// The latency of messages to some partitions in turn, for so long: the 99th percentile.
async fn latency(
    sql: &Client,
    partitions: &[PartitionId],
    groups: &mut [Messages],
    time: Duration,
) -> Duration {
    let begun = Instant::now();
    let mut all = Vec::new();
    let mut ticks = interval(SECOND / 100);
    // One at a time, and no burst of what a slow one has missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for partition in partitions.iter().cycle() {
        ticks.tick().await;
        let sent = Instant::now();
        append(sql, *partition, "m").await;
        for messages in &mut *groups {
            let delivery = next(messages).await;
            assert_eq!(delivery.id().partition(), *partition);
            delivery.ack().unwrap();
        }
        all.push(sent.elapsed());
        if begun.elapsed() > time {
            break;
        }
    }
    all.sort_unstable();
    all[all.len() * 99 / 100]
}

/// Locks today's table of a partition in a transaction that stays open.
async fn lock(sql: &Client, partition: PartitionId) {
    let today = "select shardmq.day_of(shardmq.clock())";
    let day: i32 = sql.query_one(today, &[]).await.unwrap().get(0);
    let lock = format!("begin; lock table {} in access exclusive mode", table(partition, day));
    sql.batch_execute(&lock).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_delays_no_other_partition_and_gathers_no_sessions() {
    let test = apart().await;
    let partitions = topic(&test, "orders", 6).await;
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    let mut groups = Vec::new();
    for group in ["first", "second"] {
        groups.push(test.cluster.consumer("orders", group).stream().await.unwrap());
    }
    let (locked, others) = partitions.split_first().unwrap();
    append(&sql, *locked, "before").await;
    for messages in &mut groups {
        assert_eq!(next_text(messages).await, "before");
    }
    let before = latency(&sql, others, &mut groups, 3 * SECOND).await;

    lock(&holder, *locked).await;
    let most = Arc::new(Most::default());
    let watching = tokio::spawn(Arc::clone(&most).watch(test.sql(0).await));
    let late = test.sql(0).await;
    let partition = *locked;
    // Waits for the table, and commits when it is free again.
    let appending = tokio::spawn(async move { append(&late, partition, "behind").await });
    let during = latency(&sql, others, &mut groups, 20 * SECOND).await;
    most.over.store(true, Ordering::SeqCst);
    watching.await.unwrap();
    let (sessions, waiting) = (&most.sessions, &most.waiting);
    println!(
        "p99 before {before:?}, during {during:?}, sessions {sessions:?}, waiting {waiting:?}"
    );
    assert!(during <= before + SECOND / 10, "before {before:?}, during {during:?}");
    assert!(sessions.load(Ordering::SeqCst) <= 3, "{sessions:?}");
    assert!(waiting.load(Ordering::SeqCst) <= 1, "{waiting:?}");

    holder.batch_execute("commit").await.unwrap();
    for messages in &mut groups {
        let delivery = within(5 * SECOND, "the message behind the lock", next(messages)).await;
        assert_eq!(text(&delivery), "behind");
    }
    appending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_begins_in_all_partitions_but_the_one_whose_table_is_locked() {
    let test = apart().await;
    let partitions = topic(&test, "orders", 3).await;
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    for partition in &partitions {
        append(&sql, *partition, "old").await;
    }
    lock(&holder, partitions[0]).await;
    // Where it starts is looked for in the day's table.
    let builder = test.cluster.consumer("orders", "g").start(shardmq::Start::Latest);
    let mut messages = builder.stream().await.unwrap();
    let handle = messages.handle();
    let held = async || handle.partitions().len() == 2;
    eventually("it has the others", 10 * SECOND, held).await;
    for partition in &partitions[1..] {
        append(&sql, *partition, "new").await;
        let delivery = next(&mut messages).await;
        assert_eq!(delivery.id().partition(), *partition);
        delivery.ack().unwrap();
    }
    holder.batch_execute("commit").await.unwrap();
    let held = async || handle.partitions().len() == 3;
    eventually("it has all", 10 * SECOND, held).await;
    append(&sql, partitions[0], "new").await;
    assert_eq!(next(&mut messages).await.id().partition(), partitions[0]);
}

/// Renamed, its primary key is no more what an index scan needs: each statement fails at once, and
/// not at a lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_broken_delays_no_other_partition() {
    let test = apart().await;
    let partitions = topic(&test, "orders", 6).await;
    let (sql, breaker) = (test.sql(0).await, test.sql(0).await);
    let builder = test.cluster.consumer("orders", "g").poll_interval(SECOND / 10);
    let mut groups = [builder.stream().await.unwrap()];
    let (broken, others) = partitions.split_first().unwrap();
    append(&sql, *broken, "before").await;
    assert_eq!(next_text(&mut groups[0]).await, "before");
    let today = "select shardmq.day_of(shardmq.clock())";
    let day: i32 = sql.query_one(today, &[]).await.unwrap().get(0);
    let rename = |from: &str, to: &str| {
        format!("alter table {} rename column {from} to {to}", table(*broken, day))
    };
    breaker.batch_execute(&rename("base_id", "broken")).await.unwrap();
    let during = latency(&sql, others, &mut groups, 2 * SECOND).await;
    assert!(during < SECOND / 2, "{during:?}");
    breaker.batch_execute(&rename("broken", "base_id")).await.unwrap();
    append(&sql, *broken, "after").await;
    assert_eq!(next_text(&mut groups[0]).await, "after");
}

/// The backends of the library in a database.
async fn backends(sql: &Client) -> Vec<i32> {
    let pids = "select pid from pg_stat_activity
                 where datname = current_database() and application_name = 'shardmq' order by 1";
    sql.query(pids, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_given_up_is_not_handed_out_again_and_its_backend_ends() {
    let test = apart().await;
    let partition = topic(&test, "orders", 1).await[0];
    let builder = Cluster::builder(&test.control_url).connections_per_node(1).upkeep(false);
    let cluster = builder.connect().await.unwrap();
    test.cluster.shutdown().await;
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    append(&sql, partition, "m").await;
    let mut messages = cluster.consumer("orders", "g").stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    cluster.lag("orders").await.unwrap();
    let before = backends(&sql).await;
    assert_eq!(before.len(), 1, "{before:?}");
    lock(&holder, partition).await;
    let waits =
        "select count(*) > 0 from pg_stat_activity where pid = $1 and wait_event_type = 'Lock'";
    for _ in 0..20 {
        let pid = backends(&sql).await[0];
        let is_waiting = async || sql.query_one(waits, &[&pid]).await.unwrap().get::<_, bool>(0);
        let until_it_waits = async { while !is_waiting().await {} };
        // It is given up as soon as it waits for the lock.
        tokio::select! {
            refused = cluster.lag("orders") => drop(refused.unwrap_err()),
            () = until_it_waits => {}
        }
        let error = cluster.lag("orders").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
        let one = async || backends(&sql).await.len() == 1;
        eventually("the backend that was given up ends", 5 * SECOND, one).await;
    }
    assert_ne!(backends(&sql).await, before, "none was given up while it waited");
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(cluster.lag("orders").await.unwrap()[0].lag, 0);
}
