//! Nodes that some members reach, or nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{Cluster, ConsumerBuilder};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::reading::{append_texts, next_text};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, own_server, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);

/// With a lease that outlasts a machine that stalls.
fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    cluster.consumer("orders", "g").lease(4 * SECOND).poll_interval(SECOND / 5)
}

/// How many partitions of each node a consumer has.
fn by_node(messages: &shardmq::Messages) -> BTreeMap<u8, usize> {
    let mut counts = BTreeMap::new();
    for (partition, _) in messages.handle().partitions() {
        *counts.entry(partition.node().number()).or_default() += 1;
    }
    counts
}

/// What a member says that it does not reach, and what others should have.
async fn said(control: &Client, member: Uuid) -> (Vec<i32>, Vec<i32>) {
    let said = "select unreachable, avoid from shardmq_control.member where member = $1";
    let row = control.query_one(said, &[&member]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn version(control: &Client) -> i64 {
    let version = "select version from shardmq_control.assignment";
    control.query_one(version, &[]).await.unwrap().get(0)
}

/// Another member, by its row alone.
async fn another(control: &Client, avoid: &[i32]) {
    let insert = "insert into shardmq_control.member
            (member, topic, group_name, host, pid, heartbeat_at, avoid)
     values (gen_random_uuid(), 'orders', 'g', 'elsewhere', 1, now() + interval '1 hour', $1)";
    control.execute(insert, &[&avoid]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_does_not_reach_is_the_others() {
    let test = TestCluster::new(2).await;
    let control = client(&test.control_url).await;
    topic(&test, "orders", 8).await;
    let messages = consumer(&test.cluster).stream().await.unwrap();
    eventually("it has all", SOON, async || by_node(&messages) == [(1, 4), (2, 4)].into()).await;
    another(&control, &[2]).await;
    let all_of_two = async || by_node(&messages) == [(2, 4)].into();
    eventually("all of the node, and no more than its share", SOON, all_of_two).await;
    // Now it is the other node: whatever was kept so far goes.
    control
        .batch_execute("update shardmq_control.member set avoid = '{1}' where pid = 1")
        .await
        .unwrap();
    let all_of_one = async || by_node(&messages) == [(1, 4)].into();
    eventually("all of the other node, and no more than its share", SOON, all_of_one).await;
    // It says that it reaches the node again: nothing that need not move does.
    control.batch_execute("update shardmq_control.member set avoid = '{}'").await.unwrap();
    another(&control, &[]).await;
    let share = async || by_node(&messages).values().sum::<usize>() == 3;
    eventually("a share of three", SOON, share).await;
    assert_eq!(by_node(&messages), [(1, 3)].into());
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_reaches_stays_where_it_is_and_goes_on_by_itself() {
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let control = client(&test.control_url).await;
    let partitions = topic(&test, "orders", 4).await;
    let clusters = [Cluster::connect(&test.control_url), Cluster::connect(&test.control_url)];
    let [one, two] = clusters;
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    let (mut one, mut two) =
        (consumer(&one).stream().await.unwrap(), consumer(&two).stream().await.unwrap());
    let whole = |messages| by_node(messages).into_values().eq([2]);
    eventually("each has a node", SOON, async || whole(&one) && whole(&two)).await;
    let before = version(&control).await;
    let (held_one, held_two) = (one.handle().partitions(), two.handle().partitions());
    dying.stop_server(StopMode::Immediate).await.unwrap();
    // Whoever has nothing there looks for itself, since the other one says that it does not reach it.
    for member in [one.handle().member(), two.handle().member()] {
        let says = async || said(&control, member).await == (vec![2], vec![2]);
        eventually("both say so", SOON, says).await;
    }
    let sql = test.sql(0).await;
    append_texts(&sql, partitions[0], ["meanwhile"]).await;
    let owner = if by_node(&one).contains_key(&1) { &mut one } else { &mut two };
    assert_eq!(next_text(owner).await, "meanwhile");
    dying.start_server().await.unwrap();
    for member in [one.handle().member(), two.handle().member()] {
        let says = async || said(&control, member).await == (vec![], vec![]);
        eventually("both reach it again", SOON, says).await;
    }
    let sql = test.sql(1).await;
    append_texts(&sql, partitions[2], ["back"]).await;
    let owner = if by_node(&one).contains_key(&2) { &mut one } else { &mut two };
    assert_eq!(next_text(owner).await, "back");
    assert_eq!((one.handle().partitions(), two.handle().partitions()), (held_one, held_two));
    // Computed anew for each that said something, and nothing else came of it.
    assert!(version(&control).await <= before + 8);
    one.shutdown(SECOND).await.unwrap();
    two.shutdown(SECOND).await.unwrap();
}
