//! A cluster that was restored from a dump is found out, and becomes one of its own, or the cluster
//! itself.

use std::time::Duration;

use shardmq::{Cluster, ErrorKind, Message, NodeId};

use crate::support::reading::next_text;
use crate::support::stored::topic;
use crate::support::{TestCluster, client, eventually, shared_server};

const SOON: Duration = Duration::from_secs(20);
const SECOND: Duration = Duration::from_secs(1);

fn node(number: u8) -> NodeId {
    NodeId::new(number).unwrap()
}

/// Copies a database that nobody uses, to one of this name.
async fn copy(url: &str, suffix: &str) -> String {
    let (server, name) = url.rsplit_once('/').unwrap();
    let admin = client(&shared_server().await.url("postgres")).await;
    let end =
        format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'");
    let create = format!("create database \"{name}_{suffix}\" template \"{name}\"");
    let copied = async || {
        admin.batch_execute(&end).await.unwrap();
        admin.batch_execute(&create).await.is_ok()
    };
    eventually("the copy", SOON, copied).await;
    format!("{server}/{name}_{suffix}")
}

async fn texts(url: &str, group: &str, count: usize) -> Vec<String> {
    let cluster = Cluster::builder(url).upkeep(false).connect().await.unwrap();
    let mut messages = cluster.consumer("orders", group).stream().await.unwrap();
    let mut texts = Vec::new();
    for _ in 0..count {
        texts.push(next_text(&mut messages).await);
    }
    messages.shutdown(SECOND).await.unwrap();
    cluster.shutdown().await;
    texts.sort();
    texts
}

async fn send(url: &str, text: &str) -> shardmq::Result<()> {
    let cluster = Cluster::builder(url).upkeep(false).connect().await?;
    let sent = async {
        let producer = cluster.producer("orders").send_timeout(SOON).build().await?;
        producer.send(Message::new(text.to_owned()).key("k")).await?;
        producer.shutdown(SECOND).await
    };
    let sent = sent.await;
    cluster.shutdown().await;
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_refused_until_it_is_adopted_and_leaves_the_original_alone() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 2).await;
    send(&test.control_url, "both").await.unwrap();
    test.cluster.shutdown().await;
    let one = copy(&test.node_urls[0], "adopted").await;
    let two = copy(&test.node_urls[1], "adopted").await;
    let error = Cluster::connect(&one).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let says = |word| error.to_string().contains(word);
    assert!(says("shardmq cluster adopt") && says("shardmq cluster moved"), "{error}");
    let half = shardmq::adopt(&one, &[(node(1), one.clone())]).await.unwrap_err();
    assert_eq!(half.kind(), ErrorKind::Invalid, "{half}");
    let wrong = [(node(1), one.clone()), (node(2), test.node_urls[1].clone())];
    let wrong = shardmq::adopt(&one, &wrong).await.unwrap_err();
    assert!(
        wrong.kind() == ErrorKind::Conflict && wrong.to_string().contains("original"),
        "{wrong}"
    );
    let original = shardmq::adopt(&test.control_url, &[]).await.unwrap_err();
    assert_eq!(original.kind(), ErrorKind::Conflict, "{original}");
    let copies = [(node(1), one.clone()), (node(2), two.clone())];
    let id = shardmq::adopt(&one, &copies).await.unwrap();
    assert_ne!(id, test.cluster.id());
    send(&one, "copy").await.unwrap();
    send(&test.control_url, "original").await.unwrap();
    assert_eq!(texts(&one, "g", 2).await, ["both", "copy"]);
    assert_eq!(texts(&test.control_url, "g", 2).await, ["both", "original"]);
    let adopted = Cluster::connect(&one).await.unwrap();
    let urls: Vec<_> = adopted.nodes().await.unwrap().into_iter().map(|node| node.url).collect();
    assert_eq!((adopted.id(), urls), (id, vec![one, two]));
    adopted.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_takes_the_originals_place_is_refused_until_somebody_says_that_it_has_moved() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 2).await;
    send(&test.control_url, "before").await.unwrap();
    test.cluster.shutdown().await;
    let one = copy(&test.node_urls[0], "moved").await;
    let two = copy(&test.node_urls[1], "moved").await;
    Cluster::connect(&one).await.unwrap_err();
    // Its addresses still lead to the original nodes.
    let done = shardmq::moved(&one).await.unwrap();
    assert_eq!((done.control, done.nodes.len(), done.away.len()), (true, 0, 0));
    let cluster = Cluster::connect(&one).await.unwrap();
    assert_eq!(cluster.id(), test.cluster.id());
    let sql = client(&one).await;
    let lead = "update shardmq_control.node set dsn = case node when 1 then $1 else $2 end";
    sql.execute(lead, &[&one, &two]).await.unwrap();
    let refused = Cluster::connect(&one).await.unwrap().topic("orders").await.unwrap();
    assert!(refused.partitions.iter().all(|p| p.state == "unreachable"), "{refused:?}");
    let done = shardmq::moved(&one).await.unwrap();
    assert_eq!((done.control, done.nodes), (false, vec![node(1), node(2)]));
    send(&one, "after").await.unwrap();
    assert_eq!(texts(&one, "g", 2).await, ["after", "before"]);
    // A single node that has moved is given its address.
    cluster.replace_node(node(2), &test.node_urls[1]).await.unwrap();
    cluster.shutdown().await;
}
