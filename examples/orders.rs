//! Orders go in, bills come out: a producer and a consumer of typed messages, on a private Postgres.
//!
//! `cargo run --features embedded --example orders`

use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, Message, NodeId, Result, TopicOptions};

#[derive(Serialize, Deserialize)]
struct Order {
    number: u32,
    customer: String,
    cents: u64,
}

const ORDERS: u32 = 1_000;

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::builder().start().await?;
    let cluster = cluster_on(&server).await?;
    cluster.create_topic("orders", TopicOptions::partitions(4)).await?;

    let (sold, billed) = tokio::try_join!(sell(&cluster), bill(&cluster))?;
    println!("sold {ORDERS} orders for {sold} cents, billed {billed} cents");

    cluster.shutdown().await;
    server.stop().await
}

/// One database that is the control database and the only node.
async fn cluster_on(server: &Server) -> Result<Cluster> {
    server.create_database("shop").await?;
    let url = server.url("shop");
    migrate(&url, Schema::Control).await?;
    migrate(&url, Schema::Node).await?;
    let cluster = Cluster::connect(&url).await?;
    cluster.add_node(NodeId::new(1)?, &server.node_url("shop")).await?;
    Ok(cluster)
}

/// Sends orders. Those of one customer stay in order, since the customer is their key.
async fn sell(cluster: &Cluster) -> Result<u64> {
    let producer = cluster.producer("orders").build().await?;
    let (mut cents, mut messages) = (0, Vec::new());
    for number in 1..=ORDERS {
        let order = Order {
            number,
            customer: format!("customer-{}", number % 50),
            cents: 100 + u64::from(number),
        };
        cents += order.cents;
        messages.push(Message::json(&order)?.key(&order.customer));
    }
    // One result for each message: its id once it is on disk, or why it is not.
    for sent in producer.send_all(messages).await {
        sent?;
    }
    producer.shutdown(Duration::from_secs(5)).await?;
    Ok(cents)
}

/// Bills each order, as one member of the group "billing". More members would share the partitions.
async fn bill(cluster: &Cluster) -> Result<u64> {
    let mut messages = cluster.consumer("orders", "billing").stream().await?;
    let (mut bills, mut cents) = (0, 0);
    while bills < ORDERS {
        // An error is news, such as a partition that another consumer has taken: the stream goes on.
        let delivery = match messages.next().await {
            Some(Ok(delivery)) => delivery,
            Some(Err(news)) => {
                eprintln!("{}", news.chain());
                continue;
            }
            None => break,
        };
        let order: Order = delivery.json()?;
        if order.number.is_multiple_of(250) {
            println!("order {} is message {}", order.number, delivery.id());
        }
        bills += 1;
        cents += order.cents;
        delivery.ack()?;
    }
    // Commits what was acknowledged, and gives the partitions back.
    messages.shutdown(Duration::from_secs(5)).await?;
    Ok(cents)
}
