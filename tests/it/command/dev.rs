//! Private servers that live until a signal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use shardmq::embedded::Binaries;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use super::{LONG, command, finish, payload, run, run_with};
use crate::support::redis::ByHand;
use crate::support::signals::signal;
use crate::support::{client, eventually, within};

/// A running `dev --json`, and what it printed.
struct Dev {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    ready: Value,
}

impl Dev {
    async fn start(nodes: u8) -> Self {
        Self::start_with(&format!("--nodes {nodes}")).await
    }

    async fn start_with(arguments: &str) -> Self {
        let mut child = command("", &format!("dev {arguments} --json")).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = within(LONG, "the servers are ready", stdout.next_line()).await;
        let ready = serde_json::from_str(&line.unwrap().unwrap()).unwrap();
        Self { child, stderr, ready }
    }

    fn control_url(&self) -> &str {
        self.ready["control_url"].as_str().unwrap()
    }

    fn nodes(&self) -> &[Value] {
        self.ready["nodes"].as_array().unwrap()
    }

    fn data_dirs(&self) -> Vec<PathBuf> {
        self.nodes().iter().map(|node| node["data_dir"].as_str().unwrap().into()).collect()
    }

    async fn reported(&mut self, text: &str) {
        loop {
            let line = within(LONG, text, self.stderr.next_line()).await;
            if line.unwrap().unwrap().contains(text) {
                return;
            }
        }
    }

    /// Sends a signal, and checks that nothing is left.
    async fn ends(mut self, name: &str) {
        let folders = self.data_dirs();
        signal(self.child.id().unwrap(), name).await;
        let status = within(LONG, "the end of dev", self.child.wait()).await.unwrap();
        assert_eq!(status.code(), Some(0));
        for folder in folders {
            assert!(!folder.exists(), "{}", folder.display());
            assert!(!serves(&folder), "{}", folder.display());
        }
    }
}

/// Whether some process works in this folder, as each of a server's does.
fn serves(folder: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .map(|process| process.path().join("cwd"))
        .any(|link| std::fs::read_link(link).is_ok_and(|cwd| cwd.starts_with(folder)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_work_on_three_nodes_until_a_signal_ends_them() {
    let dev = Dev::start(3).await;
    let keys: Vec<&String> = dev.ready.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["control_url", "nodes"]);
    for (node, number) in dev.nodes().iter().zip(1..) {
        assert_eq!(node["node"], number);
        assert!(node["pid"].as_u64().unwrap() > 0);
        let connection = client(node["url"].as_str().unwrap()).await;
        let row = connection.query_one("select count(*) from shardmq.partition", &[]).await;
        assert_eq!(row.unwrap().get::<_, i64>(0), 0);
    }
    let url = dev.control_url();
    let client = client(url).await;
    let fsync: String = client.query_one("show fsync", &[]).await.unwrap().get(0);
    assert_eq!(fsync, "on");
    client.query("select from shardmq_log.migration", &[]).await.unwrap();

    run(url, "topic create orders --partitions 6").await.good();
    let lines: Vec<String> = (0..1_000).map(|n| format!("order {n:04}")).collect();
    run_with(url, "produce orders", lines.join("\n").as_bytes()).await.good();
    let consumed = run(url, "consume orders --group g").await.good();
    let mut payloads: Vec<Vec<u8>> = consumed.json().iter().map(payload).collect();
    payloads.sort_unstable();
    assert!(payloads.iter().zip(&lines).all(|(out, line)| out == line.as_bytes()));
    assert_eq!(payloads.len(), lines.len());
    dev.ends("TERM").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_reported_and_the_others_go_on() {
    let mut dev = Dev::start(2).await;
    let pid = dev.nodes()[1]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), "KILL").await;
    dev.reported("node 02: its server has ended (signal: 9").await;
    run(dev.control_url(), "topic create orders --partitions 1 --nodes 1").await.good();
    run_with(dev.control_url(), "produce orders", b"still here").await.good();
    // Reaped: no zombie is left of it.
    assert!(!Path::new(&format!("/proc/{pid}/cwd")).exists());
    dev.ends("INT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_started_again_from_outside_ends_too() {
    let mut dev = Dev::start(1).await;
    let folder = dev.data_dirs().remove(0);
    pg_ctl(&folder, "stop -m immediate -w").await;
    dev.reported("node 01: its server has ended").await;
    pg_ctl(&folder, "start -w -l /dev/null").await;
    dev.reported("node 01: a server runs again").await;
    let url = dev.control_url().to_owned();
    eventually("the same node is back", Duration::from_secs(20), || async {
        run(&url, "topic list").await.code == Some(0)
    })
    .await;
    dev.ends("TERM").await;
}

/// As the user that the folder belongs to, since Postgres refuses to run as root.
async fn pg_ctl(folder: &Path, arguments: &str) {
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::metadata(folder).unwrap();
    let mut command = Command::new(Binaries::find().unwrap().dir().join("pg_ctl"));
    command.arg("-D").arg(folder).args(arguments.split_whitespace()).current_dir("/");
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    if owner.uid() != std::fs::metadata("/proc/self").unwrap().uid() {
        command.uid(owner.uid()).gid(owner.gid());
    }
    let status = within(LONG, "pg_ctl", command.status()).await.unwrap();
    assert!(status.success(), "pg_ctl {arguments}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_redis_hints_go_through_it_and_its_end_is_reported() {
    let mut dev = Dev::start_with("--redis").await;
    let redis = dev.ready["redis_url"].as_str().unwrap().to_owned();
    let url = dev.control_url().to_owned();
    let run = async |arguments: &str| {
        let mut command = command(&url, arguments);
        finish(command.env("SHARDMQ_REDIS_URL", &redis).spawn().unwrap()).await
    };
    let shown = run("notifier show --json").await.good().json();
    assert_eq!(shown[0]["notifier"], json!("redis"));
    assert_eq!(shown[0]["nodes"][0]["hints"], "ok");
    run("topic create orders --partitions 2").await.good();
    run_with(&url, "produce orders", b"through Redis").await.good();
    run("consume orders --group g --count 1").await.good();
    let (password, at) = redis.strip_prefix("redis://:").unwrap().split_once('@').unwrap();
    let port = at.trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap();
    let mut by_hand = ByHand::connect(port).await;
    assert!(by_hand.say("PING").await.starts_with("-NOAUTH"));
    assert_eq!(by_hand.say(&format!("AUTH {password}")).await, "+OK");
    by_hand.send(b"SHUTDOWN NOSAVE\r\n").await;
    dev.reported("Redis has ended").await;
    let shown = run("notifier show").await;
    assert_eq!(shown.code, Some(1), "{}", shown.stderr);
    run_with(&url, "produce orders", b"without").await.good();
    run("consume orders --group g --count 1").await.good();
    dev.ends("INT").await;
}
