//! Redis in every kind of trouble.

use std::sync::Arc;

use futures_util::future::join_all;
use shardmq::embedded::{Redis, StopMode};
use shardmq::notifier::{Notifier, NotifierKind, RedisNotifier};
use shardmq::testing::NotifierSuite;
use shardmq::{Cluster, NodeId, PartitionId};
use tokio::time::Instant;

use super::{SECOND, SOON, nothing_is_late};
use crate::support::hints::{arrive, hears, interrupted};
use crate::support::proxy::{Proxy, Rule};
use crate::support::redis::{ByHand, Sentinel, subscribed_channels};
use crate::support::signals::signal;
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

fn partition() -> PartitionId {
    PartitionId::new(1, 1).unwrap()
}

fn suite_at(url: &str) -> NotifierSuite {
    let [publisher, subscriber] = [(); 2].map(|()| RedisNotifier::new(url, "suite").unwrap());
    NotifierSuite::new(publisher, subscriber, partition())
}

async fn start() -> (Redis, NotifierSuite) {
    let redis = Redis::builder().start().await.unwrap();
    let suite = suite_at(&redis.url());
    (redis, suite)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_conforms_also_where_one_value_does_both() {
    let (redis, suite) = start().await;
    suite.check().await.unwrap();
    let one = Arc::new(RedisNotifier::new(&redis.url(), "one").unwrap());
    NotifierSuite::new(Arc::clone(&one), one, partition()).check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_comes_back() {
    let (redis, suite) = start().await;
    let kill = async { redis.stop_server(StopMode::Immediate).await.unwrap() };
    let mend = async { redis.start_server().await.unwrap() };
    suite.check_interruption(kill, mend).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_suspended() {
    let (redis, suite) = start().await;
    let pid = redis.pid().unwrap();
    let mend = async { signal(pid, "CONT").await };
    suite.check_interruption(async { signal(pid, "STOP").await }, mend).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_everything() {
    let (redis, _) = start().await;
    let proxy = Proxy::start(redis.port()).await;
    let suite = suite_at(&format!("redis://127.0.0.1:{}", proxy.port()));
    let rule = async |rule: Rule| {
        proxy.to_client(rule);
        proxy.to_server(rule);
    };
    suite.check_interruption(rule(Rule::Swallow), rule(Rule::Pass)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_password() {
    let (redis, suite) = start().await;
    let by_hand = tokio::sync::Mutex::new(ByHand::connect(redis.port()).await);
    let out = async { lock_out(&mut *by_hand.lock().await).await };
    let mend = async { let_in(&mut *by_hand.lock().await).await };
    suite.check_interruption(out, mend).await.unwrap();
}

/// Nobody else has the password any more.
async fn lock_out(by_hand: &mut ByHand) {
    assert_eq!(by_hand.say("CONFIG SET requirepass new").await, "+OK");
    for kind in ["normal", "pubsub"] {
        by_hand.say(&format!("CLIENT KILL TYPE {kind} SKIPME yes")).await;
    }
}

async fn let_in(by_hand: &mut ByHand) {
    assert_eq!(by_hand.say("CONFIG SET requirepass \"\"").await, "+OK");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_of_its_own_needs_its_channels_only() {
    let redis = Redis::builder().start().await.unwrap();
    let mut by_hand = ByHand::connect(redis.port()).await;
    let user =
        "ACL SETUSER mq on >secret resetchannels &shardmq:* +publish +subscribe +unsubscribe";
    assert_eq!(by_hand.say(user).await, "+OK");
    assert_eq!(by_hand.say("ACL SETUSER default off").await, "+OK");
    let url = format!("redis://mq:secret@127.0.0.1:{}", redis.port());
    let notifier = || RedisNotifier::new(&url, "shardmq:x").unwrap();
    NotifierSuite::new(notifier(), notifier(), partition()).check().await.unwrap();
    // Elsewhere it is refused, and says so.
    let elsewhere = RedisNotifier::new(&url, "other").unwrap();
    let _hints = elsewhere.subscribe(&[partition()]);
    let says = async || {
        let error = elsewhere.health(NodeId::new(1).unwrap()).error.unwrap_or_default();
        assert!(!error.contains("secret"), "{error}");
        error.contains("permissions")
    };
    eventually("it says why", SOON, says).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_forget_everything_is_nothing_to_it() {
    let (redis, suite) = start().await;
    suite.check().await.unwrap();
    assert_eq!(ByHand::connect(redis.port()).await.say("FLUSHALL").await, "+OK");
    suite.check().await.unwrap();
    redis.restart(StopMode::Fast).await.unwrap();
    suite.check().await.unwrap();
}

/// The address leads to another server by now, and the old one still takes what is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_to_a_server_that_is_no_more_the_right_one_goes_to_that() {
    let (old, new) = (start().await.0, start().await.0);
    let proxy = Proxy::start(old.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let notifier = RedisNotifier::new(&url, "moved").unwrap();
    let mut hints = notifier.subscribe(&[partition()]);
    arrive(&mut hints).await;
    proxy.lead_to(new.port());
    let mut by_hand = ByHand::connect(old.port()).await;
    assert_eq!(by_hand.say("CLIENT KILL TYPE pubsub").await, ":1");
    interrupted(&mut hints).await;
    arrive(&mut hints).await;
    notifier.publish(&[partition()]);
    hears(&mut hints, partition()).await;
}

/// A cluster whose hints go through a Redis, as two processes have it.
async fn cluster_by(url: &str) -> (TestCluster, [Cluster; 2]) {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 4).await;
    let mut clusters = Vec::new();
    for _ in 0..2 {
        let builder = Cluster::builder(&test.control_url).upkeep(false);
        let builder = builder.notifier_kind(NotifierKind::Redis).redis_url(url);
        clusters.push(builder.connect().await.unwrap());
    }
    (test, clusters.try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_while_it_is_killed_suspended_restarted_and_cut_off() {
    let redis = Redis::builder().start().await.unwrap();
    let proxy = Proxy::start(redis.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let (_test, [producing, consuming]) = cluster_by(&url).await;
    let pid = || redis.pid().unwrap();
    let trouble = async {
        redis.stop_server(StopMode::Immediate).await.unwrap();
        tokio::time::sleep(3 * SECOND).await;
        redis.start_server().await.unwrap();
        signal(pid(), "STOP").await;
        tokio::time::sleep(3 * SECOND).await;
        signal(pid(), "CONT").await;
        proxy.to_client(Rule::Swallow);
        tokio::time::sleep(3 * SECOND).await;
        proxy.to_client(Rule::Pass);
        for _ in 0..5 {
            proxy.cut();
            redis.restart(StopMode::Fast).await.unwrap();
        }
    };
    nothing_is_late(&producing, &consuming, "orders", trouble).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_while_its_password_is_another_and_it_forgets_everything() {
    let redis = Redis::builder().start().await.unwrap();
    let (_test, [producing, consuming]) = cluster_by(&redis.url()).await;
    let mut by_hand = ByHand::connect(redis.port()).await;
    let trouble = async {
        lock_out(&mut by_hand).await;
        tokio::time::sleep(6 * SECOND).await;
        let_in(&mut by_hand).await;
        for _ in 0..5 {
            assert_eq!(by_hand.say("FLUSHALL").await, "+OK");
            by_hand.say("CLIENT KILL TYPE pubsub").await;
            tokio::time::sleep(SECOND / 2).await;
        }
    };
    nothing_is_late(&producing, &consuming, "orders", trouble).await;
}

/// Where nothing else is wrong, an idle system that starts again hears at once: no look is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_notifications_while_nobody_listens() {
    let (redis, suite) = start().await;
    let mut by_hand = ByHand::connect(redis.port()).await;
    let thousand = "PUBLISH suite:01 10101\r\n".repeat(1_000);
    for _ in 0..1_000 {
        by_hand.send(thousand.as_bytes()).await;
        for _ in 0..1_000 {
            by_hand.line().await;
        }
    }
    let publisher = RedisNotifier::new(&redis.url(), "suite").unwrap();
    for _ in 0..1_000_000 {
        publisher.publish(&[partition()]);
    }
    suite.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_listeners_hear_all_at_once() {
    let (redis, suite) = start().await;
    let listeners = join_all((0..1_000).map(|_| async {
        let mut by_hand = ByHand::connect(redis.port()).await;
        assert_eq!(by_hand.say("SUBSCRIBE suite:01").await, "*3");
        by_hand
    }));
    let _listeners = listeners.await;
    suite.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_are_let_go_and_taken_up_again() {
    let redis = Redis::builder().start().await.unwrap();
    let notifier = RedisNotifier::new(&redis.url(), "x").unwrap();
    let [one, two] = [1, 2].map(|node| PartitionId::new(node, 1).unwrap());
    let mut first = notifier.subscribe(&[one]);
    arrive(&mut first).await;
    let mut second = notifier.subscribe(&[two]);
    arrive(&mut second).await;
    notifier.publish(&[two]);
    hears(&mut second, two).await;
    // Two nodes, and the canary's.
    let channels = async |count: usize| {
        let found = async || subscribed_channels(redis.port()).await == count;
        eventually(&format!("{count} channels"), SOON, found).await;
    };
    channels(3).await;
    drop(second);
    channels(2).await;
    drop(first);
    channels(0).await;
    let mut again = notifier.subscribe(&[one, two]);
    arrive(&mut again).await;
    notifier.publish(&[one]);
    hears(&mut again, one).await;
    drop(again);
    drop(notifier);
    channels(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_members_of_a_redis_cluster_are_one() {
    let member = || Redis::builder().setting("cluster-enabled", "yes").start();
    let (one, two) = (member().await.unwrap(), member().await.unwrap());
    let mut by_hand = ByHand::connect(one.port()).await;
    assert_eq!(by_hand.say(&format!("CLUSTER MEET 127.0.0.1 {}", two.port())).await, "+OK");
    let met = async || {
        let mut by_hand = ByHand::connect(two.port()).await;
        let known = by_hand.say("CLUSTER NODES").await;
        let mut rest = String::new();
        while rest.lines().count() < 2 {
            rest.push_str(&by_hand.line().await);
            rest.push('\n');
            if rest.len() + 2 > known.trim_start_matches('$').parse::<usize>().unwrap_or(0) {
                break;
            }
        }
        rest.matches(" connected").count() == 2 && !rest.contains("handshake")
    };
    eventually("they have met", SOON, met).await;
    let at = |port: u16| format!("redis://127.0.0.1:{port}");
    // One member is published to, the other listened to.
    let publisher = RedisNotifier::new(&at(one.port()), "x").unwrap();
    let subscriber = RedisNotifier::new(&at(two.port()), "x").unwrap();
    NotifierSuite::new(publisher, subscriber, partition()).check().await.unwrap();
    // With one gone, the other serves who knows both.
    let both = format!("redis://127.0.0.1:{},127.0.0.1:{}", one.port(), two.port());
    let [publisher, subscriber] = [(); 2].map(|()| RedisNotifier::new(&both, "both").unwrap());
    let subscriber = Arc::new(subscriber);
    let suite = NotifierSuite::new(publisher, Arc::clone(&subscriber), partition());
    suite.check().await.unwrap();
    let mut hints = subscriber.subscribe(&[partition()]);
    arrive(&mut hints).await;
    one.stop_server(StopMode::Immediate).await.unwrap();
    // Also where it does not know yet that it has to go there.
    let well = async || {
        let there = subscribed_channels(two.port()).await == 2;
        there && subscriber.health(NodeId::new(1).unwrap()).is_ok()
    };
    eventually("it listens to the other one", SOON, well).await;
    suite.check().await.unwrap();
}

/// Who only listens must not depend on which of the servers is the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_dead_from_the_beginning_is_passed_over() {
    let (dead, alive) = (Redis::builder().start().await.unwrap(), start().await.0);
    dead.stop_server(StopMode::Immediate).await.unwrap();
    for order in [[dead.port(), alive.port()], [alive.port(), dead.port()]] {
        let url = format!("redis://127.0.0.1:{},127.0.0.1:{}", order[0], order[1]);
        let notifier = RedisNotifier::new(&url, "x").unwrap();
        arrive(&mut notifier.subscribe(&[partition()])).await;
    }
}

/// Where the tasks end, hints do not arrive, and the next use begins anew.
#[test]
fn a_runtime_that_ends_and_a_shutdown_are_noticed() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let servers = runtime();
    let redis = servers.block_on(Redis::builder().start()).unwrap();
    let notifier = RedisNotifier::new(&redis.url(), "x").unwrap();
    // Outside of a runtime nothing can be sent, and nobody panics. A task that never ran has ended too.
    notifier.publish(&[partition()]);
    let node = partition().node();
    for _ in 0..2 {
        let mut hints = None;
        runtime().block_on(async {
            let mut subscribed = notifier.subscribe(&[partition()]);
            arrive(&mut subscribed).await;
            notifier.publish(&[partition()]);
            hears(&mut subscribed, partition()).await;
            hints = Some(subscribed);
        });
        assert!(!notifier.health(node).is_ok());
    }
    runtime().block_on(async {
        let mut hints = notifier.subscribe(&[partition()]);
        arrive(&mut hints).await;
        notifier.shutdown().await;
        interrupted(&mut hints).await;
        assert!(notifier.health(node).error.is_some());
        notifier.publish(&[partition()]);
        let _late = notifier.subscribe(&[partition()]);
        assert!(!notifier.health(node).is_ok());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_are_asked_where_the_master_is() {
    let master = Redis::builder().start().await.unwrap();
    let sentinel = Sentinel::start("hints", master.port()).await;
    let url = format!("redis+sentinel://127.0.0.1:{}/hints", sentinel.port);
    let suite = suite_at(&url);
    suite.check().await.unwrap();
    // Another master, as after a failover.
    let next = Redis::builder().start().await.unwrap();
    let mut by_hand = ByHand::connect(sentinel.port).await;
    let notifier = RedisNotifier::new(&url, "suite").unwrap();
    let mut hints = notifier.subscribe(&[partition()]);
    arrive(&mut hints).await;
    assert_eq!(by_hand.say("SENTINEL REMOVE hints").await, "+OK");
    let monitor = format!("SENTINEL MONITOR hints 127.0.0.1 {} 1", next.port());
    assert_eq!(by_hand.say(&monitor).await, "+OK");
    master.stop_server(StopMode::Immediate).await.unwrap();
    interrupted(&mut hints).await;
    arrive(&mut hints).await;
    notifier.publish(&[partition()]);
    hears(&mut hints, partition()).await;
    assert!(subscribed_channels(next.port()).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_last_goes_out_at_a_shutdown() {
    let (redis, _) = start().await;
    let subscriber = RedisNotifier::new(&redis.url(), "x").unwrap();
    let mut hints = subscriber.subscribe(&[partition()]);
    arrive(&mut hints).await;
    let mut heard = 0;
    for _ in 0..20 {
        let publisher = RedisNotifier::new(&redis.url(), "x").unwrap();
        publisher.publish(&[partition()]);
        let began = Instant::now();
        publisher.shutdown().await;
        // What takes a second is not waited for.
        if began.elapsed() < SECOND {
            hears(&mut hints, partition()).await;
            heard += 1;
        }
    }
    assert!(heard > 10, "{heard}");
}

/// A notifier that can't be reached keeps nobody from leaving.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_does_not_wait_for_a_server_that_hangs() {
    let (redis, _) = start().await;
    signal(redis.pid().unwrap(), "STOP").await;
    let notifier = RedisNotifier::new(&redis.url(), "x").unwrap();
    notifier.publish(&[partition()]);
    let began = Instant::now();
    notifier.shutdown().await;
    assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
    signal(redis.pid().unwrap(), "CONT").await;
}
