//! Calls, savepoints, rollbacks and commits in any order, and answers that are lost: nothing counts as done that
//! the database has not kept.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_call_in_a_transaction_that_is_rolled_back_loses_nothing() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let mut sql = test.sql(0).await;
    append_texts(&sql, partition, ["one"]).await;
    let policy = RetryPolicy::fixed(SECOND / 100);
    for order in [Order::ByPartition, Order::Unordered] {
        let builder = consumer(&test).order(order).retry_policy(policy.clone());
        let mut messages = builder.stream().await.unwrap();
        let mut delivery = next(&mut messages).await;
        // In no order it is a parked copy that comes then.
        for attempt in 2..=3 {
            let mut transaction = sql.transaction().await.unwrap();
            drop(delivery.commit_in(&transaction).await.unwrap());
            let again = delivery.commit_in(&transaction).await.map(drop).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Conflict, "{again:?}");
            // The same seen from a savepoint, and what a savepoint has acknowledged.
            let savepoint = transaction.savepoint("one").await.unwrap();
            let again = delivery.commit_in(&savepoint).await.map(drop).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Conflict, "{again:?}");
            savepoint.rollback().await.unwrap();
            transaction.rollback().await.unwrap();
            drop(delivery);
            delivery = next(&mut messages).await;
            assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("one", attempt));
        }
        delivery.give_back();
        messages.shutdown(SECOND).await.unwrap();
    }
}

/// A small generator, the same in each run.
struct Dice(u64);

impl Dice {
    /// Below so many.
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// One transaction of a caller that keeps to the rules: what it did since is rolled back after an error.
async fn attempt(sql: &mut Client, delivery: &mut Delivery, dice: &mut Dice) {
    let mut transaction = sql.transaction().await.unwrap();
    for _ in 0..dice.roll(4) {
        let savepoint = transaction.savepoint("one").await.unwrap();
        apply(&savepoint, delivery).await;
        let is_refused = delivery.commit_in(&savepoint).await.map(drop).is_err();
        if is_refused || dice.roll(2) == 0 {
            savepoint.rollback().await.unwrap();
        } else {
            // From here on each call is refused, until all is rolled back.
            savepoint.commit().await.unwrap();
        }
    }
    let savepoint = transaction.savepoint("last").await.unwrap();
    apply(&savepoint, delivery).await;
    let acknowledged = match delivery.commit_in(&savepoint).await {
        Ok(acknowledged) => {
            savepoint.commit().await.unwrap();
            Some(acknowledged)
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
            savepoint.rollback().await.unwrap();
            None
        }
    };
    match dice.roll(3) {
        0 => transaction.rollback().await.unwrap(),
        // The caller does not learn of it.
        1 => transaction.commit().await.unwrap(),
        _ => {
            transaction.commit().await.unwrap();
            if let Some(acknowledged) = acknowledged {
                acknowledged.committed();
            }
        }
    }
}

async fn schedule(order: Order, seed: u64) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (watch, mut sql) = (effects(&test).await, test.sql(0).await);
    append_texts(&watch, partition, 0..30).await;
    let policy = RetryPolicy::fixed(SECOND / 1000).for_ever();
    let builder = consumer(&test).order(order).retry_policy(policy);
    let mut messages = builder.stream().await.unwrap();
    let mut dice = Dice(seed);
    let is_through = "select coalesce(bool_and(acked_id % 100000000 = 30), false)
                                 and not exists (select from shardmq.retry)
                            from shardmq.cursor";
    let through = async || watch.query_one(is_through, &[]).await.unwrap().get::<_, bool>(0);
    let all = async {
        while !through().await {
            // It ends without a message when the last is committed.
            let next = tokio::time::timeout(SECOND / 5, messages.next()).await;
            if let Ok(Some(Ok(mut delivery))) = next {
                attempt(&mut sql, &mut delivery, &mut dice).await;
            }
        }
    };
    within(3 * SOON, "the group is through", all).await;
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(counts(&watch).await, (0..30).map(|n| (n.to_string(), 1)).collect(), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_any_order_of_calls_each_message_takes_effect_once() {
    for seed in 1..=2 {
        schedule(Order::ByPartition, seed).await;
        schedule(Order::Unordered, seed).await;
    }
}
