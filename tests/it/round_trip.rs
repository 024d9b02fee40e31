//! A message goes in and comes out.

use std::time::Duration;

use shardmq::{Message, TopicOptions};

use crate::support::{TestCluster, within};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_stored_delivered_and_acknowledged() {
    let test = TestCluster::new(1).await;
    test.cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let message = Message::new(&b"\0\xff bytes"[..]).key("customer-7").header("trace", "t-1");
    let id = producer.send(message).await.unwrap();

    let mut messages = test.cluster.consumer("orders", "billing").stream().await.unwrap();
    let delivery = within(20 * SECOND, "the delivery", messages.next()).await.unwrap().unwrap();
    assert_eq!(delivery.id(), id);
    assert_eq!(delivery.payload(), b"\0\xff bytes");
    assert_eq!(delivery.key(), Some("customer-7"));
    assert_eq!(delivery.header("trace").as_deref(), Some("t-1"));
    delivery.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
    assert!(within(20 * SECOND, "the end", messages.next()).await.is_none());

    let lag = test.cluster.lag("orders").await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_over_two_nodes_all_arrive_in_order_by_key() {
    let test = TestCluster::new(2).await;
    test.cluster.create_topic("orders", TopicOptions::partitions(4)).await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let all = (0..20_000).map(|n| Message::new(format!("{n}")).key(format!("k{}", n % 50)));
    for result in producer.send_all(all).await {
        result.unwrap();
    }
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let mut last = vec![None; 50];
    for _ in 0..20_000 {
        let delivery = within(20 * SECOND, "a delivery", messages.next()).await.unwrap().unwrap();
        let n: usize = std::str::from_utf8(delivery.payload()).unwrap().parse().unwrap();
        assert!(last[n % 50].is_none_or(|before| before < n));
        last[n % 50] = Some(n);
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
}
