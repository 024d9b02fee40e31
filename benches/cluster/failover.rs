//! One of two nodes is killed under load, again and again: how long until a message without a key that
//! was sent after the kill is acknowledged, and how long the slowest takes.

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::{Message, NodeState, Producer, TopicOptions};
use tokio::time::Instant;

use crate::Size;
use crate::spread::Spread;

/// Messages under way, each in a task that awaits it.
const TASKS: usize = 32;
/// How long a node stays away, and how long it works before the next kill.
const PHASE: Duration = Duration::from_secs(3);

/// When messages were sent and acknowledged.
type Acks = Arc<Mutex<Vec<(Instant, Instant)>>>;

async fn send(producer: Producer, acks: Acks) {
    loop {
        let began = Instant::now();
        producer.send(Message::new(vec![b'x'; 100])).await.unwrap();
        acks.lock().unwrap().push((began, Instant::now()));
    }
}

#[derive(Default)]
struct Times {
    /// From the kill to the first acknowledgement of a message that was sent after it.
    next: Vec<f64>,
    /// The longest time without any acknowledgement.
    gap: Vec<f64>,
    /// The slowest message that was acknowledged after the kill.
    slowest: Vec<f64>,
}

impl Times {
    fn add(&mut self, killed: Instant, mut acks: Vec<(Instant, Instant)>) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        acks.retain(|(_, acked)| *acked > killed);
        acks.sort_by_key(|(_, acked)| *acked);
        let next = acks.iter().find(|(began, _)| *began > killed).unwrap();
        self.next.push(ms(next.1 - killed));
        let acked: Vec<Instant> = acks.iter().map(|(_, acked)| *acked).collect();
        let before = std::iter::once(&killed).chain(&acked);
        self.gap.push(ms(before.zip(&acked).map(|(a, b)| *b - *a).max().unwrap()));
        self.slowest.push(ms(acks.iter().map(|(began, acked)| *acked - *began).max().unwrap()));
    }
}

pub(crate) async fn measure(size: Size) {
    let kills = if size == Size::Small { 1 } else { 20 };
    let (stays, dies) = (crate::server(100).await, crate::server(100).await);
    let (cluster, _) = crate::cluster(&[&stays, &dies]).await;
    cluster.create_topic("failover", TopicOptions::partitions(8)).await.unwrap();
    let producer = cluster.producer("failover").build().await.unwrap();
    let acks = Acks::default();
    let senders: Vec<_> =
        (0..TASKS).map(|_| tokio::spawn(send(producer.clone(), Arc::clone(&acks)))).collect();
    let mut times = Times::default();
    for _ in 0..kills {
        while producer.status().nodes.iter().any(|node| node.state != NodeState::Up) {
            tokio::time::sleep(PHASE / 30).await;
        }
        tokio::time::sleep(PHASE).await;
        acks.lock().unwrap().clear();
        let pid = dies.pid().unwrap().to_string();
        let killed = Instant::now();
        assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
        dies.exited().await;
        tokio::time::sleep(PHASE).await;
        times.add(killed, std::mem::take(&mut *acks.lock().unwrap()));
        dies.start_server().await.unwrap();
    }
    senders.iter().for_each(tokio::task::JoinHandle::abort);
    println!("failover: one of two nodes killed {kills} times, {TASKS} messages under way; in ms");
    let rows = [
        ("to the next acknowledgement of a message sent after the kill", times.next),
        ("longest time without an acknowledgement", times.gap),
        ("slowest message", times.slowest),
    ];
    for (name, times) in rows {
        let times = Spread::of(times);
        let [p50, p99] = [0.5, 0.99].map(|part| times.quantile(part));
        println!("  {name}: p50 {p50:.1}, p99 {p99:.1}");
    }
    cluster.shutdown().await;
    stays.stop().await.unwrap();
    dies.stop().await.unwrap();
}
