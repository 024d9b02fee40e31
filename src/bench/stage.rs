//! Where it all happens: topics of the run's own, and the connections to them.

use tokio::time::Instant;
use uuid::Uuid;

use crate::admin::TopicOptions;
use crate::bench::payloads::Payloads;
use crate::bench::{Bench, Options};
use crate::cluster::Cluster;
use crate::error::{ErrorKind, Result};
use crate::id::NodeId;
use crate::name::TopicName;
use crate::topology::Topology;

/// How many connections the floor has.
pub(super) const FLOOR_CONNECTIONS: usize = 4;

pub(super) struct Stage {
    pub(super) options: Options,
    /// Two clusters, as if they were of two processes: hints take the way over the server.
    pub(super) producing: Cluster,
    pub(super) consuming: Cluster,
    /// What the library writes to and reads from.
    pub(super) topic: Topology,
    /// What the floor appends to.
    pub(super) floor: Topology,
    pub(super) payloads: Payloads,
    /// How long it took to make the library's topic, in seconds.
    pub(super) topic_s: f64,
}

impl Stage {
    /// Connects, and makes the topics. Where the nodes have no room for a second one, what is produced
    /// on the floor goes to partitions of the first, which nobody else uses at the time.
    pub(super) async fn set(bench: Bench, url: &str, options: Options) -> Result<Self> {
        let producing = connect(url, &options).await?;
        let consuming = connect(url, &options).await?;
        let mut nodes: Vec<NodeId> = producing.nodes().await?.iter().map(|n| n.node).collect();
        nodes.truncate(options.nodes.unwrap_or(usize::MAX));
        let run = Uuid::new_v4().simple().to_string();
        let name = format!("bench-{}", &run[..8]);
        let begun = Instant::now();
        let topic = make(&producing, &name, options.partitions, &nodes).await?;
        let topic_s = begun.elapsed().as_secs_f64();
        let floor = make(&producing, &format!("{name}-floor"), FLOOR_CONNECTIONS, &nodes).await;
        let floor = match floor {
            Err(error) if error.kind() == ErrorKind::Full && bench == Bench::Produce => {
                topic.clone()
            }
            Err(error) => {
                producing.delete_topic(&name, true).await?;
                return Err(error);
            }
            Ok(floor) => floor,
        };
        let payloads = Payloads::new(options.size);
        Ok(Self { options, producing, consuming, topic, floor, payloads, topic_s })
    }

    /// The name of the library's topic.
    pub(super) fn name(&self) -> &str {
        self.topic.topic.as_str()
    }

    /// Deletes the topics, and ends all connections.
    pub(super) async fn clear(self) -> Result<()> {
        self.consuming.shutdown().await;
        let mut outcome = Ok(());
        let own = self.floor.topic != self.topic.topic;
        for topic in [&self.topic].into_iter().chain(own.then_some(&self.floor)) {
            outcome = outcome.and(self.producing.delete_topic(topic.topic.as_str(), true).await);
        }
        self.producing.shutdown().await;
        outcome
    }
}

async fn connect(url: &str, options: &Options) -> Result<Cluster> {
    let mut builder = Cluster::builder(url);
    if let Some(connections) = options.connections {
        builder = builder.connections_per_node(connections);
    }
    builder = builder.notifier_kind(options.notifier);
    if let Some(url) = &options.redis_url {
        builder = builder.redis_url(url);
    }
    builder.connect().await
}

async fn make(
    cluster: &Cluster,
    name: &str,
    partitions: usize,
    nodes: &[NodeId],
) -> Result<Topology> {
    let options = TopicOptions::partitions(partitions).nodes(nodes.iter().copied());
    cluster.create_topic(name, options).await?;
    cluster.topology(&TopicName::new(name)?).await
}
