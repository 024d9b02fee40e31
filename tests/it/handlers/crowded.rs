//! Slow handlers in more partitions than there is room for.

use tokio::time::Instant;

use super::*;
use crate::support::proxy::cluster_behind_proxy;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_slow_handlers_is_not_read_over_and_over() {
    let (test, proxy) = cluster_behind_proxy().await;
    let sql = test.sql(0).await;
    for partition in topic(&test, "orders", 8).await {
        for _ in 0..3 {
            append_texts(&sql, partition, (0..20).map(|n| format!("{n:04000}"))).await;
        }
    }
    let (gate, begun) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let done = Arc::new(AtomicUsize::new(0));
    let running = run(consumer(&test, Order::ByPartition).prefetch_bytes(256 << 10), 8, {
        let (gate, begun, done) = (Arc::clone(&gate), Arc::clone(&begun), Arc::clone(&done));
        move |_| {
            let (gate, done) = (Arc::clone(&gate), Arc::clone(&done));
            begun.fetch_add(1, Ordering::SeqCst);
            async move {
                gate.acquire().await.unwrap().forget();
                done.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        }
    })
    .await;
    // What waits in some partitions makes room for the others.
    let all = async || begun.load(Ordering::SeqCst) == 8;
    eventually("one of each is in hand", SOON, all).await;
    let read = || proxy.links().iter().map(|link| link.to_client.bytes()).sum::<u64>();
    let (before, since) = (read(), Instant::now());
    eventually("some seconds", SOON, async || since.elapsed() > 5 * SECOND).await;
    let more = read() - before;
    // Each partition once more at most, and what else goes over the line.
    assert!(more < 1 << 20, "{more} bytes were read, and nothing of it handled");
    gate.add_permits(1000);
    eventually("all is handled", SOON, async || done.load(Ordering::SeqCst) == 480).await;
    stop(running).await;
}
