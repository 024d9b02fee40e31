//! Who owns a partition, and what its former owner can still do: nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use shardmq::{Cluster, ConsumerBuilder, ConsumerHandle, ErrorKind, Messages, PartitionId};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::reading::{
    append_texts, cursor, cursors, next, next_error, take, text, texts_until,
};
use crate::support::stored::{number, topic};
use crate::support::{
    TestCluster, client, database, eventually, own_server, shared_server, within,
};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

fn consumer(cluster: &Cluster) -> ConsumerBuilder {
    let builder = cluster.consumer("orders", "g").lease(SECOND);
    builder.poll_interval(SECOND / 5).flush_interval(SECOND / 5)
}

/// A member that acknowledges all it gets, and what it got.
struct Worker {
    handle: ConsumerHandle,
    task: JoinHandle<()>,
}

type Log = Arc<Mutex<Vec<String>>>;

impl Worker {
    async fn start(builder: ConsumerBuilder, log: &Log) -> Self {
        let mut messages = builder.stream().await.unwrap();
        let (handle, log) = (messages.handle(), Arc::clone(log));
        let task = tokio::spawn(async move {
            while let Some(delivery) = messages.next().await {
                let delivery = delivery.expect("nobody loses a partition here");
                log.lock().unwrap().push(text(&delivery));
                delivery.ack().unwrap();
            }
        });
        Self { handle, task }
    }

    async fn stop(self) {
        self.handle.shutdown(5 * SECOND).await.unwrap();
        self.task.await.unwrap();
    }
}

async fn shares(workers: &[Worker], expected: &[usize]) {
    let held = || -> Vec<usize> {
        let mut held: Vec<_> = workers.iter().map(|w| w.handle.held_partitions()).collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held
    };
    eventually(&format!("shares of {expected:?}"), SOON, async || held() == expected).await;
}

/// How many partitions each member owns, as the node has it.
async fn owned(sql: &Client) -> Vec<usize> {
    let mut by_member: BTreeMap<_, usize> = BTreeMap::new();
    for (_, cursor) in cursors(sql, "g").await {
        if let Some(member) = cursor.member {
            *by_member.entry(member).or_default() += 1;
        }
    }
    let mut counts: Vec<usize> = by_member.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_come_and_go_share_evenly_and_nothing_comes_twice() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 8).await;
    let nodes = [test.sql(0).await, test.sql(1).await];
    let feeding = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let feeder = tokio::spawn({
        let feeding = Arc::clone(&feeding);
        async move {
            let mut sent = 0;
            while feeding.load(std::sync::atomic::Ordering::Relaxed) {
                let partition = partitions[sent % 8];
                let sql = &nodes[usize::from(partition.node().number()) - 1];
                append_texts(sql, partition, sent..sent + 3).await;
                sent += 3;
            }
            sent
        }
    });
    let log = Log::default();
    let mut workers = vec![Worker::start(consumer(&test.cluster), &log).await];
    shares(&workers, &[8]).await;
    workers.push(Worker::start(consumer(&test.cluster), &log).await);
    shares(&workers, &[4, 4]).await;
    workers.push(Worker::start(consumer(&test.cluster), &log).await);
    shares(&workers, &[3, 3, 2]).await;
    workers.remove(0).stop().await;
    shares(&workers, &[4, 4]).await;
    let (first, second) = (test.sql(0).await, test.sql(1).await);
    eventually("the nodes have it so", SOON, async || {
        let both = [owned(&first).await, owned(&second).await].concat();
        both.iter().sum::<usize>() == 8
    })
    .await;

    feeding.store(false, std::sync::atomic::Ordering::Relaxed);
    let sent = feeder.await.unwrap();
    eventually("all is consumed", SOON, async || log.lock().unwrap().len() >= sent).await;
    for worker in workers {
        worker.stop().await;
    }
    let mut seen: Vec<usize> = log.lock().unwrap().iter().map(|t| t.parse().unwrap()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..sent).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_member_is_followed_after_its_lease_from_what_it_committed() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let crashing = tokio::runtime::Runtime::new().unwrap();
    let url = test.control_url.clone();
    let handle = crashing.spawn(async move {
        let cluster = Cluster::connect(&url).await.unwrap();
        let builder = consumer(&cluster).flush_interval(60 * SECOND);
        let mut messages = builder.stream().await.unwrap();
        let mut taken = take(&mut messages, 8).await;
        taken.drain(..4).for_each(|delivery| delivery.ack().unwrap());
        messages.flush().await.unwrap();
        // Acknowledged, and not committed: these come again.
        taken.drain(..2).for_each(|delivery| delivery.ack().unwrap());
        (messages, taken)
    });
    let crashed = handle.await.unwrap();
    let before = cursor(&sql, "g", partition).await;
    crashing.shutdown_background();

    let mut messages = consumer(&test.cluster).stream().await.unwrap();
    append_texts(&sql, partition, ["end"]).await;
    let rest = texts_until(&mut messages, "end").await;
    assert_eq!(rest, ["4", "5", "6", "7", "8", "9"]);
    let after = cursor(&sql, "g", partition).await;
    assert_eq!(after.epoch, before.epoch + 1);
    assert_ne!(after.owner, before.owner);
    messages.shutdown(SECOND).await.unwrap();
    drop(crashed);
}

/// A consumer on a runtime that stands still between two steps, as a process that was suspended.
struct Paused {
    steps: mpsc::Sender<Step>,
    thread: std::thread::JoinHandle<()>,
}

type Step = Box<dyn FnOnce(&tokio::runtime::Runtime, &mut Messages) + Send>;

impl Paused {
    fn start(control_url: &str, build: fn(&Cluster) -> ConsumerBuilder) -> Self {
        let (steps, receiver) = mpsc::channel::<Step>();
        let url = control_url.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut messages = runtime.block_on(async {
                let cluster = Cluster::connect(&url).await.unwrap();
                build(&cluster).stream().await.unwrap()
            });
            // Between the steps nothing of this runtime moves.
            while let Ok(step) = receiver.recv() {
                step(&runtime, &mut messages);
            }
            runtime.block_on(messages.shutdown(SECOND)).ok();
        });
        Self { steps, thread }
    }

    /// Lets it run for one step.
    async fn run<T: Send + 'static>(
        &self,
        step: impl FnOnce(&tokio::runtime::Runtime, &mut Messages) -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = tokio::sync::oneshot::channel();
        let step = move |runtime: &_, messages: &mut _| {
            sender.send(step(runtime, messages)).ok().unwrap();
        };
        self.steps.send(Box::new(step)).unwrap();
        answer.await.unwrap()
    }

    async fn end(self) {
        drop(self.steps);
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_owner_wakes_up_to_refusals_and_can_move_nothing() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..10).await;
    let paused =
        Paused::start(&test.control_url, |cluster| consumer(cluster).flush_interval(60 * SECOND));
    let (mut taken, acked) = paused
        .run(|runtime, messages| {
            let mut taken = runtime.block_on(take(messages, 9));
            let kept = taken.split_off(7);
            taken.into_iter().for_each(|d| d.ack().unwrap());
            (kept, 7)
        })
        .await;
    assert_eq!(acked, 7);
    let before = cursor(&sql, "g", partition).await;

    // It stands still; another takes over, and is slower.
    let mut successor = consumer(&test.cluster).stream().await.unwrap();
    let first = next(&mut successor).await;
    assert_eq!(text(&first), "0");
    first.ack().unwrap();
    successor.flush().await.unwrap();
    let taken_over = cursor(&sql, "g", partition).await;
    assert_eq!(taken_over.epoch, before.epoch + 1);

    // It wakes up. What it acknowledged before is refused, and what it does now.
    let late = taken.pop().unwrap();
    let (flushed, ended, acked) = paused
        .run(move |runtime, messages| {
            let flushed = runtime.block_on(messages.flush());
            let ended = runtime.block_on(next_error(messages));
            (flushed, ended, late.ack())
        })
        .await;
    assert_eq!(flushed.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(ended.kind(), ErrorKind::LeaseLost);
    assert_eq!(acked.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, taken_over.acked_id);

    for n in 1..10 {
        let delivery = next(&mut successor).await;
        assert_eq!(text(&delivery), n.to_string());
        delivery.ack().unwrap();
    }
    successor.shutdown(SECOND).await.unwrap();
    paused.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_comes_after_the_loss_was_noticed_still_tells_of_it() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..3).await;
    let builder = consumer(&test.cluster).flush_interval(60 * SECOND);
    let mut messages = builder.stream().await.unwrap();
    next(&mut messages).await.ack().unwrap();
    take_away(&sql, partition).await;
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::LeaseLost);
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    // Told once.
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

/// The flush under way covers one of the two, and is told; the next one covers both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_during_a_flush_is_told_by_the_next_one_too() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    append_texts(&sql, partition, 0..3).await;
    let builder = consumer(&test.cluster).flush_interval(60 * SECOND).lease(60 * SECOND);
    let mut messages = builder.stream().await.unwrap();
    let mut in_hand = take(&mut messages, 2).await;
    let second = in_hand.pop().unwrap();
    in_hand.pop().unwrap().ack().unwrap();
    let mut thief = test.sql(0).await;
    let open = thief.transaction().await.unwrap();
    open.batch_execute("select from shardmq.cursor for update").await.unwrap();
    let handle = messages.handle();
    let first_flush = tokio::spawn(async move { handle.flush().await });
    let tries = "select count(*) > 0 from pg_stat_activity
                  where datname = current_database() and application_name = 'shardmq'
                    and query_start > $1 and query = 'commit'";
    let now: std::time::SystemTime =
        sql.query_one("select clock_timestamp()", &[]).await.unwrap().get(0);
    let tried = async || sql.query_one(tries, &[&now]).await.unwrap().get::<_, bool>(0);
    eventually("the flush passes the locked row over", SOON, tried).await;
    second.ack().unwrap();
    open.batch_execute("update shardmq.cursor set owner = gen_random_uuid(), epoch = epoch + 1")
        .await
        .unwrap();
    open.commit().await.unwrap();
    let told = within(SOON, "the flush under way", first_flush).await.unwrap();
    assert_eq!(told.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(messages.flush().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    messages.flush().await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

/// Gives a partition to a member whose lease has ended, as if one had taken it and died.
async fn take_away(sql: &Client, partition: PartitionId) {
    sql.execute(
        "update shardmq.cursor set member = gen_random_uuid(), owner = gen_random_uuid(), epoch = epoch + 1
          where partition = $1",
        &[&number(partition)],
    )
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_member_left_is_taken_again_and_counted_once() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 4).await;
    let messages = consumer(&test.cluster).stream().await.unwrap();
    let handle = messages.handle();
    for _ in 0..3 {
        eventually("all are held", SOON, async || {
            handle.held_partitions() == 4 && owned(&sql).await == [4]
        })
        .await;
        for partition in &partitions[..3] {
            take_away(&sql, *partition).await;
        }
        eventually("they are taken again", SOON, async || owned(&sql).await == [4]).await;
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(handle.held_partitions(), 0);
    assert!(owned(&sql).await.is_empty());
}

/// Taken again before a renewal has shown that it was lost: what was in hand is void all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_lost_freed_and_taken_again_voids_what_was_in_hand() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 2).await[0];
    append_texts(&sql, partition, ["again"]).await;
    // Renewed every three seconds; with the other partition in a living hand it tries for more each
    // second.
    let mut messages = consumer(&test.cluster).lease(10 * SECOND).stream().await.unwrap();
    eventually("it has both", SOON, async || messages.handle().held_partitions() == 2).await;
    let mut in_hand = next(&mut messages).await;
    sql.batch_execute(
        "insert into shardmq.member select gen_random_uuid(), 'g', now() + interval '1 hour';
         update shardmq.cursor set epoch = epoch + 1, owner = gen_random_uuid(),
                member = (select member from shardmq.member order by leased_until desc limit 1)
          where partition = 10102",
    )
    .await
    .unwrap();
    assert_eq!(next_error(&mut messages).await.kind(), ErrorKind::LeaseLost);
    for _ in 0..4 {
        let free = "update shardmq.cursor set member = null, owner = null, epoch = epoch + 1
                     where partition = 10101";
        sql.batch_execute(free).await.unwrap();
        let again = loop {
            match within(SOON, "it comes again", messages.next()).await.unwrap() {
                Ok(delivery) => break delivery,
                Err(error) => assert_eq!(error.kind(), ErrorKind::LeaseLost),
            }
        };
        let old = std::mem::replace(&mut in_hand, again);
        assert_eq!(old.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    drop(in_hand);
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(cursor(&sql, "g", partition).await.acked_id, 0, "none of them counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_taken_in_a_statement_whose_answer_was_lost_is_released() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    let one = consumer(&test.cluster).partitions([partitions[0]]).stream().await.unwrap();
    eventually("it has its partition", SOON, async || owned(&sql).await == [1]).await;
    sql.batch_execute(
        "update shardmq.cursor c set member = o.member, owner = gen_random_uuid(), epoch = c.epoch + 1
           from shardmq.cursor o where o.member is not null and c.member is null",
    )
    .await
    .unwrap();
    append_texts(&sql, partitions[1], ["here"]).await;
    let mut other = consumer(&test.cluster).partitions([partitions[1]]).stream().await.unwrap();
    assert_eq!(text(&next(&mut other).await), "here");
    one.shutdown(SECOND).await.unwrap();
    other.shutdown(Duration::ZERO).await.unwrap();
}

/// Longer away than a lease and the grace together: all leases are over when the server is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_the_server_healthy_members_keep_what_they_have() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 6).await;
    let log = Log::default();
    let mut workers = Vec::new();
    for _ in 0..3 {
        // Each in a process of its own, as it were.
        let cluster = Cluster::connect(&test.control_url).await.unwrap();
        workers.push(Worker::start(consumer(&cluster), &log).await);
    }
    shares(&workers, &[2, 2, 2]).await;
    let sql = test.sql(0).await;
    let owners = |cursors: Vec<(i32, _)>| -> HashMap<i32, (Option<_>, i64)> {
        let owner = |cursor: &crate::support::reading::Cursor| (cursor.owner, cursor.epoch);
        cursors.iter().map(|(id, cursor)| (*id, owner(cursor))).collect()
    };
    eventually("the node has it so", SOON, async || owned(&sql).await == [2, 2, 2]).await;
    let before = owners(cursors(&sql, "g").await);

    server.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    let down = Instant::now();
    eventually("all leases are long over", SOON, async || {
        down.elapsed() > Duration::from_millis(4500)
    })
    .await;
    server.start_server().await.unwrap();
    let back = Instant::now();
    let sql = test.sql(0).await;
    for partition in &partitions {
        append_texts(&sql, *partition, [partition]).await;
    }
    eventually("all streams go on", SOON, async || log.lock().unwrap().len() >= 6).await;
    eventually("whoever wanted to take over would have", SOON, async || {
        back.elapsed() > Duration::from_millis(4500)
    })
    .await;
    assert_eq!(owners(cursors(&sql, "g").await), before);
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_control_database_gone_everybody_keeps_what_they_have() {
    let control = own_server().await;
    let control_url = database(&control).await;
    let node_url = database(shared_server().await).await;
    let cluster = Cluster::connect(&control_url).await.unwrap();
    cluster.add_node(shardmq::NodeId::new(1).unwrap(), &node_url).await.unwrap();
    let test = TestCluster { cluster, control_url, node_urls: vec![node_url] };
    let partitions = topic(&test, "orders", 4).await;
    let log = Log::default();
    let mut workers = Vec::new();
    for _ in 0..2 {
        workers.push(Worker::start(consumer(&test.cluster), &log).await);
    }
    shares(&workers, &[2, 2]).await;
    control.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    let down = Instant::now();
    let sql = test.sql(0).await;
    eventually("heartbeats are long over", SOON, async || down.elapsed() > 3 * SECOND).await;
    for partition in &partitions {
        append_texts(&sql, *partition, [partition]).await;
    }
    eventually("all is consumed", SOON, async || log.lock().unwrap().len() == 4).await;
    assert_eq!(owned(&sql).await, [2, 2]);
    for worker in workers {
        worker.stop().await;
    }
    assert!(owned(&sql).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_stops_nobody_else_and_its_messages_come_when_it_is_back() {
    let dying = own_server().await;
    let urls = vec![database(shared_server().await).await, database(&dying).await];
    let test = TestCluster::of(urls).await;
    let partitions = topic(&test, "orders", 8).await;
    let on = |node: u8| partitions.iter().copied().filter(move |p| p.node().number() == node);
    let sql = [test.sql(0).await, test.sql(1).await];
    for partition in on(2) {
        append_texts(&sql[1], partition, ["late"]).await;
    }
    dying.stop_server(shardmq::embedded::StopMode::Immediate).await.unwrap();
    // A budget that the readers of one node alone could fill.
    let builder = consumer(&test.cluster).prefetch_bytes(64 << 10);
    let mut messages = builder.stream().await.unwrap();
    for round in 0..20 {
        for partition in on(1) {
            append_texts(&sql[0], partition, [round]).await;
        }
        for delivery in take(&mut messages, 4).await {
            assert_eq!(text(&delivery), round.to_string());
            delivery.ack().unwrap();
        }
    }
    // What is acknowledged on the living node is committed, though the other does not answer.
    assert!(messages.flush().await.is_ok());
    dying.start_server().await.unwrap();
    for delivery in take(&mut messages, 4).await {
        assert_eq!(text(&delivery), "late");
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    let rows = client(&test.node_urls[1]).await;
    assert!(cursors(&rows, "g").await.iter().all(|(_, cursor)| cursor.acked_id > 0));
}
