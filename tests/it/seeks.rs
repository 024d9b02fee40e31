//! A group's position is moved under running consumers.

use std::time::Duration;

use shardmq::{Cluster, ConsumerBuilder, ErrorKind, Start};

use crate::support::reading::{append_texts, cursor, next, next_error, take, text, texts_until};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// With the default lease, renewed every three seconds; it never commits by itself.
fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    cluster.consumer("orders", "g").flush_interval(60 * SECOND)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_consumers_are_told_and_go_on_from_there() {
    let test = TestCluster::new(2).await;
    let sql = [test.sql(0).await, test.sql(1).await];
    let partitions = topic(&test, "orders", 2).await;
    for (sql, partition) in sql.iter().zip(&partitions) {
        append_texts(sql, *partition, 0..10).await;
    }
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    // They would see it when they renew their lease, too.
    let mut messages = consumer(&cluster).lease(600 * SECOND).stream().await.unwrap();
    for delivery in take(&mut messages, 20).await {
        delivery.ack().unwrap();
    }
    messages.flush().await.unwrap();
    for _ in 0..3 {
        test.cluster.seek("orders", "g", Start::Earliest, None).await.unwrap();
        let mut again = Vec::new();
        while again.len() < 20 {
            match within(SOON, "all comes again", messages.next()).await.unwrap() {
                Ok(delivery) => again.push(delivery),
                Err(news) => assert_eq!(news.kind(), ErrorKind::Reset, "{}", news.chain()),
            }
        }
        again.into_iter().for_each(|delivery| delivery.ack().unwrap());
        messages.flush().await.unwrap();
    }
    test.cluster.seek("orders", "g", Start::Latest, Some(&partitions[..1])).await.unwrap();
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::Reset);
    messages.shutdown(SECOND).await.unwrap();
}

/// What was acknowledged before, in memory or in hand, moves nothing after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_commit_or_acknowledgement_does_not_undo_it() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let first = append_texts(&sql, partition, 0..10).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    let mut in_hand = take(&mut messages, 10).await;
    let late = in_hand.split_off(8);
    in_hand.drain(..).for_each(|delivery| delivery.ack().unwrap());
    let id = (first + 3).to_string().parse().unwrap();
    test.cluster.seek("orders", "g", Start::Id(id), None).await.unwrap();
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::Reset);
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::Reset);
    for delivery in late {
        assert_eq!(delivery.ack().unwrap_err().kind(), ErrorKind::Reset);
    }
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, first + 2);
    append_texts(&sql, partition, ["end"]).await;
    assert_eq!(texts_until(&mut messages, "end").await, ["3", "4", "5", "6", "7", "8", "9"]);
    // Told again, where the first flush found it itself.
    messages.flush().await.ok();
    messages.shutdown(SECOND).await.unwrap();
    assert!(test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
}

/// Forward over what was fetched and not handed out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_fetched_before_is_not_handed_out_after() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..1_000).await;
    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    let before = cursor(&sql, "g", partition).await.epoch;
    test.cluster.seek("orders", "g", Start::Latest, None).await.unwrap();
    let moved = async || {
        messages.handle().partitions().len() == 1 && {
            let cursor = cursor(&sql, "g", partition).await;
            cursor.reset_epoch == 1 && cursor.epoch == before + 1
        }
    };
    eventually("it is taken again", SOON, moved).await;
    append_texts(&sql, partition, ["new"]).await;
    let seen = loop {
        match within(SOON, "what is new", messages.next()).await.unwrap() {
            Ok(delivery) => break text(&delivery),
            Err(news) => assert_eq!(news.kind(), ErrorKind::Reset),
        }
    };
    assert_eq!(seen, "new");
    // What was acknowledged before was not committed: told once.
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::Reset);
    messages.shutdown(SECOND).await.unwrap();
}
