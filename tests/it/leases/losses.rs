//! A partition that is lost: who had it is told once, what was in hand is void, and it is taken
//! again.

use std::time::Duration;

use shardmq::{ErrorKind, PartitionId};
use tokio_postgres::Client;

use super::{SECOND, SOON, consumer, owned};
use crate::support::reading::{append_texts, cursor, next, next_error, next_text, take};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, eventually, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_comes_after_the_loss_was_noticed_still_tells_of_it() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..3).await;
    let builder = consumer(&test.cluster).flush_interval(60 * SECOND);
    let mut messages = builder.stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    take_away(&sql, partition).await;
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::LeaseLost);
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    // Told once.
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

/// The flush under way covers one of the two, and is told; the next one covers both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_during_a_flush_is_told_by_the_next_one_too() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..3).await;
    let builder = consumer(&test.cluster).flush_interval(60 * SECOND).lease(60 * SECOND);
    let mut messages = builder.stream().await.unwrap();
    let mut in_hand = take(&mut messages, 2).await;
    let second = in_hand.pop().unwrap();
    in_hand.pop().unwrap().ack().unwrap();
    let mut thief = test.sql(0).await;
    let open = thief.transaction().await.unwrap();
    open.batch_execute("select from shardmq.cursor for update").await.unwrap();
    let handle = messages.handle();
    let first_flush = tokio::spawn(async move { handle.flush().await });
    let tries = "select count(*) > 0 from pg_stat_activity
                  where datname = current_database() and application_name = 'shardmq'
                    and query_start > $1 and query = 'commit'";
    let now: std::time::SystemTime =
        sql.query_one("select clock_timestamp()", &[]).await.unwrap().get(0);
    let tried = async || sql.query_one(tries, &[&now]).await.unwrap().get::<_, bool>(0);
    eventually("the flush passes the locked row over", SOON, tried).await;
    second.ack().unwrap();
    open.batch_execute("update shardmq.cursor set owner = gen_random_uuid(), epoch = epoch + 1")
        .await
        .unwrap();
    open.commit().await.unwrap();
    let told = within(SOON, "the flush under way", first_flush).await.unwrap();
    assert_eq!(told.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

/// Gives a partition to a member whose lease has ended, as if one had taken it and died.
async fn take_away(sql: &Client, partition: PartitionId) {
    sql.execute(
        "update shardmq.cursor set member = gen_random_uuid(), owner = gen_random_uuid(), epoch = epoch + 1
          where partition = $1",
        &[&number(partition)],
    )
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_member_left_is_taken_again_and_counted_once() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 4).await;
    let messages = consumer(&test.cluster).stream().await.unwrap();
    let handle = messages.handle();
    for _ in 0..3 {
        eventually("all are held", SOON, async || {
            handle.held_partitions() == 4 && owned(&sql).await == [4]
        })
        .await;
        for partition in &partitions[..3] {
            take_away(&sql, *partition).await;
        }
        eventually("they are taken again", SOON, async || owned(&sql).await == [4]).await;
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(handle.held_partitions(), 0);
    assert!(owned(&sql).await.is_empty());
}

/// Taken again before a renewal has shown that it was lost: what was in hand is void all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_lost_freed_and_taken_again_voids_what_was_in_hand() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 2).await[0];
    append_texts(&sql, partition, ["again"]).await;
    // Renewed every three seconds; with the other partition in a living hand it tries for more each
    // second.
    let mut messages = consumer(&test.cluster).lease(10 * SECOND).stream().await.unwrap();
    eventually("it has both", SOON, async || messages.handle().held_partitions() == 2).await;
    let mut in_hand = next(&mut messages).await;
    sql.batch_execute(
        "insert into shardmq.member select gen_random_uuid(), 'g', now() + interval '1 hour', 3600;
         update shardmq.cursor set epoch = epoch + 1, owner = gen_random_uuid(),
                member = (select member from shardmq.member order by leased_until desc limit 1)
          where partition = 10102",
    )
    .await
    .unwrap();
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::LeaseLost);
    for _ in 0..4 {
        let free = "update shardmq.cursor set member = null, owner = null, epoch = epoch + 1
                     where partition = 10101";
        sql.batch_execute(free).await.unwrap();
        let again = loop {
            match within(SOON, "it comes again", messages.next()).await.unwrap() {
                Ok(delivery) => break delivery,
                Err(error) => assert_eq!(error.kind(), ErrorKind::LeaseLost),
            }
        };
        let old = std::mem::replace(&mut in_hand, again);
        assert_eq!(old.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    drop(in_hand);
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, 0, "none of them counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_taken_in_a_statement_whose_answer_was_lost_is_released() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let one = consumer(&test.cluster).partitions([partitions[0]]).stream().await.unwrap();
    eventually("it has its partition", SOON, async || owned(&sql).await == [1]).await;
    sql.batch_execute(
        "update shardmq.cursor c set member = o.member, owner = gen_random_uuid(), epoch = c.epoch + 1
           from shardmq.cursor o where o.member is not null and c.member is null",
    )
    .await
    .unwrap();
    append_texts(&sql, partitions[1], ["here"]).await;
    let mut other = consumer(&test.cluster).partitions([partitions[1]]).stream().await.unwrap();
    assert_eq!(next_text(&mut other).await, "here");
    one.shutdown(SECOND).await.unwrap();
    other.shutdown(Duration::ZERO).await.unwrap();
}
