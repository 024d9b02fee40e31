//! What sessions keep prepared in the server.

use std::time::Duration;

use shardmq::{Cluster, Messages, PartitionId, PreparedStatements, TopicOptions};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::support::clocks::Clocks;
use crate::support::pgbouncer::{PgBouncer, Unknown, cluster_with};
use crate::support::reading::next;
use crate::support::stored::number;
use crate::support::{TestCluster, client, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const PARTITIONS: usize = 5;

/// Some days of a message in each partition, from one day after the test began to another.
async fn fill(
    test: &TestCluster,
    clocks: &Clocks,
    partitions: &[PartitionId],
    days: std::ops::Range<u32>,
) {
    let sql = test.sql(0).await;
    for day in days {
        clocks.set_server(&format!("{} hours", day * 24 + 12)).await;
        for partition in partitions {
            let rolled = "select outcome from shardmq.roll($1, shardmq.clock())";
            sql.query_one(rolled, &[&number(*partition)]).await.unwrap();
            let append = "select shardmq.append($1, array['m'::bytea])";
            sql.query_one(append, &[&number(*partition)]).await.unwrap();
        }
    }
}

async fn read(messages: &mut Messages, count: usize) {
    for _ in 0..count {
        next(messages).await.ack().unwrap();
    }
}

/// The statements that the pooler's only session with the server keeps: those of the library.
async fn kept(pooled: &Client) -> Vec<String> {
    let texts = "select statement from pg_prepared_statements";
    let rows = pooled.simple_query(texts).await.unwrap();
    let text = |message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    };
    rows.into_iter().filter_map(text).collect()
}

/// A look has as many tables as its consumer has partitions on a node, and another text whenever
/// one of these goes to its next day: kept, they would take memory with the square of what is
/// worked off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_grows_with_the_days_worked_off_and_looks_are_not_kept() {
    let server = shared_server().await;
    let pooler = PgBouncer::start(server, 1, Unknown::Refused).await;
    let always = |builder: shardmq::ClusterBuilder| {
        builder.prepared_statements(PreparedStatements::Always).connections_per_node(1)
    };
    let test = cluster_with(server, pooler.port(), always).await;
    // Through the pooler it takes two server connections.
    let direct = Cluster::builder(&test.node_urls[0]).upkeep(false).connect().await.unwrap();
    let made = direct.create_topic("orders", TopicOptions::partitions(PARTITIONS)).await.unwrap();
    let partitions: Vec<PartitionId> = made.partitions.iter().map(|made| made.partition).collect();
    direct.shutdown().await;
    let clocks = Clocks::of(&test).await;
    let builder = test.cluster.consumer("orders", "g").poll_interval(SECOND / 20);
    let mut messages = builder.stream().await.unwrap();
    let pooled = client(&test.control_url).await;
    let mut counts = Vec::new();
    for days in [0..6, 6..12] {
        fill(&test, &clocks, &partitions, days).await;
        read(&mut messages, 6 * PARTITIONS).await;
        let kept = kept(&pooled).await;
        assert!(!kept.iter().any(|text| text.contains("(values")), "a look is kept: {kept:?}");
        let of_days = kept.iter().filter(|text| text.contains("shardmq.batch_")).count();
        // Those to fetch and to compare.
        assert!(of_days <= 2 * PARTITIONS * 12, "{of_days}");
        counts.push(of_days);
    }
    println!("{counts:?}");
    assert!(10 * counts[1] <= 22 * counts[0], "{counts:?}");
}
