//! What notifying costs: commits of 16 producers, in one process and in 16, each with one message at a time, with
//! `LISTEN/NOTIFY` and without; and what consumers cost that have nothing to do, by notifier.

use std::time::Duration;

use futures_util::future::join_all;
use shardmq::embedded::{Redis, Server};
use shardmq::notifier::NotifierKind;
use shardmq::{Cluster, Message, Messages, Producer, TopicOptions};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::Size;
use crate::spread::Spread;

const PRODUCERS: usize = 16;
/// Of which idle consumers have some.
const PARTITIONS: usize = 80;
/// Clock ticks of a second, as the kernel counts the time of processes.
const TICKS: f64 = 100.0;

struct Plan {
    pairs: usize,
    slice: Duration,
    consumers: &'static [usize],
    idle: Duration,
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn process(url: &str, kind: NotifierKind, redis: &Redis, interval: Duration) -> Cluster {
    let builder = Cluster::builder(url).upkeep(false).notifier_kind(kind).hint_interval(interval);
    builder.redis_url(&redis.url()).connect().await.unwrap()
}

/// Messages a second of all together.
async fn sent(producers: &[Producer], slice: Duration) -> f64 {
    let began = Instant::now();
    let all = producers.iter().map(|producer| async {
        let mut sent = 0;
        while began.elapsed() < slice {
            producer.send(Message::new("x")).await.unwrap();
            sent += 1;
        }
        sent
    });
    let sent: i32 = join_all(all).await.into_iter().sum();
    f64::from(sent) / began.elapsed().as_secs_f64()
}

/// Of so many processes with so many producers each.
async fn commits(
    url: &str,
    redis: &Redis,
    plan: &Plan,
    (processes, each): (usize, usize),
    interval: Duration,
) {
    let listener = connect(&url.replace("/control", "/node")).await;
    listener.batch_execute("listen shardmq").await.unwrap();
    let mut sides = Vec::new();
    for kind in [NotifierKind::Postgres, NotifierKind::None] {
        let mut producers = Vec::new();
        for _ in 0..processes {
            let cluster = process(url, kind, redis, interval).await;
            for _ in 0..each {
                producers.push(cluster.producer("commits").build().await.unwrap());
            }
        }
        sent(&producers, plan.slice).await;
        sides.push(producers);
    }
    let (mut rates, mut ratios) = (Vec::new(), Vec::new());
    for pair in 0..plan.pairs {
        // In turns, and each first in turns.
        let first = sent(&sides[pair % 2], plan.slice).await;
        let second = sent(&sides[1 - pair % 2], plan.slice).await;
        let (on, off) = if pair % 2 == 0 { (first, second) } else { (second, first) };
        rates.push(on);
        ratios.push(on / off);
    }
    println!(
        "notify: {processes} processes of {each} producers, a message at a time: {:.0} messages/s with \
         notifications {interval:?} apart",
        Spread::of(rates).quantile(0.5)
    );
    println!("  to those without: {}", Spread::of(ratios).text());
}

/// Seconds of processor time of a process; with those of its children that are there.
fn cpu(pid: u32, with_children: bool) -> f64 {
    let time = |stat: &str| {
        let rest = stat.rsplit_once(") ").map_or("", |parts| parts.1);
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |at: usize| fields.get(at).and_then(|f| f.parse::<u32>().ok()).unwrap_or(0);
        (number(1), f64::from(number(11) + number(12)))
    };
    let mut all = 0.0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(of) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let (parent, ticks) = time(&stat);
        if of == pid || with_children && parent == pid {
            all += ticks / TICKS;
        }
    }
    all
}

async fn idle(server: &Server, url: &str, redis: &Redis, plan: &Plan) {
    let sql = connect(&server.url("postgres")).await;
    let count = "select sum(xact_commit + xact_rollback)::float8 from pg_stat_database";
    let transactions = async || sql.query_one(count, &[]).await.unwrap().get::<_, f64>(0);
    for kind in [NotifierKind::Postgres, NotifierKind::Redis, NotifierKind::None] {
        for count in plan.consumers {
            let mut consumers: Vec<(Cluster, Messages)> = Vec::new();
            for _ in 0..*count {
                let cluster = process(url, kind, redis, Duration::ZERO).await;
                let messages = cluster.consumer("idle", &format!("{kind}-{count}"));
                consumers.push((cluster, messages.stream().await.unwrap()));
            }
            let held =
                || consumers.iter().map(|(_, m)| m.handle().held_partitions()).sum::<usize>();
            while held() < PARTITIONS {
                sleep(Duration::from_millis(100)).await;
            }
            // The statistics of others come with a delay.
            sleep(plan.idle / 3).await;
            let of_server = || cpu(server.pid().unwrap(), true);
            let before = (transactions().await, of_server(), cpu(std::process::id(), false));
            sleep(plan.idle).await;
            let after = (transactions().await, of_server(), cpu(std::process::id(), false));
            let per_s = |before: f64, after: f64| (after - before) / plan.idle.as_secs_f64();
            println!(
                "  {count} idle consumers of {PARTITIONS} partitions by {kind}: {:.1} transactions/s, {:.2} % of a processor \
                 in the server, {:.2} % in the consumers",
                per_s(before.0, after.0),
                per_s(before.1, after.1) * 100.0,
                per_s(before.2, after.2) * 100.0,
            );
            for (cluster, messages) in consumers {
                messages.shutdown(Duration::from_secs(1)).await.unwrap();
                cluster.shutdown().await;
            }
        }
    }
}

pub(crate) async fn measure(size: Size) {
    let plan = match size {
        Size::Small => Plan {
            pairs: 1,
            slice: Duration::from_millis(100),
            consumers: &[2],
            idle: Duration::from_millis(300),
        },
        Size::Whole => Plan {
            pairs: 30,
            slice: Duration::from_secs(1),
            consumers: &[1, 100],
            idle: Duration::from_secs(30),
        },
    };
    let (server, redis) = (crate::server(600).await, Redis::builder().start().await.unwrap());
    // Of its own, so that who listens to the topology is not woken by every hint.
    let (cluster, url) = crate::cluster_by(&[&server], Some("control")).await;
    cluster.create_topic("commits", TopicOptions::partitions(16)).await.unwrap();
    commits(&url, &redis, &plan, (1, PRODUCERS), Duration::ZERO).await;
    for interval in [0, 20] {
        let interval = Duration::from_millis(interval);
        commits(&url, &redis, &plan, (PRODUCERS, 1), interval).await;
    }
    cluster.delete_topic("commits", true).await.unwrap();
    cluster.create_topic("idle", TopicOptions::partitions(PARTITIONS)).await.unwrap();
    idle(&server, &url, &redis, &plan).await;
    server.stop().await.unwrap();
}
