//! Two notifiers, of which one may fail, and none at all.

use std::time::Duration;

use shardmq::embedded::{Redis, StopMode};
use shardmq::notifier::{HealthState, NotifierKind};
use shardmq::testing::NotifierSuite;
use shardmq::{Cluster, ConsumerEvent, Message, PartitionId};

use super::{SECOND, SOON, nothing_is_late};
use crate::support::reading::next_text;
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, within};

async fn connect(test: &TestCluster, kind: NotifierKind, redis: &Redis) -> Cluster {
    let builder = Cluster::builder(&test.control_url).upkeep(false).notifier_kind(kind);
    builder.redis_url(&redis.url()).connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_arrive_as_long_as_one_of_both_is_well() {
    let redis = Redis::builder().start().await.unwrap();
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 2).await;
    let producing = connect(&test, NotifierKind::Both, &redis).await;
    let consuming = connect(&test, NotifierKind::Both, &redis).await;
    let producer = producing.producer("orders").build().await.unwrap();
    let never = Duration::from_mins(10);
    let mut messages =
        consuming.consumer("orders", "g").poll_interval(never).stream().await.unwrap();
    let handle = messages.handle();
    let well = async || handle.status().notifier.iter().any(|node| node.health.is_ok());
    eventually("hints arrive", SOON, well).await;
    let sql = test.sql(0).await;
    for round in 0..3 {
        match round {
            0 => {}
            1 => redis.stop_server(StopMode::Immediate).await.unwrap(),
            _ => {
                redis.start_server().await.unwrap();
                let subscribed = async || redis_subscribers(&redis).await >= 2;
                eventually("Redis is subscribed to again", SOON, subscribed).await;
                let kill = "select pg_terminate_backend(pid) from pg_stat_activity
                             where application_name like 'shardmq listen %'
                               and datname = current_database()";
                sql.query(kill, &[]).await.unwrap();
            }
        }
        for n in 0..10 {
            producer.send(Message::new(n.to_string())).await.unwrap();
            assert_eq!(next_text(&mut messages).await, n.to_string(), "{round}");
        }
        assert!(well().await, "{round}");
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_conform_together() {
    let redis = Redis::builder().start().await.unwrap();
    let test = TestCluster::new(1).await;
    let publishing = connect(&test, NotifierKind::Both, &redis).await;
    let subscribing = connect(&test, NotifierKind::Both, &redis).await;
    let partition = PartitionId::new(1, 1).unwrap();
    let suite = NotifierSuite::new(publishing.notifier(), subscribing.notifier(), partition);
    suite.check().await.unwrap();
}

async fn redis_subscribers(redis: &Redis) -> usize {
    crate::support::redis::subscribed_channels(redis.port()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_notifier_everything_works_only_later() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 4).await;
    let builder = Cluster::builder(&test.control_url).upkeep(false);
    let cluster = builder.notifier_kind(NotifierKind::None).connect().await.unwrap();
    let mut messages = cluster.consumer("orders", "other").stream().await.unwrap();
    let handle = messages.handle();
    eventually("it has all", SOON, async || handle.held_partitions() == 4).await;
    let status = handle.status();
    assert_eq!(status.partitions.len(), 4);
    assert_eq!(status.notifier[0].health.state, HealthState::Polling);
    let late = nothing_is_late(&cluster, &cluster, "orders", async {}).await;
    // Where messages keep coming it looks often, and not every 5 s.
    assert!(late < 3 * SECOND, "{late:?}");
    for _ in 0..10 {
        next_text(&mut messages).await;
    }
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_tells_when_hints_stop_and_come_again() {
    let redis = Redis::builder().start().await.unwrap();
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let cluster = connect(&test, NotifierKind::Redis, &redis).await;
    let messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let mut events = messages.handle().events();
    let mut becomes = async |state: HealthState| {
        let found = async {
            loop {
                let Some(ConsumerEvent::Notifier { node, health }) = events.next().await else {
                    panic!("it ended")
                };
                if health.state == state {
                    return (node.number(), health);
                }
            }
        };
        within(SOON, "a state", found).await
    };
    let (node, health) = becomes(HealthState::Ok).await;
    assert_eq!((node, health.error), (1, None));
    redis.stop_server(StopMode::Immediate).await.unwrap();
    let (_, health) = becomes(HealthState::Reconnecting).await;
    let began = health.since;
    assert!(health.error.is_some());
    let (_, health) = becomes(HealthState::Polling).await;
    assert_eq!(health.since, began + 10 * SECOND);
    redis.start_server().await.unwrap();
    let (_, health) = becomes(HealthState::Ok).await;
    assert!(health.error.is_none() && health.since > began + 10 * SECOND);
    assert!(health.round_trip.is_some());
    messages.shutdown(SECOND).await.unwrap();
}
