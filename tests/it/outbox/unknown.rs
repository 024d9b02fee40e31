//! Topics that nobody has created, in large numbers: anybody who may publish can name them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio_postgres::Client;

use crate::support::relays::{Relay, arrive, publish, through};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, own_server};

const SOON: Duration = Duration::from_secs(20);

/// How often a relay has looked at its outbox, and asked the control database for topics.
#[derive(Default)]
struct Counts {
    looks: AtomicUsize,
    asks: AtomicUsize,
}

async fn counted(test: &TestCluster) -> (Relay, Arc<Counts>) {
    let counts = Arc::new(Counts::default());
    let hook = Arc::clone(&counts);
    let relay = Relay::with(test, "orders", |builder| {
        builder.relay_failpoint(move |name| {
            match name {
                "looked" => hook.looks.fetch_add(1, Ordering::SeqCst),
                "asks" => hook.asks.fetch_add(1, Ordering::SeqCst),
                _ => 0,
            };
            Box::pin(std::future::ready(()))
        })
    })
    .await;
    (relay, counts)
}

async fn dead(sql: &Client) -> i64 {
    sql.query_one("select count(*) from shardmq.outbox_dead", &[]).await.unwrap().get(0)
}

/// A quarter of them are for later, and due by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_thousand_of_them_delay_nobody_and_are_set_aside() {
    const TOPICS: i64 = 30_000;
    // Roles are the server's.
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 1).await;
    let (publisher, sql) = (test.sql(0).await, test.sql(0).await);
    publisher
        .batch_execute(
            "create role publisher; grant usage on schema shardmq to publisher; set role publisher",
        )
        .await
        .unwrap();
    let many = format!(
        "select count(shardmq.publish('unknown' || n, 'x', deliver_at =>
                    case n % 4 when 0 then now() + interval '1 millisecond' end))
           from generate_series(1, {TOPICS}) n"
    );
    publisher.batch_execute(&many).await.unwrap();
    let (_relay, counts) = counted(&test).await;
    publish(&sql, "orders", "known", Some("k")).await;
    arrive(&sql, &partitions, 1).await;
    let looks = counts.looks.load(Ordering::SeqCst);
    eventually("all are set aside", SOON, async || dead(&sql).await == TOPICS).await;
    through(&sql).await;
    // Each question is about many, and few messages are looked at more than twice.
    let asks = counts.asks.load(Ordering::SeqCst);
    assert!(asks <= 30, "{asks} questions, {looks} looks until a known topic's message came");
}
