//! Clusters that relay from outboxes, and what is published by plain SQL.

use std::time::Duration;

use shardmq::{Cluster, ClusterBuilder, PartitionId, Producer};
use tokio_postgres::{Client, GenericClient};

use super::stored::{Stored, all_stored, stored};
use super::{TestCluster, eventually};

const SOON: Duration = Duration::from_secs(30);

/// A client that relays, also where the tests' own cluster does not.
pub struct Relay {
    pub cluster: Cluster,
    _producer: Producer,
}

impl Relay {
    /// With default settings, using a topic that is there.
    pub async fn start(test: &TestCluster, topic: &str) -> Self {
        Self::with(test, topic, |builder| builder).await
    }

    pub async fn with(
        test: &TestCluster,
        topic: &str,
        settings: impl FnOnce(ClusterBuilder) -> ClusterBuilder,
    ) -> Self {
        let builder = settings(Cluster::builder(&test.control_url));
        let cluster = builder.connect().await.unwrap();
        // Whoever produces takes its turn.
        let producer = cluster.producer(topic).build().await.unwrap();
        Self { cluster, _producer: producer }
    }
}

/// Publishes by plain SQL; returns the row's id.
pub async fn publish(
    sql: &impl GenericClient,
    topic: &str,
    payload: &str,
    key: Option<&str>,
) -> i64 {
    let publish = "select shardmq.publish($1, convert_to($2, 'UTF8'), $3)";
    sql.query_one(publish, &[&topic, &payload, &key]).await.unwrap().get(0)
}

/// Waits until so many messages are stored, and returns them.
pub async fn arrive(sql: &Client, partitions: &[PartitionId], count: usize) -> Vec<Stored> {
    let there = async || {
        let mut all = 0;
        for partition in partitions {
            all += stored(sql, *partition).await.len();
        }
        all >= count
    };
    eventually(&format!("{count} messages arrive"), SOON, there).await;
    let all = all_stored(sql, partitions).await;
    assert_eq!(all.len(), count, "{:?}", texts(&all));
    all
}

pub fn texts(all: &[Stored]) -> Vec<&str> {
    all.iter().map(Stored::text).collect()
}

/// Waits until nothing is left on the way.
pub async fn through(sql: &Client) {
    let left = "select (select count(*) from shardmq.outbox) + (select count(*) from shardmq.outbox_batch)";
    let none = async || sql.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0;
    eventually("nothing is left on the way", SOON, none).await;
}
