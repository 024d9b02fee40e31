//! Beside very many messages that were fetched and wait.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_again_does_not_wait_for_all_that_was_fetched() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let append = "select shardmq.append($1, array(
                      select convert_to(g::text, 'UTF8') from generate_series(1, 1000) g))";
    for partition in topic(&test, "orders", 4).await {
        for _ in 0..15 {
            sql.query_one(append, &[&number(partition)]).await.unwrap();
        }
    }
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let handle = messages.handle();
    let all = async || handle.status().prefetched_bytes > 9 << 20;
    eventually("60,000 are fetched", SOON, all).await;
    let first = next(&mut messages).await;
    let (id, begun) = (first.id(), Instant::now());
    first.retry("not now");
    // Due after 20 ms.
    eventually("its time has come", SOON, async || begun.elapsed() > SECOND / 2).await;
    let mut others = 0;
    loop {
        let delivery = next(&mut messages).await;
        if delivery.id() == id {
            assert_eq!(delivery.attempt(), 2);
            break;
        }
        delivery.ack().unwrap();
        others += 1;
    }
    assert!(others < 10_000, "{others} came before");
    messages.shutdown(SECOND).await.unwrap();
}
