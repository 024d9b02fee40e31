//! Many processes that append to the same 16 partitions, each commit carrying several: no convoy may
//! form, in which whoever has a lock waits for another. With 1, 16 and 64 processes in turns, each slice
//! a second.

use std::process::Stdio;
use std::time::Duration;

use futures_util::future::join_all;
use shardmq::{Cluster, Message, Producer, TopicOptions};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use crate::Size;
use crate::spread::Spread;

/// The variable that makes a process one of the many: where the control database is.
pub(crate) const CHILD: &str = "SHARDMQ_BENCH_CONVOY_URL";
const PARTITIONS: usize = 16;
/// Messages that each process keeps under way, each in a task that awaits it.
const TASKS: usize = 16;

/// One of the many: sends for as long as each line of stdin says, in milliseconds, and prints how many
/// messages were acknowledged.
pub(crate) async fn child(url: &str) {
    let cluster = Cluster::builder(url).upkeep(false).connect().await.unwrap();
    let producer = cluster.producer("convoy").build().await.unwrap();
    send(&producer, Duration::ZERO).await;
    println!("0");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let slice = Duration::from_millis(line.parse().unwrap());
        println!("{}", send(&producer, slice).await);
    }
}

/// Sends at least one message from each task.
async fn send(producer: &Producer, slice: Duration) -> u64 {
    let until = Instant::now() + slice;
    let tasks = (0..TASKS).map(|_| {
        let producer = producer.clone();
        tokio::spawn(async move {
            let mut sent = 0;
            while sent == 0 || Instant::now() < until {
                producer.send(Message::new(vec![b'x'; 100])).await.unwrap();
                sent += 1;
            }
            sent
        })
    });
    join_all(tasks).await.into_iter().map(Result::unwrap).sum()
}

struct Process {
    _child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(url: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(CHILD, url).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { _child: child, stdin, stdout: BufReader::new(stdout).lines() }
    }

    async fn answer(&mut self) -> u64 {
        self.stdout.next_line().await.unwrap().unwrap().parse().unwrap()
    }

    async fn work(&mut self, slice: Duration) -> u64 {
        let line = format!("{}\n", slice.as_millis());
        self.stdin.write_all(line.as_bytes()).await.unwrap();
        self.answer().await
    }
}

pub(crate) async fn measure(size: Size) {
    let (counts, rounds, slice) = match size {
        Size::Small => ([1, 2, 4], 2, Duration::from_millis(100)),
        Size::Whole => ([1, 16, 64], 20, Duration::from_secs(1)),
    };
    let server = crate::server(500).await;
    let (cluster, url) = crate::cluster(&[&server]).await;
    cluster.create_topic("convoy", TopicOptions::partitions(PARTITIONS)).await.unwrap();
    let most = counts.into_iter().max().unwrap_or(1);
    let mut processes: Vec<Process> = (0..most).map(|_| Process::start(&url)).collect();
    join_all(processes.iter_mut().map(Process::answer)).await;
    let mut rates = counts.map(|_| Vec::new());
    for round in 0..rounds {
        for turn in 0..counts.len() {
            let index = (round + turn) % counts.len();
            let began = Instant::now();
            let working = processes.iter_mut().take(counts[index]).map(|p| p.work(slice));
            let sent: u64 = join_all(working).await.into_iter().sum();
            rates[index].push(sent as f64 / began.elapsed().as_secs_f64());
        }
    }
    println!("convoy: {PARTITIONS} partitions, {TASKS} messages under way in each process");
    for (count, rate) in counts.iter().zip(&rates) {
        let ratios = rate.iter().zip(&rates[0]).map(|(rate, one)| rate / one).collect();
        let per_s = Spread::of(rate.clone()).quantile(0.5);
        let ratio = Spread::of(ratios).text();
        println!("  {count:>2} processes: {per_s:>7.0} messages/s, to those of one: {ratio}");
    }
    drop(processes);
    cluster.shutdown().await;
    server.stop().await.unwrap();
}
