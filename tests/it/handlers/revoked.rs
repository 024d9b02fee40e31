//! Partitions that are lost while something of them waits for a handler.

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::support::reading::seek;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_to_be_repeated_is_not_handled_once_its_partition_is_lost() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let (gate, tokens) =
        (Arc::new(Semaphore::new(0)), Arc::<Mutex<Vec<CancellationToken>>>::default());
    let late = Arc::new(AtomicUsize::new(0));
    let log = Log::default();
    let builder = consumer(&test, Order::ByPartition).lease(SECOND);
    // One place: what has failed waits for it.
    let running = run(builder.retry_policy(shardmq::RetryPolicy::fixed(SECOND / 2)), 1, {
        let (gate, tokens, late) = (Arc::clone(&gate), Arc::clone(&tokens), Arc::clone(&late));
        let log = Arc::clone(&log);
        move |delivery: Delivery| {
            note(&log, &delivery);
            let (gate, token) = (Arc::clone(&gate), delivery.revoked());
            late.fetch_add(token.is_cancelled().into(), Ordering::SeqCst);
            let first = tokens.lock().unwrap().is_empty();
            tokens.lock().unwrap().push(token);
            async move {
                if text(&delivery) == "busy" {
                    gate.acquire().await.unwrap().forget();
                }
                if first { Err("not now".to_owned()) } else { Ok(()) }
            }
        }
    })
    .await;
    let first = append_texts(&sql, partitions[0], ["failed"]).await;
    let handled = async |count| log.lock().unwrap().len() == count;
    eventually("it has failed", SOON, async || handled(1).await).await;
    append_texts(&sql, partitions[1], ["busy"]).await;
    eventually("the place is taken", SOON, async || handled(2).await).await;
    let since = Instant::now();
    eventually("its time has come", SOON, async || since.elapsed() > SECOND).await;
    seek(&sql, "g", partitions[0], first - 1).await;
    let revoked = tokens.lock().unwrap()[0].clone();
    eventually("it is lost", SOON, async || revoked.is_cancelled()).await;
    gate.add_permits(1);
    // Under its next acquisition, as if for the first time.
    eventually("it is handled", SOON, async || texts(&log, partitions[0]).len() >= 2).await;
    assert_eq!(late.load(Ordering::SeqCst), 0, "handled though it was lost");
    let attempts: Vec<_> = log.lock().unwrap().iter().map(|(.., attempt)| *attempt).collect();
    assert_eq!(attempts, [1, 1, 1]);
    stop(running).await;
}
