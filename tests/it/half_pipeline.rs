//! A client that falls silent in the middle, or goes away: no lock stays, nobody else is harmed.

use std::future::Future;
use std::task::{Context, Waker};
use std::time::Duration;

use shardmq::{Cluster, Message};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::stored::{Stored, assert_dense, holding, number, stored, topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// Nobody holds or waits for a partition's lock, and no transaction is open.
async fn nothing_is_left(sql: &Client) {
    let left = "select count(*) from pg_stat_activity a
         where datname = current_database() and pid <> pg_backend_pid()
           and (state like 'idle in transaction%' or exists (
                select from pg_locks l where l.pid = a.pid and locktype = 'advisory'
                   and classid = 1397247313))";
    let none = || async { sql.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0 };
    eventually("no transaction is open", 20 * SECOND, none).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_a_pipeline_frees_the_partition_when_nothing_more_comes() {
    let (test, proxy) = cluster_behind_proxy().await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let builder = test.cluster.producer("orders");
    let producer = builder.build().await.unwrap();
    producer.send(Message::new("first")).await.unwrap();
    proxy.to_server(Rule::HoldAfter(200_000));
    let sender = producer.clone();
    let large = vec![b'x'; 600_000];
    let since = Instant::now();
    let send = tokio::spawn(async move { sender.send(Message::new(large)).await });
    let held = || async { holding(&sql, partition).await == 1 };
    eventually("the lock is held", 20 * SECOND, held).await;

    let other = test.sql(0).await;
    let append = format!("select shardmq.append({}, array['other'::bytea])", number(partition));
    let appended = other.batch_execute(&append);
    within(12 * SECOND, "another's append", appended).await.unwrap();
    // The server waits for five seconds.
    assert!(since.elapsed() > 4 * SECOND, "the lock was not held in the middle");

    proxy.to_server(Rule::Pass);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!((all.len(), all[2].id), (3, id));
    nothing_is_left(&sql).await;
}

/// As when the client's process is suspended: it neither reads nor writes, and closes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_suspended_with_the_lock_loses_it() {
    let (test, proxy) = cluster_behind_proxy().await;
    let partition = topic(&test, "orders", 1).await[0];
    let suspended = crate::support::client(&proxy.url(&test.control_url)).await;
    let lock = format!(
        "begin; select set_config('idle_in_transaction_session_timeout', '5s', true);
         select shardmq.append({partition}, array['never'::bytea])"
    );
    suspended.batch_execute(&lock).await.unwrap();
    proxy.to_server(Rule::Hold);
    proxy.to_client(Rule::Hold);
    let builder = Cluster::builder(&test.control_url);
    let cluster = builder.connect().await.unwrap();
    let direct = shardmq::NodeId::new(1).unwrap();
    cluster.add_node(direct, &test.control_url).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let id = within(12 * SECOND, "a send", producer.send(Message::new("x"))).await;
    assert_eq!(id.unwrap().sequence(), 1);
}

/// Polls a future some times, giving everything else time in between, and drops it.
async fn drop_after<F: Future>(polls: usize, future: F, sql: &Client) {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return;
        }
        sql.query_one("select 1", &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_that_is_dropped_anywhere_leaves_nothing_open_and_harms_no_neighbour() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let builder = test.cluster.producer("orders").buffer_bytes(64 << 10);
    let producer = builder.build().await.unwrap();
    let mut neighbours = Vec::new();
    let mut polled = 0;
    for polls in 0..12 {
        for size in [1, 20_000] {
            let message =
                |name: &str| Message::new(format!("{name}-{polls}-{size}:{}", "x".repeat(size)));
            // With large ones the buffer is full, and enqueue is dropped while it waits.
            neighbours.push(tokio::spawn({
                let (producer, message) = (producer.clone(), message("neighbour"));
                async move { producer.send(message).await }
            }));
            drop_after(polls, producer.send(message("dropped")), &sql).await;
            polled += usize::from(polls > 0);
        }
    }
    let sent = neighbours.len();
    for neighbour in neighbours {
        within(15 * SECOND, "a neighbour", neighbour).await.unwrap().unwrap();
    }
    within(15 * SECOND, "the flush", producer.flush()).await.unwrap();
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    let of = |name: &str| all.iter().filter(|m| m.text().starts_with(name)).count();
    assert_eq!(of("neighbour"), sent);
    assert!(of("dropped") <= polled);
    nothing_is_left(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_that_is_dropped_while_it_waits_for_room_takes_none() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (holder, sql) = (test.sql(0).await, test.sql(0).await);
    let builder = test.cluster.producer("orders").buffer_bytes(64 << 10);
    let producer = builder.build().await.unwrap();
    let lock = format!("begin; select shardmq.lock_partition({partition})");
    holder.batch_execute(&lock).await.unwrap();
    let large = || Message::new(vec![b'x'; 20_000]);
    for _ in 0..3 {
        let _receipt = producer.enqueue(large()).await.unwrap();
    }
    for polls in 1..5 {
        let small = Message::new(vec![b'x'; 8_000]);
        drop_after(polls, producer.enqueue(small), &sql).await;
    }
    holder.batch_execute("commit").await.unwrap();
    within(15 * SECOND, "the flush", producer.flush()).await.unwrap();
    assert_eq!(stored(&sql, partition).await.len(), 3);
    let whole = Message::new(vec![0; (64 << 10) - 64]);
    within(15 * SECOND, "the whole buffer", producer.send(whole)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_sent_once_send_was_polled() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    drop_after(0, producer.send(Message::new("not polled")), &sql).await;
    drop_after(1, producer.send(Message::new("polled")), &sql).await;
    producer.flush().await.unwrap();
    let all = stored(&sql, partition).await;
    assert_eq!(all.iter().map(Stored::text).collect::<Vec<_>>(), ["polled"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_ends_while_it_waits_leaves_nothing_open() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (holder, sql) = (test.sql(0).await, test.sql(0).await);
    let lock = format!("begin; select shardmq.lock_partition({partition})");
    holder.batch_execute(&lock).await.unwrap();
    let url = test.control_url.clone();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _send = runtime.spawn(async move {
        let cluster = Cluster::connect(&url).await.unwrap();
        let producer = cluster.producer("orders").build().await.unwrap();
        producer.send(Message::new("x")).await
    });
    let waits = || async { waiting(&sql, partition).await == 1 };
    eventually("it waits for the lock", 20 * SECOND, waits).await;
    runtime.shutdown_background();
    holder.batch_execute("commit").await.unwrap();
    nothing_is_left(&sql).await;
    assert!(stored(&sql, partition).await.len() <= 1);
}

/// A server that takes connections and says nothing, at any point: an answer all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_falls_silent_gets_every_send_an_answer() {
    let mut tests = Vec::new();
    // While a new connection is made and checked, while statements are prepared, in the pipeline.
    for bytes in [0, 100, 400, 700, 1_000, 1_500, 2_500, 4_000] {
        tests.push(tokio::spawn(async move {
            let (test, proxy) = cluster_behind_proxy().await;
            topic(&test, "orders", 1).await;
            proxy.cut();
            proxy.to_client(Rule::HoldAfter(bytes));
            let builder = test.cluster.producer("orders").send_timeout(SECOND);
            let producer = builder.build().await.unwrap();
            let send = producer.send(Message::new("x"));
            let outcome = within(20 * SECOND, "an answer", send).await;
            proxy.to_client(Rule::Pass);
            drop(producer);
            outcome.is_ok()
        }));
    }
    for test in tests {
        test.await.unwrap();
    }
}
