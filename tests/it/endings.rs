//! A consumer whose runtime or cluster has ended: it says so at once, and keeps nobody waiting.

use std::time::Duration;

use shardmq::{ErrorKind, Messages};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use crate::support::proxy::{Proxy, Rule};
use crate::support::reading::{append_texts, next};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A stream with one of three messages in hand, made in this runtime.
fn made_in(runtime: &Runtime) -> (Messages, shardmq::Delivery) {
    runtime.block_on(async {
        let test = TestCluster::new(1).await;
        let partition = topic(&test, "orders", 1).await[0];
        append_texts(&test.sql(0).await, partition, 0..3).await;
        let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
        let first = next(&mut messages).await;
        (messages, first)
    })
}

/// As where a stream is kept in a static, and each `#[tokio::test]` has a runtime of its own.
#[test]
fn a_stream_whose_runtime_has_ended_says_so_and_ends() {
    let first = runtime();
    let (mut messages, delivery) = made_in(&first);
    drop(first);
    runtime().block_on(async {
        let begun = Instant::now();
        let error = within(20 * SECOND, "an answer", messages.next()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "{error:?}");
        assert!(error.to_string().contains("runtime"), "{error}");
        let end = within(20 * SECOND, "the end", messages.next()).await;
        assert!(end.is_none(), "{end:?}");
        let flushed = within(20 * SECOND, "a flush", messages.flush()).await.unwrap_err();
        assert_eq!(flushed.kind(), ErrorKind::Closed, "{flushed:?}");
        // It is committed by nobody any more.
        let _ = delivery.ack();
        let _ = within(20 * SECOND, "a shutdown", messages.shutdown(60 * SECOND)).await;
        assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    });
}

#[test]
fn handlers_whose_runtime_has_ended_are_ended_too() {
    let first = runtime();
    let (messages, delivery) = made_in(&first);
    drop(delivery);
    drop(first);
    runtime().block_on(async {
        let run = messages.run(2, async |_| Ok::<(), String>(()));
        within(20 * SECOND, "the end of the run", run).await;
    });
}

/// A call that waits while the runtime ends: it is answered then.
#[test]
fn who_waits_for_a_message_or_a_flush_hears_that_the_runtime_ends() {
    let (first, second) = (runtime(), runtime());
    let (mut messages, delivery) = made_in(&first);
    drop(delivery);
    let handle = messages.handle();
    let waiting = second.spawn(async move { while let Some(Ok(_)) = messages.next().await {} });
    let flushing = second.spawn(async move { while handle.flush().await.is_ok() {} });
    first.shutdown_background();
    second.block_on(async {
        within(20 * SECOND, "the end of the stream", waiting).await.unwrap();
        within(20 * SECOND, "a flush that is refused", flushing).await.unwrap();
    });
}

/// A node that is silent keeps the members waiting; whoever reads the stream does not wait for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_shut_down_ends_its_streams_at_once() {
    let server = shared_server().await;
    let proxy = Proxy::start(server.port()).await;
    let urls = [database(server).await, database(server).await];
    let test = TestCluster::of(vec![urls[0].clone(), proxy.url(&urls[1])]).await;
    let partitions = topic(&test, "orders", 2).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    eventually("it has both", 20 * SECOND, async || messages.handle().held_partitions() == 2).await;
    append_texts(&client(&urls[1]).await, partitions[1], ["one"]).await;
    next(&mut messages).await.ack().unwrap();
    proxy.to_client(Rule::Hold);
    let cluster = test.cluster.clone();
    let begun = Instant::now();
    let ending = tokio::spawn(async move { cluster.shutdown().await });
    let end = within(20 * SECOND, "the end", messages.next()).await;
    assert!(end.is_none(), "{end:?}");
    assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    within(20 * SECOND, "the cluster's end", ending).await.unwrap();
}
