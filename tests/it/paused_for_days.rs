//! A partition that is paused for longer than its messages are kept: all was acknowledged, and the table
//! that its reader stands in is dropped.

use std::time::{Duration, SystemTime};

use shardmq::embedded::{Server, StopMode};
use shardmq::{Messages, PartitionId, Retention, TopicOptions};
use tokio_postgres::Client;
use tracing::Level;

use crate::support::clocks::{Clocks, look_after};
use crate::support::reading::{append_texts, next, text};
use crate::support::said::said;
use crate::support::stored::table;
use crate::support::{TestCluster, eventually, own_server, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

struct Paused {
    test: TestCluster,
    sql: Client,
    /// The first is paused, and stands in a day that is gone; one message waits there.
    partitions: Vec<PartitionId>,
    messages: Messages,
}

impl Paused {
    async fn new(server: &Server, group: &str) -> Self {
        let test = TestCluster::on(server, 1).await;
        let options = TopicOptions::partitions(2);
        let options =
            options.retention(Retention { days: 1, drop_unread: false, ..Retention::default() });
        let topology = test.cluster.create_topic("orders", options).await.unwrap();
        let partitions: Vec<_> = topology.partitions.iter().map(|p| p.partition).collect();
        let (sql, clocks) = (test.sql(0).await, Clocks::of(&test).await);
        let builder = test.cluster.consumer("orders", group).poll_interval(SECOND / 5);
        let messages = builder.lease(2 * SECOND).stream().await.unwrap();
        let mut paused = Self { test, sql, partitions, messages };
        for n in 0..2 {
            paused.append(n, "early").await;
            assert_eq!(paused.next().await, (n, "early".to_owned()));
        }
        paused.messages.flush().await.unwrap();
        paused.messages.handle().pause([paused.partitions[0]]).unwrap();
        let dropped = table(paused.partitions[0], clocks.day(0).await);
        clocks.move_server("5 days").await;
        paused.append(0, "late").await;
        paused.append(1, "late").await;
        assert_eq!(paused.next().await, (1, "late".to_owned()));
        paused.messages.flush().await.unwrap();
        look_after(&paused.test).await;
        let gone = "select to_regclass($1) is null";
        assert!(paused.sql.query_one(gone, &[&dropped]).await.unwrap().get::<_, bool>(0));
        paused
    }

    async fn append(&self, which: usize, text: &str) {
        append_texts(&self.sql, self.partitions[which], [text]).await;
    }

    /// Which partition the next message is of, and its text; it is acknowledged.
    async fn next(&mut self) -> (usize, String) {
        let delivery = next(&mut self.messages).await;
        let which = self.partitions.iter().position(|p| *p == delivery.partition()).unwrap();
        let text = text(&delivery);
        delivery.ack().unwrap();
        (which, text)
    }

    async fn ends_well(mut self) {
        self.messages.handle().resume([self.partitions[0]]).unwrap();
        assert_eq!(self.next().await, (0, "late".to_owned()));
        self.messages.shutdown(SECOND).await.unwrap();
        assert!(self.test.cluster.lag("orders").await.unwrap().iter().all(|lag| lag.lag == 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_others_of_the_node_go_on_and_it_does_too_when_resumed() {
    let mut paused = Paused::new(shared_server().await, "paused-for-days").await;
    // Several looks long.
    let silent = tokio::time::timeout(SECOND, paused.messages.next()).await;
    assert!(silent.is_err(), "{silent:?}");
    paused.append(1, "more").await;
    assert_eq!(paused.next().await, (1, "more".to_owned()));
    let trouble = said(Level::ERROR, "group", "paused-for-days");
    assert!(trouble.is_empty(), "{trouble:?}");
    paused.ends_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_its_lease_is_renewed() {
    let server = own_server().await;
    let mut paused = Paused::new(&server, "paused-and-restarted").await;
    server.restart(StopMode::Immediate).await.unwrap();
    paused.sql = paused.test.sql(0).await;
    let leased = async || -> SystemTime {
        let until = "select leased_until from shardmq.member";
        paused.sql.query_one(until, &[]).await.unwrap().get(0)
    };
    let before = leased().await;
    let renewed = async || leased().await > before;
    eventually("the lease is renewed", SOON, renewed).await;
    paused.append(1, "more").await;
    assert_eq!(paused.next().await, (1, "more".to_owned()));
    paused.ends_well().await;
}
