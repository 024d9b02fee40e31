//! Partitions by a rule of the sender's own: it sees the message and what is open, and has its way.

use std::sync::{Arc, Mutex};

use shardmq::{Balancer, ErrorKind, Message, Outgoing, PartitionId};

use crate::support::TestCluster;
use crate::support::stored::{number, topic};

/// What it was shown: key, number of headers, payload, partitions that are open.
type Shown = Arc<Mutex<Vec<(Option<String>, usize, Vec<u8>, usize)>>>;

/// Sends to the open partition that the payload names.
struct ByPayload(Shown);

impl Balancer for ByPayload {
    fn choose(&self, message: &Outgoing<'_>, open: &[PartitionId]) -> Option<PartitionId> {
        let key = message.key.map(str::to_owned);
        let shown = (key, message.headers.len(), message.payload.to_vec(), open.len());
        self.0.lock().unwrap().push(shown);
        let text = std::str::from_utf8(message.payload).unwrap();
        match text.parse::<usize>() {
            Ok(place) => open.get(place).copied(),
            Err(_) => text.strip_prefix("to ").map(|partition| partition.parse().unwrap()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sender_sees_the_message_and_what_is_open_and_decides() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let shown = Shown::default();
    let balancer = ByPayload(Arc::clone(&shown));
    let producer = test.cluster.producer("orders").balancer(balancer).build().await.unwrap();
    for place in [2, 0, 1, 2] {
        let message = Message::new(place.to_string()).key("k").header("h", "v");
        let id = producer.send(message).await.unwrap();
        assert_eq!(id.partition(), partitions[place]);
    }
    assert_eq!(shown.lock().unwrap()[0], (Some("k".to_owned()), 1, b"2".to_vec(), 3));
    // No choice: as without a balancer.
    producer.send(Message::new("any")).await.unwrap();

    let error = producer.send(Message::new("to 10199")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("10199") && error.to_string().contains("orders"));
    assert_eq!(producer.status().buffered_bytes, 0);

    // One that is sealed is found so by whoever sends there, and then is not open any more.
    let sql = test.sql(0).await;
    let seal = "update shardmq.partition set state = 'sealed' where partition = $1";
    sql.execute(seal, &[&number(partitions[0])]).await.unwrap();
    let moved = producer.send(Message::new("0")).await.unwrap();
    assert_ne!(moved.partition(), partitions[0]);
    let id = producer.send(Message::new("0")).await.unwrap();
    assert_eq!(id.partition(), partitions[1]);
    assert_eq!(shown.lock().unwrap().last().unwrap().3, 2);
}
