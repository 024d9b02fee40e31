//! What bounds the memory of handlers, and does not stop them for ever.

use super::*;

/// Messages that wait for their key lie between those that are done: they are what makes the runs many,
/// and may not wait until there are few.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_key_does_not_stop_its_partition_when_there_are_many_runs() {
    let (test, partition, sql) = ready().await;
    let keys: Vec<String> =
        (0..40).map(|n| if n % 2 == 0 { "slow".to_owned() } else { format!("k{n}") }).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    append_keyed(&sql, partition, &keys).await;
    let (log, gate) = (Log::default(), Arc::new(Semaphore::new(0)));
    let running = run(consumer(&test, Order::ByKey).max_acked_runs(4), 8, {
        let (log, gate) = (Arc::clone(&log), Arc::clone(&gate));
        move |delivery| {
            let (log, gate) = (Arc::clone(&log), Arc::clone(&gate));
            async move {
                if text(&delivery) == "slow1" {
                    gate.acquire().await.unwrap().forget();
                }
                note(&log, &delivery);
                Ok(())
            }
        }
    })
    .await;
    let (handle, _) = &running;
    // So many that no more are handed out.
    eventually("some are done", SOON, async || log.lock().unwrap().len() >= 4).await;
    handle.flush().await.unwrap();
    gate.add_permits(1);
    eventually("all", SOON, async || log.lock().unwrap().len() == 40).await;
    stop(running).await;
    let all = texts(&log, partition);
    let slow: Vec<_> = all.into_iter().filter(|text| text.starts_with("slow")).collect();
    assert_eq!(slow, numbered("slow", 20));
}

/// While all keys fail, no more is begun than may be kept in memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_is_bounded_in_memory_and_nothing_of_it_is_lost() {
    let (test, partition, sql) = ready().await;
    for n in 0..100 {
        let (payload, key) = (format!("{n:09000}").into_bytes(), format!("k{n}"));
        let append = "select shardmq.append($1, $2, $3)";
        sql.query_one(append, &[&number(partition), &vec![payload], &vec![key]]).await.unwrap();
    }
    let (log, down) = (Log::default(), Arc::new(AtomicUsize::new(1)));
    let builder = consumer(&test, Order::ByKey).prefetch_bytes(64 << 10);
    let running = run(builder, 4, {
        let (log, down) = (Arc::clone(&log), Arc::clone(&down));
        move |delivery| {
            note(&log, &delivery);
            let is_down = down.load(Ordering::SeqCst) == 1;
            async move { if is_down { Err("away".to_owned()) } else { Ok(()) } }
        }
    })
    .await;
    let tried = || -> HashMap<String, u32> {
        log.lock().unwrap().iter().map(|(_, text, attempt)| (text.clone(), *attempt)).collect()
    };
    let again = async || tried().values().any(|attempt| *attempt >= 4);
    eventually("some are tried for the fourth time", SOON, again).await;
    // Seven rows of 9,000 bytes fit into 64 KiB; one more may pass it, and four are in hand.
    let begun = tried().len();
    assert!((7..=12).contains(&begun), "{begun}");
    down.store(0, Ordering::SeqCst);
    eventually("all", SOON, async || tried().len() == 100).await;
    let all = async || cursor(&sql, "g", partition).await.acked_id % 100_000_000 == 100;
    eventually("all are done", SOON, all).await;
    stop(running).await;
}

async fn ready() -> (TestCluster, PartitionId, Client) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    (test, partition, sql)
}
