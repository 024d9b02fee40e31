//! A producer behind a proxy: what it sends can be held on its way, and let go later.

use std::sync::Arc;
use std::time::Duration;

use shardmq::{Message, MessageId, PartitionId, Producer, ProducerBuilder};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::clocks::Clocks;
use super::proxy::{Link, Proxy, Rule, cluster_behind_proxy};
use super::stored::{Stored, assert_dense, number, stored, table, topic};
use super::{TestCluster, eventually};

const SOON: Duration = Duration::from_secs(15);

/// A producer behind a proxy, with its connection made and its statements prepared.
pub struct Way {
    pub test: TestCluster,
    pub proxy: Proxy,
    pub clocks: Clocks,
    pub sql: Client,
    pub partition: PartitionId,
    pub producer: Producer,
}

impl Way {
    /// In a cluster of its own.
    pub async fn new(settings: impl FnOnce(ProducerBuilder) -> ProducerBuilder) -> Self {
        Self::of(cluster_behind_proxy().await, settings).await
    }

    /// In this cluster.
    pub async fn of(
        (test, proxy): (TestCluster, Proxy),
        settings: impl FnOnce(ProducerBuilder) -> ProducerBuilder,
    ) -> Self {
        let clocks = Clocks::of(&test).await;
        clocks.set("23:50").await;
        let partition = topic(&test, "orders", 1).await[0];
        let builder = test.cluster.producer("orders");
        let builder = builder.append_timeout(Duration::from_millis(400));
        let producer = clocks.on(settings(builder)).build().await.unwrap();
        producer.send(Message::new("first")).await.unwrap();
        let sql = test.sql(0).await;
        Self { test, proxy, clocks, sql, partition, producer }
    }

    /// Sends a text in a task.
    pub fn send(&self, text: &str) -> JoinHandle<shardmq::Result<MessageId>> {
        self.send_message(Message::new(text.to_owned()).key("k"))
    }

    /// Sends a message in a task.
    pub fn send_message(&self, message: Message) -> JoinHandle<shardmq::Result<MessageId>> {
        let producer = self.producer.clone();
        tokio::spawn(async move { producer.send(message).await })
    }

    /// Everything in the partition.
    pub async fn stored(&self) -> Vec<Stored> {
        let all = stored(&self.sql, self.partition).await;
        assert_dense(&all);
        all
    }

    pub async fn eventually_stored(&self, count: usize) {
        let there = || async { self.stored().await.len() == count };
        eventually("the batch is stored", SOON, there).await;
    }

    /// Sends a message whose pipeline is held on its way, as are its repeats.
    pub async fn send_held(&self) -> (JoinHandle<shardmq::Result<MessageId>>, Arc<Link>) {
        self.send_held_message(Message::new("m".repeat(12_000)).key("k")).await
    }

    /// The same with a message of more than 8,000 bytes.
    pub async fn send_held_message(
        &self,
        message: Message,
    ) -> (JoinHandle<shardmq::Result<MessageId>>, Arc<Link>) {
        self.proxy.to_server(Rule::HoldLarge(8_000));
        let send = self.send_message(message);
        let is_held = || async { self.proxy.holding(8_000).is_some() };
        eventually("the original is held", SOON, is_held).await;
        (send, self.proxy.holding(8_000).unwrap())
    }

    /// Waits until the client has given a pipeline up, of which nothing has reached the server.
    pub async fn given_up(&self, original: &Link) {
        let ended = || async { original.to_server.ended() };
        eventually("the client gives up", SOON, ended).await;
    }

    /// Lets everything pass but the original; what was held of its repeats is lost.
    pub fn free_all_but(&self, original: &Arc<Link>) {
        for link in self.proxy.links() {
            if !Arc::ptr_eq(&link, original) && link.to_server.kept() > 0 {
                link.cut();
            }
        }
        self.proxy.to_server_but_on(Rule::Pass, Some(original));
    }

    /// Lets an original go that was given up, and waits until the server has dealt with it. That all of it is
    /// on its way says nothing, nor that nobody is at work then: the server may not have read it. It
    /// closes the connection when it has.
    pub async fn release(&self, original: &Link) {
        original.to_server.set(Rule::Pass);
        let through = || async { original.to_client.ended() };
        eventually("the original is through", SOON, through).await;
        let idle = "select count(*) from pg_stat_activity where datname = current_database()
                        and state <> 'idle' and pid <> pg_backend_pid()";
        let idle = || async { self.sql.query_one(idle, &[]).await.unwrap().get::<_, i64>(0) == 0 };
        eventually("the server is idle", SOON, idle).await;
    }

    pub async fn set_state(&self, change: &str) {
        let text = format!(
            "begin; select shardmq.lock_partition({0});
             update shardmq.partition set {change} where partition = {0}; commit",
            self.partition
        );
        self.sql.batch_execute(&text).await.unwrap();
    }

    pub async fn roll(&self) {
        let roll = format!("select shardmq.roll({}, null)", self.partition);
        self.sql.batch_execute(&roll).await.unwrap();
    }

    pub async fn fill(&self) {
        let day = self.clocks.day(0).await;
        let insert = format!(
            "insert into {} (base_id, count, bytes, appended_at, producer, sequence, payloads)
             values (shardmq.first_id({}, {day}) + 99999998, 1, 4, shardmq.clock(),
                     gen_random_uuid(), 1, array['fill'::bytea])",
            table(self.partition, day),
            self.partition
        );
        self.sql.batch_execute(&insert).await.unwrap();
    }

    pub async fn refused(&self) -> i64 {
        let count = "select count(*) from shardmq.refused where partition = $1";
        let params = [number(self.partition)];
        self.sql.query_one(count, &[&params[0]]).await.unwrap().get(0)
    }
}
