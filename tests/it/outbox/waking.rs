//! How the relay is woken, without a notification while it is awake, and without one that is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use shardmq::Cluster;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_postgres::{AsyncMessage, Client, IsolationLevel, NoTls};

use crate::support::pgbouncer::{PgBouncer, Unknown, cluster_through};
use crate::support::relays::{Relay, arrive, publish, through};
use crate::support::stored::{stored, topic};
use crate::support::{TestCluster, eventually, shared_server};

const SOON: Duration = Duration::from_secs(15);
/// Less than what a relay sleeps that nobody wakes.
const QUICK: Duration = Duration::from_millis(900);

/// A relay that waits at a place until it is let on, each time.
struct Gate {
    relay: Relay,
    /// Permits of those who have come there.
    there: Arc<Semaphore>,
    on: Arc<Semaphore>,
}

impl Gate {
    async fn at(test: &TestCluster, place: &'static str) -> Self {
        let (there, on) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (come, go) = (Arc::clone(&there), Arc::clone(&on));
        let relay = Relay::with(test, "orders", |builder| {
            builder.relay_failpoint(move |name| {
                let (come, go) = (Arc::clone(&come), Arc::clone(&go));
                Box::pin(async move {
                    if name == place {
                        come.add_permits(1);
                        if let Ok(permit) = go.acquire().await {
                            permit.forget();
                        }
                    }
                })
            })
        })
        .await;
        Self { relay, there, on }
    }

    /// Waits until the relay has come there.
    async fn come(&self) {
        self.there.acquire().await.unwrap().forget();
    }

    /// Lets it on, for good.
    fn open(&self) {
        self.on.close();
    }
}

async fn flag(sql: &Client) -> i64 {
    let flag = "select last_value from shardmq.outbox_flag";
    sql.query_one(flag, &[]).await.unwrap().get(0)
}

/// What happens is quick in one of three times: a machine stalls once, and who is missed is late each time.
async fn takes_little(case: &str, took: impl AsyncFn() -> Duration) {
    let mut late = Vec::new();
    while late.len() < 3 {
        let took = took().await;
        if took < QUICK {
            return;
        }
        late.push(took);
    }
    panic!("{case}: {late:?}");
}

/// Whatever happens between two looks of the relay, and however long a transaction was open by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_missed_between_the_last_look_and_sleep() {
    for (isolation, commits_before) in [
        (IsolationLevel::ReadCommitted, true),
        (IsolationLevel::ReadCommitted, false),
        (IsolationLevel::RepeatableRead, true),
        (IsolationLevel::RepeatableRead, false),
        (IsolationLevel::Serializable, false),
    ] {
        let case = format!("{isolation:?} {commits_before}");
        takes_little(&case, async || around_the_last_look(isolation, commits_before).await).await;
    }
}

/// How long one takes whose commit and the relay's falling asleep are one right after the other.
async fn around_the_last_look(isolation: IsolationLevel, commits_before: bool) -> Duration {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    // Its snapshot is older than all that the relay does.
    let transaction = sql.build_transaction().isolation_level(isolation).start().await.unwrap();
    transaction.query_one("select 1 from shardmq.outbox_relay", &[]).await.unwrap();
    // At rest it has looked, with the flag armed, and is about to sleep.
    let gate = Gate::at(&test, "rests").await;
    gate.come().await;
    assert_eq!(flag(&watch).await, 1);
    publish(&transaction, "orders", "x", Some("k")).await;
    let began = if commits_before {
        transaction.commit().await.unwrap();
        gate.open();
        Instant::now()
    } else {
        gate.open();
        transaction.commit().await.unwrap();
        Instant::now()
    };
    arrive(&watch, &partitions, 1).await;
    let took = began.elapsed();
    gate.relay.cluster.shutdown().await;
    took
}

/// Published while the relay was awake, so that nobody is notified, and committed later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_published_while_the_relay_was_awake_is_waited_for() {
    for isolation in [IsolationLevel::ReadCommitted, IsolationLevel::RepeatableRead] {
        takes_little(&format!("{isolation:?}"), async || published_while_awake(isolation).await)
            .await;
    }
}

/// How long one takes from its commit.
async fn published_while_awake(isolation: IsolationLevel) -> Duration {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    let transaction = sql.build_transaction().isolation_level(isolation).start().await.unwrap();
    assert_eq!(flag(&watch).await, 0);
    publish(&transaction, "orders", "x", Some("k")).await;
    let relay = Relay::start(&test, "orders").await;
    // It is long at rest as far as it can be.
    publish(&watch, "orders", "y", Some("k")).await;
    arrive(&watch, &partitions, 1).await;
    through(&watch).await;
    let began = Instant::now();
    transaction.commit().await.unwrap();
    arrive(&watch, &partitions, 2).await;
    let took = began.elapsed();
    relay.cluster.shutdown().await;
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_one_notifies_while_the_relay_is_awake() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let gate = Gate::at(&test, "looked").await;
    gate.come().await;
    let sql = test.sql(0).await;
    let (listener, heard) = listen(&test.node_urls[0]).await;
    assert_eq!(flag(&sql).await, 0);
    for n in 0..10 {
        publish(&sql, "orders", &n.to_string(), None).await;
    }
    // What was notified comes before the answer.
    listener.batch_execute("select 1").await.unwrap();
    assert_eq!(heard.load(Ordering::SeqCst), 0);
    gate.open();
    // It may arm, find something, and disarm again: in the end it sleeps, and is woken.
    let woken = async || {
        publish(&sql, "orders", "x", None).await;
        listener.batch_execute("select 1").await.unwrap();
        heard.load(Ordering::SeqCst) > 0
    };
    eventually("somebody notifies", SOON, woken).await;
}

/// Counts the notifications of a database's outbox.
async fn listen(url: &str) -> (Client, Arc<AtomicUsize>) {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    tokio::spawn(async move {
        let mut messages = stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            if matches!(message, AsyncMessage::Notification(_)) {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    client.batch_execute("listen shardmq_outbox").await.unwrap();
    (client, heard)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_pooler_nobody_listens_and_messages_come_all_the_same() {
    let server = shared_server().await;
    let pooler = PgBouncer::start(server, 8, Unknown::Refused).await;
    let test = cluster_through(server, pooler.port()).await;
    let partitions = topic(&test, "orders", 2).await;
    let cluster = Cluster::builder(&test.control_url).connect().await.unwrap();
    let _producer = cluster.producer("orders").build().await.unwrap();
    let sql = test.sql(0).await;
    for n in 0..5 {
        publish(&sql, "orders", &n.to_string(), Some("k")).await;
        let there = async || {
            stored(&sql, partitions[0]).await.len() + stored(&sql, partitions[1]).await.len()
                == n + 1
        };
        eventually("it is there", SOON, there).await;
    }
    through(&sql).await;
    cluster.shutdown().await;
}
