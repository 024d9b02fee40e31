//! Notifiers in trouble: whatever becomes of one, nothing is lost, and nothing comes later than by looking.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shardmq::{Cluster, Message};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, interval};

use crate::support::reading::text;
use crate::support::within;

/// Two at once, and none.
mod both;
/// What metrics tell.
mod measured;
/// `LISTEN/NOTIFY`.
mod postgres;
/// Redis pub/sub.
mod redis;
/// Which notifier a process has.
mod settings;
/// The suite that checks notifiers finds what is wrong with one.
mod suite;

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(20);
/// Whatever happens to hints, a message comes by looking.
const LATEST: Duration = Duration::from_secs(5);
/// What it takes to read it then, on a busy machine.
const READ: Duration = Duration::from_secs(2);

/// Sends a message every 10 ms while something happens and for a second more, all of which must come, in time
/// from when each was stored. `topic` must be there, with one node.
async fn nothing_is_late(
    producing: &Cluster,
    consuming: &Cluster,
    topic: &str,
    happens: impl Future<Output = ()>,
) -> Duration {
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let mut messages = consuming.consumer(topic, "g").stream().await.unwrap();
    let handle = messages.handle();
    let receiving = tokio::spawn(async move {
        while let Some(delivery) = messages.next().await {
            let Ok(delivery) = delivery else { continue };
            let _ = arrived.send((text(&delivery), Instant::now()));
            delivery.ack().unwrap();
        }
    });
    let done = Arc::new(AtomicBool::new(false));
    let producer = producing.producer(topic).build().await.unwrap();
    let (stops, over) = (Arc::clone(&done), producer.clone());
    let (first, begun) = oneshot::channel();
    let sending = tokio::spawn(async move {
        let (mut stored, mut ticks) = (HashMap::new(), interval(SECOND / 100));
        let mut first = Some(first);
        for n in 0_u32.. {
            if stops.load(Ordering::SeqCst) {
                break;
            }
            ticks.tick().await;
            over.send(Message::new(n.to_string())).await.unwrap();
            stored.insert(n.to_string(), Instant::now());
            if let Some(first) = first.take() {
                let _ = first.send(());
            }
        }
        stored
    });
    within(SOON, "the first is stored", begun).await.unwrap();
    happens.await;
    tokio::time::sleep(SECOND).await;
    done.store(true, Ordering::SeqCst);
    let mut missing = within(SOON, "all is stored", sending).await.unwrap();
    let mut latest = Duration::ZERO;
    while !missing.is_empty() {
        let (text, at) = within(SOON, "all comes", arrivals.recv()).await.unwrap();
        if let Some(stored) = missing.remove(&text) {
            latest = latest.max(at.saturating_duration_since(stored));
        }
    }
    assert!(latest < LATEST + READ, "{latest:?}");
    handle.shutdown(SECOND).await.unwrap();
    receiving.await.unwrap();
    producer.shutdown(SECOND).await.unwrap();
    latest
}
