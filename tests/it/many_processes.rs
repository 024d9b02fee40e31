//! Many processes that append to one partition, while another ends their connections at random.

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use shardmq::{Cluster, Message, MessageId};
use tokio::process::{Child, Command};

use crate::support::stored::{assert_acknowledged, assert_dense, number, stored, topic};
use crate::support::{TestCluster, within};

const PROCESSES: usize = 8;
const MESSAGES: usize = 300;
/// What a child is to do: the cluster's URL, its own name, and where it writes what was acknowledged.
const TASK: &str = "SHARDMQ_TEST_APPEND";

/// Not a test by itself: what the processes of the test below run.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn process() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    let [url, name, file] = task.split(' ').collect::<Vec<_>>().try_into().unwrap();
    // These, unlike sends, are the caller's to repeat.
    let producer = loop {
        if let Ok(cluster) = Cluster::connect(url).await {
            let builder = cluster.producer("orders");
            let builder = builder.send_timeout(Duration::from_secs(40));
            if let Ok(producer) = builder.build().await {
                break producer;
            }
        }
    };
    let mut out = std::fs::File::create(file).unwrap();
    for first in (0..MESSAGES).step_by(5) {
        let texts: Vec<String> = (first..first + 5).map(|n| format!("{name}-{n}")).collect();
        let mut messages = Vec::new();
        for text in &texts {
            messages.push(Message::new(text.clone()).key(name));
        }
        let ids = producer.send_all(messages).await;
        for (text, id) in texts.iter().zip(ids) {
            writeln!(out, "{text} {}", id.unwrap()).unwrap();
        }
    }
}

fn spawn(url: &str, name: usize, file: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["many_processes::process", "--exact", "--nocapture"])
        .env(TASK, format!("{url} {name} {}", file.display()))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

fn acknowledged(file: &Path) -> Vec<(String, MessageId)> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines()
        .map(|line| {
            let (text, id) = line.split_once(' ').unwrap();
            (text.to_owned(), id.parse().unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_whose_connections_are_ended_lose_nothing_and_repeat_nothing() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..PROCESSES).map(|n| folder.path().join(n.to_string())).collect();
    let mut children: Vec<Child> = Vec::new();
    for (name, file) in files.iter().enumerate() {
        children.push(spawn(&test.control_url, name, file));
    }
    let ends = async {
        for child in &mut children {
            assert!(child.wait().await.unwrap().success());
        }
    };
    let kill = "select count(pg_terminate_backend(pid))
        from (select pid from pg_stat_activity
               where datname = current_database() and application_name = 'shardmq'
                 and pid <> pg_backend_pid() order by random() limit 2) b";
    let last = "select coalesce(shardmq.last_id($1), 0) % 100000000";
    let (mut killed, mut at) = (0, 0);
    // By progress, and not by time: on a busy machine nothing would live long enough to do anything.
    let kills = async {
        loop {
            let stored: i64 = sql.query_one(last, &[&number(partition)]).await.unwrap().get(0);
            if stored >= at {
                killed += sql.query_one(kill, &[]).await.unwrap().get::<_, i64>(0);
                at = stored + 10;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let all_end = async {
        tokio::select! { () = ends => {}, () = kills => {} }
    };
    within(Duration::from_secs(45), "the processes' end", all_end).await;

    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!(all.len(), PROCESSES * MESSAGES, "after {killed} kills");
    assert!(killed > 10);
    for file in files {
        let acknowledged = acknowledged(&file);
        assert_eq!(acknowledged.len(), MESSAGES);
        assert!(acknowledged.is_sorted_by_key(|(_, id)| *id), "order of a process");
        assert_acknowledged(&all, &acknowledged);
    }
}
