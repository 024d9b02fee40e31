//! Relays that stop in the middle of putting a batch back, and go on when another has the lease.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::support::relays::{Relay, arrive, publish, texts, through};
use crate::support::stored::topic;
use crate::support::{TestCluster, eventually};

const SOON: Duration = Duration::from_secs(15);

/// A relay that stops where a batch was refused, until it is let on.
struct Stopped {
    _relay: Relay,
    /// Permits of each time that it looked, and that it found nothing to do.
    looked: Arc<Semaphore>,
    rests: Arc<Semaphore>,
    on: Arc<Semaphore>,
}

impl Stopped {
    /// `wholly`: after one more look it does nothing, and loses its lease without knowing.
    async fn new(test: &TestCluster, wholly: bool) -> Self {
        let new = || Arc::new(Semaphore::new(0));
        let (refused, looked, rests, on) = (new(), new(), new(), new());
        let hook = (Arc::clone(&refused), Arc::clone(&looked), Arc::clone(&rests), Arc::clone(&on));
        let relay = Relay::with(test, "orders", |builder| {
            builder.relay_failpoint(move |name| {
                let (refused, looked, rests, on) = hook.clone();
                Box::pin(async move {
                    let come = match name {
                        "refused" => refused,
                        "looked" if refused.available_permits() > 0 => looked,
                        "rests" if refused.available_permits() > 0 => rests,
                        _ => return,
                    };
                    come.add_permits(1);
                    if name == "refused" {
                        let _ = on.acquire().await;
                    } else if wholly && name == "looked" {
                        std::future::pending::<()>().await;
                    }
                })
            })
        })
        .await;
        Self { _relay: relay, looked, rests, on }
    }

    async fn come(at: &Semaphore, what: &str) {
        eventually(what, SOON, async || at.available_permits() > 0).await;
    }

    /// Lets it put the batch back.
    fn open(&self) {
        self.on.close();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_two_relays_put_back_is_not_lost_sight_of() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    sql.batch_execute("update shardmq.partition set state = 'sealed'").await.unwrap();
    for n in 0..3 {
        publish(&sql, "orders", &n.to_string(), Some("k")).await;
    }
    let first = Stopped::new(&test, true).await;
    Stopped::come(&first.looked, "the first has stopped").await;
    let free = "update shardmq.outbox_relay set holder = null, until = '-infinity'";
    sql.batch_execute(free).await.unwrap();
    let second = Stopped::new(&test, false).await;
    // It has the batch as it was frozen, and looks no more at what is below.
    Stopped::come(&second.rests, "the second has nothing to do").await;
    first.open();
    // It withdraws the batch, and puts it back if it can.
    let said = "select count(*) from shardmq.outbox_batch where state = 'frozen'";
    let withdrawn = async || sql.query_one(said, &[]).await.unwrap().get::<_, i64>(0) == 0;
    eventually("the batch is withdrawn", SOON, withdrawn).await;
    let fenced = "select count(*) from shardmq.refused";
    let is_fenced = async || sql.query_one(fenced, &[]).await.unwrap().get::<_, i64>(0) > 0;
    eventually("the batch is fenced", SOON, is_fenced).await;
    tokio::task::yield_now().await;
    sql.batch_execute("update shardmq.partition set state = 'open'").await.unwrap();
    second.open();
    assert_eq!(texts(&arrive(&sql, &partitions, 3).await), ["0", "1", "2"]);
    through(&sql).await;
}
