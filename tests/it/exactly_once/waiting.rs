//! Flushes and handovers that wait for an open transaction.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_waits_for_a_transaction_stops_nothing_else() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    append_texts(&watch, partitions[0], ["one", "two"]).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let mut hand = take(&mut messages, 2).await;
    let transaction = sql.transaction().await.unwrap();
    let second = hand.remove(1);
    let acknowledged = hand[0].commit_in(&transaction).await.unwrap();
    second.ack().unwrap();
    let handle = messages.handle();
    let flush = tokio::spawn(async move { handle.flush().await });
    // Its node's other work goes on: it looks, commits and answers.
    for sent in 1..=3 {
        append_texts(&watch, partitions[1], [sent]).await;
        next(&mut messages).await.ack().unwrap();
        let committed =
            async || cursor(&watch, "g", partitions[1]).await.acked_id % SEQUENCE == sent;
        eventually("the other partition is committed", SOON, committed).await;
    }
    assert!(!flush.is_finished(), "it waits for the transaction");
    transaction.commit().await.unwrap();
    acknowledged.committed();
    within(SOON, "the flush", flush).await.unwrap().unwrap();
    assert_eq!(cursor(&watch, "g", partitions[0]).await.acked_id % SEQUENCE, 2);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_waits_for_too_long_says_what_it_waits_for() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    append_texts(&watch, partition, ["one", "two"]).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let mut hand = take(&mut messages, 2).await;
    let transaction = sql.transaction().await.unwrap();
    let second = hand.remove(1);
    let acknowledged = hand[0].commit_in(&transaction).await.unwrap();
    second.ack().unwrap();
    let error = within(20 * SECOND, "the flush", messages.flush()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error:?}");
    assert!(error.to_string().contains("open transaction"), "{error}");
    transaction.commit().await.unwrap();
    acknowledged.committed();
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_what_is_given_back_only_the_locked_partition_waits() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    append_texts(&watch, partitions[0], ["one", "two"]).await;
    let mut messages = consumer(&test).stream().await.unwrap();
    let handle = messages.handle();
    eventually("it has all", SOON, async || handle.held_partitions() == 3).await;
    let mut hand = take(&mut messages, 2).await;
    let transaction = sql.transaction().await.unwrap();
    let second = hand.remove(1);
    let acknowledged = hand[0].commit_in(&transaction).await.unwrap();
    second.ack().unwrap();
    let ending = tokio::spawn(async move { handle.shutdown(Duration::ZERO).await });
    let free = async || {
        let cursors = cursors(&watch, "g").await;
        cursors.iter().filter(|(_, cursor)| cursor.owner.is_none()).count() == 2
    };
    eventually("the others are free", SOON, free).await;
    transaction.commit().await.unwrap();
    acknowledged.committed();
    let _ = within(SOON, "the shutdown", ending).await.unwrap();
}
