//! What is said to a Redis by hand, and Sentinels.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::eventually;
use super::guarded::{Guarded, free_port};

/// A connection by hand.
pub struct ByHand(BufReader<TcpStream>);

impl ByHand {
    pub async fn connect(port: u16) -> Self {
        Self(BufReader::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap()))
    }

    /// Says this, and returns the first line of the answer.
    pub async fn say(&mut self, command: &str) -> String {
        self.0.write_all(format!("{command}\r\n").as_bytes()).await.unwrap();
        self.line().await
    }

    pub async fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        line.trim_end().to_owned()
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }
}

/// How many channels somebody is subscribed to.
pub async fn subscribed_channels(port: u16) -> usize {
    let mut redis = ByHand::connect(port).await;
    redis.say("PUBSUB CHANNELS").await.trim_start_matches('*').parse().unwrap()
}

/// A Sentinel that knows one master.
pub struct Sentinel {
    pub port: u16,
    _program: Guarded,
}

impl Sentinel {
    pub async fn start(name: &str, master: u16) -> Self {
        let port = free_port();
        let program = Guarded::start("shardmq-sentinel-", |dir| {
            let file = dir.join("sentinel.conf");
            let config = format!(
                "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {name} 127.0.0.1 {master} 1\n",
                dir.display()
            );
            std::fs::write(&file, config).unwrap();
            vec!["redis-server".into(), file.into(), "--sentinel".into()]
        });
        let up = async || TcpStream::connect(("127.0.0.1", port)).await.is_ok();
        eventually("the Sentinel is up", Duration::from_secs(10), up).await;
        Self { port, _program: program }
    }
}
