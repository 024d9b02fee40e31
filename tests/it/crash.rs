//! A server that crashes under load, again and again: nothing acknowledged is lost, nothing is twice.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{Message, MessageId, Producer};

use crate::support::stored::{all_stored, assert_acknowledged, topic};
use crate::support::{TestCluster, eventually, own_server, within};

const SECOND: Duration = Duration::from_secs(1);

type Acknowledged = Arc<Mutex<Vec<(String, MessageId)>>>;

/// Sends one after the other until it is told to end; every send must succeed in the end.
async fn load(producer: Producer, name: usize, acknowledged: Acknowledged, end: Arc<Mutex<bool>>) {
    for n in 0.. {
        if *end.lock().unwrap() {
            return;
        }
        let text = format!("{name}-{n}");
        let message = Message::new(text.clone());
        // Some with a key, in order; the others where there is room.
        let message = if name.is_multiple_of(2) { message.key(name.to_string()) } else { message };
        let id = producer.send(message).await.unwrap();
        acknowledged.lock().unwrap().push((text, id));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_lose_nothing_that_was_acknowledged_and_repeat_nothing() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 3).await;
    let (acknowledged, end) = (Acknowledged::default(), Arc::new(Mutex::new(false)));
    let mut loads = Vec::new();
    for name in 0..6 {
        let builder = test.cluster.producer("orders").send_timeout(40 * SECOND);
        let producer = builder.build().await.unwrap();
        let acknowledged = Arc::clone(&acknowledged);
        loads.push(tokio::spawn(load(producer, name, acknowledged, Arc::clone(&end))));
    }
    for _ in 0..4 {
        let before = acknowledged.lock().unwrap().len();
        let more = || async { acknowledged.lock().unwrap().len() > before + 150 };
        eventually("messages are acknowledged", 15 * SECOND, more).await;
        server.restart(StopMode::Immediate).await.unwrap();
    }
    let before = acknowledged.lock().unwrap().len();
    let more = || async { acknowledged.lock().unwrap().len() > before + 150 };
    eventually("messages are acknowledged again", 15 * SECOND, more).await;
    *end.lock().unwrap() = true;
    for load in loads {
        within(15 * SECOND, "the end of the load", load).await.unwrap();
    }
    let acknowledged = acknowledged.lock().unwrap().clone();
    let sql = test.sql(0).await;
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), acknowledged.len());
    assert_acknowledged(&all, &acknowledged);
    for name in [0, 2, 4] {
        let prefix = format!("{name}-");
        let mine = all.iter().filter(|m| m.text().starts_with(&prefix));
        let numbers: Vec<u32> = mine.map(|m| m.text()[2..].parse().unwrap()).collect();
        assert!(numbers.is_sorted(), "order by key");
    }
}
