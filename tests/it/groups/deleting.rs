//! A group is deleted once nobody consumes, on all nodes and in the control database.

use shardmq::ErrorKind;
use tokio_postgres::Client;

use super::{PATIENCE, Ready, SECOND, own};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

/// A consumer that has ended is gone with its lease at last, where it could not say so.
pub async fn deleted(test: &TestCluster) {
    let deleted = async || match test.cluster.delete_group("orders", "g").await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
            false
        }
    };
    eventually("the group is deleted", 2 * PATIENCE, deleted).await;
}

async fn count(sql: &Client, table: &str) -> i64 {
    sql.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0)
}

/// As where it was swept by others while its consumer did not reach the control database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_consumed_and_was_removed_from_control_is_put_back() {
    let ready = Ready::new().await;
    let cluster = &ready.test.cluster;
    let messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let all = async || messages.handle().held_partitions() == ready.partitions.len();
    eventually("all is held", 10 * SECOND, all).await;
    // In one transaction: its members agree again at once.
    ready.sql.batch_execute("begin; delete from shardmq_control.consumer_group").await.unwrap();
    assert_eq!(count(&ready.sql, "shardmq_control.assignment").await, 0);
    ready.sql.batch_execute("commit").await.unwrap();
    let agreed = async || count(&ready.sql, "shardmq_control.assignment").await == 1;
    eventually("its members agree again", 10 * SECOND, agreed).await;
    assert_eq!(count(&ready.sql, "shardmq_control.consumer_group").await, 1);
    assert!(all().await);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_deleted_once_nobody_consumes_and_then_begins_anew() {
    let ready = Ready::new().await;
    let cluster = &ready.test.cluster;
    topic(&ready.test, "other", 1).await;
    let other = cluster.consumer("other", "g").stream().await.unwrap();
    let has = async || other.handle().held_partitions() == 1;
    eventually("the other topic's is held", 10 * SECOND, has).await;

    let messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let error = cluster.delete_group("orders", "g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    messages.shutdown(SECOND).await.unwrap();
    // It joins: control has heard of it, and no node yet.
    let join = "insert into shardmq_control.member (member, topic, group_name, host, pid)
                values (gen_random_uuid(), 'orders', 'g', 'h', 1)";
    ready.sql.batch_execute(join).await.unwrap();
    let error = cluster.delete_group("orders", "g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let leave = "update shardmq_control.member set gone_at = now() where host = 'h'";
    ready.sql.batch_execute(leave).await.unwrap();
    // Its process is not known to control, but the node has its lease.
    own(&ready.sql, ready.partitions[0]).await;
    let error = cluster.delete_group("orders", "g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let cursors = "shardmq.cursor where partition <> 10103";
    assert_eq!(count(&ready.sql, cursors).await, 2, "nothing was deleted");
    let end = "update shardmq.member set leased_until = now()
                from shardmq.cursor c where c.member = member.member and c.partition = 10101";
    ready.sql.batch_execute(end).await.unwrap();

    // The group of that name of another topic neither hinders nor goes.
    deleted(&ready.test).await;
    assert_eq!(count(&ready.sql, cursors).await, 0);
    assert_eq!(count(&ready.sql, "shardmq.cursor").await, 1);
    assert_eq!(count(&ready.sql, "shardmq.group_start").await, 1);
    assert_eq!(count(&ready.sql, "shardmq_control.consumer_group").await, 1);
    let listed = "shardmq_control.member where left_at is null";
    assert_eq!(count(&ready.sql, listed).await, 1);
    other.shutdown(SECOND).await.unwrap();
    for _ in 0..2 {
        let error = cluster.delete_group("orders", "g").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    assert_eq!(ready.rest().await.len(), 12, "from the earliest again");
}
