//! Consumers of the library and of SQL in one group.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use uuid::Uuid;

use super::{Ready, SECOND, drain, give_back, pull, state, take, take_over, try_ack};
use crate::support::eventually;
use crate::support::reading::{append_texts, next, next_text, text, texts_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_partition_has_one_owner_and_goes_from_one_kind_to_the_other_and_back() {
    let ready = Ready::new(3).await;
    let (sql, me) = (&ready.sql, Uuid::now_v7());
    let own = take(sql, me, 1).await.remove(0);
    assert_eq!(own.partition, 10_101);
    let mut messages = ready.test.cluster.consumer("orders", "g").stream().await.unwrap();
    let handle = messages.handle();
    eventually("it has the others", 10 * SECOND, async || handle.held_partitions() == 2).await;
    assert_eq!(take(sql, me, 99).await, std::slice::from_ref(&own));
    let mut sent = BTreeSet::new();
    for (nth, partition) in ready.partitions.iter().enumerate() {
        append_texts(sql, *partition, (0..6).map(|n| format!("{nth}.{n}"))).await;
        sent.extend((0..6).map(|n| format!("{nth}.{n}")));
    }
    // Half of its own by SQL, then all of the others' by the library.
    let half = pull(sql, &own.token, 3).await;
    assert!(super::ack(sql, &own.token, half[2].0).await);
    let mut got: Vec<String> = half.into_iter().map(|m| m.1).collect();
    while got.len() < 15 {
        let delivery = next(&mut messages).await;
        got.push(text(&delivery));
        delivery.ack().unwrap();
    }
    // Given back: the library goes on where it was.
    assert_eq!(give_back(sql, me).await, 1);
    while got.len() < 18 {
        let delivery = next(&mut messages).await;
        got.push(text(&delivery));
        delivery.ack().unwrap();
    }
    assert_eq!(handle.held_partitions(), 3);
    assert_eq!(state(try_ack(sql, &own.token, own.acked_id).await), "SMQ01");
    assert!(take(sql, me, 99).await.is_empty());
    // And back again.
    messages.shutdown(5 * SECOND).await.unwrap();
    for (nth, partition) in ready.partitions.iter().enumerate() {
        append_texts(sql, *partition, [format!("{nth}.end")]).await;
    }
    for (nth, taken) in take(sql, me, 99).await.iter().enumerate() {
        assert_eq!(drain(sql, &taken.token, 9).await, [format!("{nth}.end")]);
    }
    assert_eq!(got.len(), sent.len());
    assert_eq!(got.into_iter().collect::<BTreeSet<_>>(), sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_take_at_once_each_partition_has_one() {
    let ready = Ready::new(20).await;
    let mut first = BTreeMap::new();
    for round in 0..5 {
        let mut takers = Vec::new();
        for _ in 0..6 {
            let sql = ready.test.sql(0).await;
            takers.push(tokio::spawn(async move {
                let me = Uuid::now_v7();
                for most in [1, 3, 99] {
                    take(&sql, me, most).await;
                }
                (me, take(&sql, me, 99).await)
            }));
        }
        let mut all = BTreeSet::new();
        for (me, taken) in join_all(takers).await.into_iter().map(Result::unwrap) {
            for taken in taken {
                let epoch: i64 = taken.token.split(':').nth(3).unwrap().parse().unwrap();
                let begun = *first.entry(taken.partition).or_insert(epoch);
                assert_eq!(epoch, begun + round, "taken twice: {taken:?}");
                assert!(all.insert(taken.partition), "{taken:?}");
            }
            give_back(&ready.sql, me).await;
        }
        assert_eq!(all.len(), 20);
    }
}

/// Neither kind says goodbye.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_takes_over_what_the_other_held_when_its_lease_is_over() {
    let ready = Ready::new(1).await;
    let (sql, partition) = (&ready.sql, ready.partitions[0]);
    let (died, next_one) = (Uuid::now_v7(), Uuid::now_v7());
    append_texts(sql, partition, ["a", "b", "end"]).await;
    let before = take(sql, died, 1).await.remove(0);
    let first = pull(sql, &before.token, 1).await.remove(0);
    assert!(super::ack(sql, &before.token, first.0).await);
    // It commits when it is told to.
    let consumer = ready.test.cluster.consumer("orders", "g").flush_interval(60 * SECOND);
    let mut messages = consumer.stream().await.unwrap();
    ready.clocks.move_server("31 s").await;
    assert_eq!(texts_until(&mut messages, "end").await, ["b"]);
    messages.flush().await.unwrap();
    assert_eq!(state(try_ack(sql, &before.token, first.0 + 2).await), "SMQ01");
    assert!(take(sql, next_one, 1).await.is_empty());
    append_texts(sql, partition, ["c"]).await;
    assert_eq!(next_text(&mut messages).await, "c");
    // It hangs: nothing renews its lease.
    let hang = "alter table shardmq.member rename column session to away";
    sql.batch_execute(hang).await.unwrap();
    ready.clocks.move_server("11 s").await;
    let after = take_over(sql, next_one, 1).await.remove(0);
    sql.batch_execute("alter table shardmq.member rename column away to session").await.unwrap();
    assert_eq!(drain(sql, &after.token, 9).await, ["c"]);
    messages.shutdown(SECOND).await.ok();
}
