//! In the caller's own transactions, and over restarts.

use std::sync::Arc;

use shardmq::embedded::StopMode;
use tokio_postgres::{Client, Error};
use uuid::Uuid;

use super::{Ready, SECOND, ack, drain, pull, state, take, texts, try_ack, try_pull};
use crate::support::put_back::{put_back, snapshot};
use crate::support::reading::{append_texts, cursor};
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, client, eventually, own_server, within};

const STEP: &str = "with pulled as (select id, payload from shardmq.pull($1, 2, hold => true))
    insert into effect (id, message) select id, convert_from(payload, 'UTF8') from pulled
    returning id";

/// Pulls two messages, does what they say, and acknowledges them; not yet committed. Whether there were any.
async fn step(sql: &Client, token: &str) -> bool {
    try_step(sql, token).await.unwrap()
}

async fn try_step(sql: &Client, token: &str) -> Result<bool, Error> {
    let rows = sql.query(STEP, &[&token]).await?;
    let Some(last) = rows.iter().map(|row| row.get(0)).max() else { return Ok(false) };
    assert!(try_ack(sql, token, last).await?);
    Ok(true)
}

async fn effects(sql: &Client) -> Vec<String> {
    let rows = sql.query("select message from effect order by id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn an_acknowledgement_that_is_rolled_back_with_its_effect_comes_again() {
    let ready = Ready::new(2).await;
    let (sql, partition, me) = (&ready.sql, ready.partitions[0], Uuid::now_v7());
    append_texts(sql, partition, 0..5).await;
    let watch = ready.test.sql(0).await;
    let taken = take(sql, me, 2).await;
    let token = &taken[0].token;
    sql.batch_execute("create table effect (id bigint, message text)").await.unwrap();
    sql.batch_execute("begin").await.unwrap();
    assert!(step(sql, token).await);
    // Others see where the group was, and wait for nothing: leases, takeovers and the other partition go on.
    assert_eq!(pull(&watch, token, 1).await[0].1, "0");
    assert_eq!(take(&watch, me, 2).await, taken);
    assert!(take(&watch, Uuid::now_v7(), 2).await.is_empty());
    append_texts(&watch, ready.partitions[1], ["x"]).await;
    assert_eq!(drain(&watch, &taken[1].token, 1).await, ["x"]);
    sql.batch_execute("rollback").await.unwrap();
    assert!(effects(sql).await.is_empty());
    loop {
        sql.batch_execute("begin").await.unwrap();
        let any = step(sql, token).await;
        sql.batch_execute("commit").await.unwrap();
        if !any {
            break;
        }
    }
    assert_eq!(effects(sql).await, texts(0..5));
    assert!(pull(sql, token, 1).await.is_empty());
}

/// A connection that broke before the answer: its transaction may still be under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repetition_waits_for_the_transaction_whose_answer_was_lost() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    append_texts(sql, partition, 0..3).await;
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    sql.batch_execute("create table effect (id bigint, message text)").await.unwrap();
    sql.batch_execute("begin").await.unwrap();
    assert!(step(sql, &token).await);
    let again = Arc::new(ready.test.sql(0).await);
    let (running, of) = (Arc::clone(&again), token.clone());
    let repetition = tokio::spawn(async move { step(&running, &of).await });
    let watch = ready.test.sql(0).await;
    let waits = "select count(*) from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock'";
    let waits = async || watch.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1;
    eventually("it waits", 10 * SECOND, waits).await;
    sql.batch_execute("commit").await.unwrap();
    assert!(repetition.await.unwrap());
    assert_eq!(effects(&again).await, texts(0..3));
}

/// Consumers that share a group, lose their leases in the middle, and give back when they like.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_consumers_do_each_message_has_one_effect_in_order() {
    let ready = Ready::new(4).await;
    let table = "create table effect (id bigint, message text, nth bigserial)";
    ready.sql.batch_execute(table).await.unwrap();
    let total = 4 * 60;
    let mut workers = Vec::new();
    for nth in 0..4_u128 {
        let sql = ready.test.sql(0).await;
        workers.push(tokio::spawn(async move {
            let me = Uuid::from_u128(nth + 1);
            for round in nth.. {
                for taken in take(&sql, me, 2).await {
                    sql.batch_execute("begin").await.unwrap();
                    let done = try_step(&sql, &taken.token).await;
                    if let Err(error) = done {
                        assert_eq!(error.code().unwrap().code(), "SMQ01", "{error:?}");
                    }
                    let end = if round % 5 == 0 { "rollback" } else { "commit" };
                    sql.batch_execute(end).await.unwrap();
                }
                if round % 7 == 0 {
                    super::give_back(&sql, me).await;
                }
                if effects(&sql).await.len() == total {
                    return;
                }
            }
        }));
    }
    for n in 0..20 {
        for partition in &ready.partitions {
            append_texts(&ready.sql, *partition, 3 * n..3 * n + 3).await;
        }
        // All leases are over.
        ready.clocks.move_server("31 s").await;
    }
    for worker in workers {
        within(20 * SECOND, "all is done", worker).await.unwrap();
    }
    for partition in &ready.partitions {
        let of = "select message from effect where id / 100000000000000 = $1 order by nth";
        let rows = ready.sql.query(of, &[&i64::from(number(*partition))]).await.unwrap();
        let got: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(got, texts(0..60));
    }
}

/// Whoever works with one snapshot: never a wrong answer, perhaps an error.
#[tokio::test]
async fn with_an_old_snapshot_nothing_is_moved_that_was_moved_since() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    append_texts(sql, partition, 0..4).await;
    let token = take(sql, Uuid::now_v7(), 1).await.remove(0).token;
    let other = ready.test.sql(0).await;
    sql.batch_execute("begin isolation level repeatable read").await.unwrap();
    let old = pull(sql, &token, 9).await;
    assert!(ack(&other, &token, old[3].0).await);
    assert_eq!(pull(sql, &token, 9).await, old);
    assert_eq!(state(try_ack(sql, &token, old[1].0).await), "40001");
    sql.batch_execute("rollback").await.unwrap();
    assert_eq!(cursor(sql, "g", partition).await.acked_id, old[3].0);
}

/// A server that comes back without the end of its log has other messages under the same ids.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_pulled_from_a_server_that_lost_it_is_not_acknowledged_on_the_next() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let me = Uuid::now_v7();
    let sql = test.sql(0).await;
    append_texts(&sql, partition, 0..2).await;
    take(&sql, me, 1).await;
    drop(sql);
    let before = snapshot(&server).await;
    let sql = test.sql(0).await;
    let token = take(&sql, me, 1).await.remove(0).token;
    append_texts(&sql, partition, ["lost", "lost"]).await;
    let pulled = pull(&sql, &token, 9).await;
    assert!(ack(&sql, &token, pulled[1].0).await);
    drop(sql);
    put_back(&server, &before).await;
    let sql = client(&test.node_urls[0]).await;
    append_texts(&sql, partition, 2..4).await;
    assert_eq!(state(try_ack(&sql, &token, pulled[3].0).await), "SMQ03");
    assert_eq!(state(try_pull(&sql, &token, 9).await), "SMQ03");
    let token = take(&sql, me, 1).await.remove(0).token;
    assert_eq!(drain(&sql, &token, 3).await, texts(0..4));
    // Started anew with all that it had: to be taken again, and nothing else.
    drop(sql);
    server.restart(StopMode::Fast).await.unwrap();
    let sql = client(&test.node_urls[0]).await;
    append_texts(&sql, partition, 4..5).await;
    assert_eq!(state(try_pull(&sql, &token, 9).await), "SMQ03");
    let token = take(&sql, me, 1).await.remove(0).token;
    assert_eq!(drain(&sql, &token, 3).await, texts(4..5));
}
