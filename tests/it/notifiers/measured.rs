//! What metrics tell of a notifier.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use metrics::{
    Counter, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use shardmq::embedded::{Redis, StopMode};
use shardmq::metrics::{NOTIFIER_ROUND_TRIP, NOTIFIER_STATE};
use shardmq::notifier::NotifierKind;
use shardmq::{Cluster, NodeId, TopicOptions};

use super::{SECOND, SOON};
use crate::support::{database, eventually, shared_server};

/// The last value of each gauge and histogram, by its name and labels.
static VALUES: LazyLock<Mutex<HashMap<String, f64>>> = LazyLock::new(Mutex::default);

struct Last(String);

impl Last {
    fn of(key: &Key) -> Arc<Self> {
        let labels = key.labels().map(|label| format!("{{{}={}}}", label.key(), label.value()));
        Arc::new(Self(format!("{}{}", key.name(), labels.collect::<String>())))
    }

    fn keep(&self, value: f64) {
        VALUES.lock().unwrap().insert(self.0.clone(), value);
    }
}

impl GaugeFn for Last {
    fn increment(&self, _: f64) {}
    fn decrement(&self, _: f64) {}
    fn set(&self, value: f64) {
        self.keep(value);
    }
}

impl HistogramFn for Last {
    fn record(&self, value: f64) {
        self.keep(value);
    }
}

/// Of the whole process: other tests are recorded too.
struct Kept;

impl Recorder for Kept {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Last::of(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Last::of(key))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_how_hints_arrive_and_how_quickly() {
    metrics::set_global_recorder(Kept).ok().unwrap();
    let redis = Redis::builder().start().await.unwrap();
    let url = database(shared_server().await).await;
    let builder = Cluster::builder(&url).upkeep(false).notifier_kind(NotifierKind::Redis);
    let cluster = builder.redis_url(&redis.url()).connect().await.unwrap();
    // A node that no other test has.
    let node = NodeId::new(87).unwrap();
    cluster.add_node(node, &url).await.unwrap();
    cluster.create_topic("orders", TopicOptions::partitions(1)).await.unwrap();
    let messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let gauge = format!("{NOTIFIER_STATE}{{node={node}}}");
    let value = |name: &str| VALUES.lock().unwrap().get(name).copied();
    let becomes = async |state: f64| {
        let is = async || value(&gauge) == Some(state);
        eventually(&format!("the state is {state}"), SOON, is).await;
    };
    becomes(0.0).await;
    assert!(value(NOTIFIER_ROUND_TRIP).is_some_and(|seconds| seconds > 0.0));
    redis.stop_server(StopMode::Immediate).await.unwrap();
    becomes(1.0).await;
    becomes(2.0).await;
    redis.start_server().await.unwrap();
    becomes(0.0).await;
    messages.shutdown(SECOND).await.unwrap();
}
