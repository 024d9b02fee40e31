//! Acknowledgements that outlive their process, in a directory.

use std::path::Path;
use std::time::Duration;

use shardmq::{Cluster, ConsumerBuilder, ErrorKind, Messages};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::proxy::cluster_behind_proxy;
use crate::support::reading::{append_texts, cursor, next, seek, take, text, texts_until};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);

fn consumer(cluster: &Cluster, directory: &Path) -> ConsumerBuilder {
    // It never commits by itself.
    let builder = cluster.consumer("orders", "g").flush_interval(60 * SECOND);
    builder.poll_interval(SECOND / 5).journal(directory)
}

/// A consumer that acknowledges what it is told to, and then ends as if it was killed.
async fn killed(test: &TestCluster, directory: &Path, take_most: usize, acked: &[usize]) {
    killed_with(10 * SECOND, test, directory, take_most, acked).await;
}

/// The same with this lease.
async fn killed_with(
    lease: Duration,
    test: &TestCluster,
    directory: &Path,
    take_most: usize,
    acked: &[usize],
) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (url, directory) = (test.control_url.clone(), directory.to_owned());
    let acked = acked.to_vec();
    let worked = runtime.spawn(async move {
        let cluster = Cluster::builder(&url).upkeep(false).connect().await.unwrap();
        let builder = consumer(&cluster, &directory).lease(lease);
        let mut messages = builder.stream().await.unwrap();
        let mut in_hand: Vec<_> =
            take(&mut messages, take_most).await.into_iter().map(Some).collect();
        for place in acked {
            in_hand[place].take().unwrap().ack().unwrap();
        }
        messages
    });
    let messages = worked.await.unwrap();
    runtime.shutdown_background();
    drop(messages);
}

async fn setting(count: usize) -> (TestCluster, Client, shardmq::PartitionId, tempfile::TempDir) {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..count).await;
    (test, sql, partition, tempfile::tempdir().unwrap())
}

async fn all_until_end(
    messages: &mut Messages,
    sql: &Client,
    partition: shardmq::PartitionId,
) -> Vec<String> {
    append_texts(sql, partition, ["end"]).await;
    texts_until(messages, "end").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_and_not_committed_does_not_come_again() {
    let (test, sql, partition, folder) = setting(20).await;
    let lease = 60 * SECOND;
    killed_with(lease, &test, folder.path(), 20, &[0, 1, 2, 5, 19]).await;
    assert_eq!(
        cursor(&sql, "g", partition).await.acked_id % 100_000_000,
        0,
        "nothing was committed"
    );
    // Killed again, before it has committed what it took over.
    killed_with(lease, &test, folder.path(), 3, &[1]).await;
    let begun = Instant::now();
    let builder = consumer(&test.cluster, folder.path()).lease(SECOND);
    let mut messages = builder.stream().await.unwrap();
    let first = next(&mut messages).await;
    // It need not wait for the lease of a process that it knows to be dead.
    assert!(begun.elapsed() < lease / 3, "{:?}", begun.elapsed());
    assert_eq!(text(&first), "3");
    first.ack().unwrap();
    let rest = all_until_end(&mut messages, &sql, partition).await;
    let expected: Vec<String> = (6..19).map(|n: u32| n.to_string()).collect();
    assert_eq!(rest, expected);
    messages.flush().await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
    // What is committed is deleted, also of the processes before.
    let files = || {
        let groups = std::fs::read_dir(folder.path()).unwrap().flatten();
        let files = groups.flat_map(|group| std::fs::read_dir(group.path()).unwrap().flatten());
        files.map(|file| file.file_name()).collect::<Vec<_>>()
    };
    eventually("the old files are gone", SOON, async || files().len() == 2).await;
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(files(), ["lock"]);
}

/// Before the first acquisition nothing is known to be others'.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_at_the_start_is_not_forgotten_meanwhile() {
    let (test, proxy) = cluster_behind_proxy().await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..9).await;
    let folder = tempfile::tempdir().unwrap();
    killed(&test, folder.path(), 9, &[0, 1, 2, 5]).await;
    proxy.refuse(true);
    proxy.cut();
    let begun = Instant::now();
    let builder = consumer(&test.cluster, folder.path()).lease(SECOND);
    let mut messages = builder.stream().await.unwrap();
    eventually("some leases are over", SOON, async || begun.elapsed() > 3 * SECOND).await;
    proxy.refuse(false);
    let rest = all_until_end(&mut messages, &sql, partition).await;
    assert_eq!(rest, ["3", "4", "6", "7", "8"]);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_owner_or_a_seek_has_made_void_is_not_taken_from_the_journal() {
    let (test, sql, partition, folder) = setting(6).await;
    killed(&test, folder.path(), 6, &[0, 1, 2]).await;
    // Another one comes first, and gives it back.
    let other = test.cluster.consumer("orders", "g").lease(SECOND).stream().await.unwrap();
    let has_it = async || other.handle().held_partitions() == 1;
    eventually("the other has it", SOON, has_it).await;
    other.shutdown(SECOND).await.unwrap();
    let mut messages = consumer(&test.cluster, folder.path()).stream().await.unwrap();
    let all = all_until_end(&mut messages, &sql, partition).await;
    assert_eq!(all, ["0", "1", "2", "3", "4", "5"]);
    messages.shutdown(SECOND).await.unwrap();

    append_texts(&sql, partition, 6..9).await;
    killed(&test, folder.path(), 3, &[0, 1, 2]).await;
    seek(&sql, "g", partition, cursor(&sql, "g", partition).await.acked_id - 1).await;
    let mut messages = consumer(&test.cluster, folder.path()).stream().await.unwrap();
    append_texts(&sql, partition, ["last"]).await;
    let all = texts_until(&mut messages, "last").await;
    assert_eq!(all, ["end", "6", "7", "8"]);
    messages.shutdown(SECOND).await.unwrap();
}

/// A group that was made again has the name of the one before, and a life of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_says_nothing_of_a_group_that_was_deleted_and_made_again() {
    let (test, sql, partition, folder) = setting(8).await;
    let all: Vec<usize> = (0..8).collect();
    killed_with(SECOND, &test, folder.path(), 8, &all).await;
    let deleted = async || test.cluster.delete_group("orders", "g").await.is_ok();
    eventually("the group is deleted", SOON, deleted).await;
    // As many acquisitions as before; the second consumer has the journal.
    let mut elsewhere = test.cluster.consumer("orders", "g").stream().await.unwrap();
    take(&mut elsewhere, 2).await.into_iter().for_each(|delivery| delivery.ack().unwrap());
    elsewhere.shutdown(SECOND).await.unwrap();
    let mut messages = consumer(&test.cluster, folder.path()).stream().await.unwrap();
    let rest = all_until_end(&mut messages, &sql, partition).await;
    assert_eq!(rest, ["2", "3", "4", "5", "6", "7"]);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_is_of_one_consumer_at_a_time() {
    let (test, _sql, _, folder) = setting(1).await;
    let one = consumer(&test.cluster, folder.path()).stream().await.unwrap();
    let two = consumer(&test.cluster, folder.path()).stream().await.unwrap_err();
    assert_eq!(two.kind(), ErrorKind::Conflict, "{}", two.chain());
    let other_group = test.cluster.consumer("orders", "h").journal(folder.path());
    other_group.stream().await.unwrap().shutdown(SECOND).await.unwrap();
    one.shutdown(SECOND).await.unwrap();
    let three = consumer(&test.cluster, folder.path()).stream().await.unwrap();
    three.shutdown(SECOND).await.unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let none = consumer(&test.cluster, &file).stream().await.unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Invalid, "{}", none.chain());
}
