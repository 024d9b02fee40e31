//! A topic is known by its id: one that is deleted and made again is another one, and whoever used
//! the one before is told, and disturbs nobody.

use std::time::Duration;

use shardmq::{Cluster, Delivery, Error, ErrorKind, Message, Messages, TopicOptions};

use crate::support::reading::next_text;
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);

/// The last error of a stream, which ends behind it.
async fn last_error(messages: &mut Messages) -> Error {
    let mut last = None;
    while let Some(item) = within(SOON, "the end of the stream", messages.next()).await {
        last = item.err().or(last);
    }
    last.unwrap()
}

async fn consume(cluster: &Cluster, name: &str) -> Messages {
    cluster.consumer(name, "g").stream().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_streams_of_a_topic_that_is_deleted_end_and_say_so() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("x")).await.unwrap();
    let mut messages = consume(&test.cluster, "orders").await;
    assert_eq!(next_text(&mut messages).await, "x");
    let handled = consume(&test.cluster, "orders").await;
    let handled = tokio::spawn(handled.run(2, async |_: Delivery| Ok::<_, String>(())));
    let other = Cluster::connect(&test.control_url).await.unwrap();
    other.delete_topic("orders", true).await.unwrap();
    let error = last_error(&mut messages).await;
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::NotFound, "topic orders was deleted")
    );
    within(SOON, "the end of the handlers", handled).await.unwrap();
    let error = producer.send(Message::new("y")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    other.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_topic_that_is_made_again_consumers_end_and_producers_go_on() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut before = consume(&test.cluster, "orders").await;
    producer.send(Message::new("before")).await.unwrap();
    assert_eq!(next_text(&mut before).await, "before");
    let other = Cluster::connect(&test.control_url).await.unwrap();
    other.delete_topic("orders", true).await.unwrap();
    let made = other.create_topic("orders", TopicOptions::partitions(4)).await.unwrap();
    // It is another process that joins the group: the first is still in it, or not.
    let mut after = consume(&other, "orders").await;
    let error = last_error(&mut before).await;
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().starts_with("topic orders was deleted"), "{error}");
    let goes_on = async || producer.send(Message::new("first").key("k")).await.is_ok();
    eventually("messages go to the topic that there is", SOON, goes_on).await;
    for n in 0..40 {
        let id = producer.send(Message::new(n.to_string()).key(n.to_string())).await.unwrap();
        assert!(made.partitions.iter().any(|p| p.partition == id.partition()));
    }
    producer.flush().await.unwrap();
    producer.shutdown(SECOND).await.unwrap();
    let mut got = 0;
    while got < 41 {
        let batch = within(SOON, "all of them", after.next_batch(100)).await.unwrap().unwrap();
        got += batch.len();
    }
    let assigned = "select version from shardmq_control.assignment";
    let assigned: i64 = test.sql(0).await.query_one(assigned, &[]).await.unwrap().get(0);
    assert!(assigned <= 2, "{assigned} assignments of the group");
    after.shutdown(SECOND).await.unwrap();
    other.shutdown().await;
}

/// As the index has it after its database was restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_control_alone_has_lost_goes_on_and_is_put_back() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 4).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let mut messages = consume(&test.cluster, "orders").await;
    producer.send(Message::new("before")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "before");
    let sql = test.sql(0).await;
    sql.batch_execute("delete from shardmq_control.topic").await.unwrap();
    topic(&test, "others", 1).await;
    assert_eq!(
        test.cluster.consumer("orders", "new").stream().await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    producer.send(Message::new("still")).await.unwrap();
    assert_eq!(next_text(&mut messages).await, "still");
    let error = test.cluster.create_topic("orders", TopicOptions::partitions(4)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("shardmq repair"), "{error}");
    let done = test.cluster.repair().await.unwrap();
    let put_back: Vec<_> = done.put_back.iter().map(ToString::to_string).collect();
    assert_eq!((put_back, done.made.len()), (vec!["orders".to_owned()], 0));
    let known = test.cluster.topic("orders").await.unwrap();
    assert_eq!(known.partitions.iter().map(|p| p.partition).collect::<Vec<_>>(), partitions);
    let again = Cluster::connect(&test.control_url).await.unwrap();
    for n in 0..20 {
        let message = || Message::new("x").key(n.to_string());
        let id = producer.send(message()).await.unwrap();
        let another = again.producer("orders").build().await.unwrap();
        assert_eq!(another.send(message()).await.unwrap().partition(), id.partition());
        another.shutdown(SECOND).await.unwrap();
    }
    assert_eq!(test.cluster.repair().await.unwrap(), shardmq::Repaired::default());
    messages.shutdown(SECOND).await.unwrap();
    again.shutdown().await;
}

/// As it is after a standby was promoted that lacked them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_lost_partitions_still_takes_topics_and_makes_them_again() {
    let test = TestCluster::new(2).await;
    let lost = topic(&test, "lost", 2).await;
    let kept = topic(&test, "kept", 2).await;
    let producer = test.cluster.producer("lost").build().await.unwrap();
    let mut messages = consume(&test.cluster, "lost").await;
    let sql = test.sql(1).await;
    let gone = lost.iter().copied().find(|partition| partition.node().number() == 2).unwrap();
    let here = lost.iter().copied().find(|partition| *partition != gone).unwrap();
    forget(&sql, number(gone)).await;
    let other = topic(&test, "other", 4).await;
    assert!(other.iter().all(|partition| !lost.contains(partition) && !kept.contains(partition)));
    let missing = test.cluster.lag("lost").await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("shardmq repair"), "{missing}");
    let key = (0..).map(|n: u32| n.to_string());
    let key = key.into_iter().find(|key| producer_node(key) == 1).unwrap();
    let error = producer.send(Message::new("x").key(key.as_str())).await.unwrap_err();
    assert!(error.to_string().contains("shardmq repair"), "{error}");
    let done = test.cluster.repair().await.unwrap();
    assert_eq!((done.made.as_slice(), done.put_back.len(), done.freed.len()), (&[gone][..], 0, 0));
    let again = async || producer.send(Message::new("again").key(key.as_str())).await;
    eventually("it takes messages", SOON, async || again().await.is_ok()).await;
    let again = async {
        // What it had of the partition is void first.
        while !matches!(messages.next().await, Some(Ok(_))) {}
    };
    within(SOON, "it is delivered", again).await;
    assert!(here.node().number() == 1 && test.cluster.lag("lost").await.is_ok());
    messages.shutdown(SECOND).await.unwrap();
}

/// Which of two partitions has a key: the slots are divided in halves.
fn producer_node(key: &str) -> usize {
    usize::from(shardmq::key_slot(key) >= 8_192)
}

async fn forget(sql: &tokio_postgres::Client, partition: i32) {
    let tables = "select relname::text from pg_class where relkind = 'r' and relname like $1";
    let tables = sql.query(tables, &[&format!("batch\\_{partition}\\_%")]).await.unwrap();
    for table in tables {
        let name: String = table.get(0);
        sql.batch_execute(&format!("drop table shardmq.{name}")).await.unwrap();
    }
    for table in ["partition", "cursor", "day"] {
        let delete = format!("delete from shardmq.{table} where partition = {partition}");
        sql.batch_execute(&delete).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_that_fails_leaves_nothing_and_a_number_has_nothing_of_its_topic_before() {
    let test = TestCluster::new(2).await;
    let full = "insert into shardmq.partition
                (partition, topic, topic_id, generation, day, topology_version, created_at)
                select n, 'full', gen_random_uuid(), 1, 101, 1, now() from generate_series(10201, 10299) n";
    let (one, two) = (test.sql(0).await, test.sql(1).await);
    two.batch_execute(full).await.unwrap();
    let error = test.cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    let left = "select count(*) from shardmq.partition where state <> 'deleted'";
    assert_eq!(one.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    let retained =
        "update shardmq.partition set retention_days = 1, drop_unread = true, dead_letter_days = 1";
    one.batch_execute(retained).await.unwrap();
    // The number is free at once, and as new.
    let claim = "select shardmq.claim_partitions('orders', gen_random_uuid(), 1, 1, 1, '{}')";
    let claimed: i32 = one.query_one(claim, &[]).await.unwrap().get(0);
    assert_eq!(claimed, 10_101);
    let kept = "select retention_days, drop_unread, dead_letter_days from shardmq.partition
                 where partition = 10101";
    let kept = one.query_one(kept, &[]).await.unwrap();
    assert_eq!((kept.get(0), kept.get(1), kept.get(2)), (7, false, 30));
    // Nobody made this topic in the end.
    let done = test.cluster.repair().await.unwrap();
    assert!(done.freed.iter().any(|partition| number(*partition) == 10_101), "{done:?}");
}
