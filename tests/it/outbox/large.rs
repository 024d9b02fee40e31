//! A message that takes its time between an outbox and its relay holds up no other.

use std::time::Duration;

use shardmq::migrate::{Schema, migrate};

use crate::support::proxy::{Proxy, Rule};
use crate::support::relays::{Relay, arrive, publish, through};
use crate::support::stored::{all_stored, topic};
use crate::support::{TestCluster, client, eventually, shared_server};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_behind_a_large_message_comes_while_that_is_on_its_way() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 2).await;
    let server = shared_server().await;
    let name = format!("large_{}", std::process::id());
    server.create_database(&name).await.unwrap();
    let url = server.url(&name);
    migrate(&url, Schema::Outbox).await.unwrap();
    let shop = client(&url).await;
    let large = "select shardmq.publish('orders', convert_to(repeat('x', 6000000), 'UTF8'))";
    shop.batch_execute(large).await.unwrap();
    for n in 0..10 {
        publish(&shop, "orders", &n.to_string(), None).await;
    }
    // No message of 6 MB passes, wherever it is read.
    let proxy = Proxy::start(server.port()).await;
    proxy.to_client(Rule::HoldAfter(1 << 20));
    let through_proxy = proxy.url(&url);
    let _relay = Relay::with(&test, "orders", |builder| builder.outbox(&through_proxy)).await;
    let sql = test.sql(0).await;
    arrive(&sql, &partitions, 10).await;
    let is_held = async || proxy.links().iter().any(|link| link.to_client.kept() > 1 << 20);
    eventually("the large message is on its way", SOON, is_held).await;
    proxy.to_client(Rule::Pass);
    let there = async || all_stored(&sql, &partitions).await.len() == 11;
    eventually("it comes", SOON, there).await;
    through(&shop).await;
}
