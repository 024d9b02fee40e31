//! A server comes back without the end of its log, as an asynchronous standby does that was
//! promoted: ids are used again, and nobody skips what is new under them.

use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use shardmq::{
    Cluster, Error, ErrorKind, Message, Messages, Producer, ProducerEvent, TopicOptions,
};
use tracing::Level;

use crate::support::put_back::{put_back, snapshot};
use crate::support::reading::cursor;
use crate::support::said::said;
use crate::support::{TestCluster, eventually, own_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// A flush tells of acknowledgements that were void, once, and has committed the others.
fn told_once(flushed: shardmq::Result<()>) {
    if let Err(error) = flushed {
        assert_eq!(error.kind(), ErrorKind::LeaseLost);
    }
}

async fn start(server: &Server) -> (TestCluster, Producer) {
    let test = TestCluster::on(server, 1).await;
    test.cluster.create_topic("orders", TopicOptions::partitions(1)).await.unwrap();
    let producer = test.cluster.producer("orders").build().await.unwrap();
    (test, producer)
}

async fn send(producer: &Producer, name: &str, count: u32) {
    for n in 0..count {
        producer.send(Message::new(format!("{name}{n}"))).await.unwrap();
    }
}

/// The next message's text; news is put aside.
async fn next(messages: &mut Messages, news: &mut Vec<Error>) -> (String, shardmq::Delivery) {
    loop {
        match within(20 * SECOND, "a delivery", messages.next()).await.unwrap() {
            Ok(delivery) => {
                let text = String::from_utf8(delivery.payload().to_vec()).unwrap();
                return (text, delivery);
            }
            Err(error) => news.push(error),
        }
    }
}

async fn read(messages: &mut Messages, name: &str, count: u32) -> Vec<shardmq::Delivery> {
    let mut deliveries = Vec::new();
    for n in 0..count {
        let (text, delivery) = next(messages, &mut Vec::new()).await;
        assert_eq!(text, format!("{name}{n}"));
        deliveries.push(delivery);
    }
    deliveries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_messages_under_reused_ids_are_delivered_and_old_acks_move_nothing() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    send(&producer, "kept", 5).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    for delivery in read(&mut messages, "kept", 5).await {
        delivery.ack().unwrap();
    }
    messages.flush().await.unwrap();
    let before = snapshot(&server).await;
    send(&producer, "lost", 5).await;
    let mut old = read(&mut messages, "lost", 5).await;
    let held_back = old.split_off(3);
    for delivery in old {
        delivery.ack().unwrap();
    }
    put_back(&server, &before).await;

    send(&producer, "new", 8).await;
    let mut news = Vec::new();
    for n in 0..8 {
        let (text, delivery) = next(&mut messages, &mut news).await;
        assert_eq!(text, format!("new{n}"));
        delivery.ack().unwrap();
    }
    assert!(
        news.iter().any(|e| e.kind() == ErrorKind::LeaseLost && e.to_string().contains("lost"))
    );
    for delivery in held_back {
        assert_eq!(delivery.ack().unwrap_err().kind(), ErrorKind::LeaseLost);
    }
    told_once(messages.shutdown(SECOND).await);
    let lag = test.cluster.lag("orders").await.unwrap();
    assert_eq!((lag[0].lag, lag[0].acked_id.unwrap().sequence()), (0, 13));
}

/// The consumer is idle: nothing is appended under the reused ids until it had time to notice
/// nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_reaches_the_new_server_before_any_fetch_moves_no_cursor() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    send(&producer, "kept", 2).await;
    let consumer = test.cluster.consumer("orders", "g").flush_interval(60 * SECOND);
    let mut messages = consumer.stream().await.unwrap();
    for delivery in read(&mut messages, "kept", 2).await {
        delivery.ack().unwrap();
    }
    messages.flush().await.unwrap();
    let before = snapshot(&server).await;
    send(&producer, "lost", 5).await;
    for delivery in read(&mut messages, "lost", 5).await {
        delivery.ack().unwrap();
    }
    put_back(&server, &before).await;

    let handle = messages.handle();
    let flushed = within(20 * SECOND, "the flush", handle.flush()).await;
    let sql = test.sql(0).await;
    let row = sql.query_one("select acked_id % 100000000 from shardmq.cursor", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 2, "{flushed:?}");
    send(&producer, "new", 5).await;
    let mut news = Vec::new();
    for n in 0..5 {
        let (text, delivery) = next(&mut messages, &mut news).await;
        assert_eq!(text, format!("new{n}"));
        delivery.ack().unwrap();
    }
    assert_eq!(flushed.unwrap_err().kind(), ErrorKind::LeaseLost);
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

/// A producer is told, once for each partition, when it sees that what it was acknowledged is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_gets_ids_again_is_told_once_for_each_partition() {
    // Numbers that no other test has, since all share what is said.
    told_of_ids_given_again(11, |_| None).await;
}

/// The same of messages with dedup keys, some of which were sent before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_of_dedup_keys_that_gets_ids_again_is_told_once_for_each_partition() {
    told_of_ids_given_again(13, |text| Some(text.to_owned())).await;
}

/// So many are kept.
async fn told_of_ids_given_again(kept: u32, dedup: fn(&str) -> Option<String>) {
    let server = own_server().await;
    let (_test, producer) = start(&server).await;
    let mut events = producer.events();
    let send = async |name: &str, count: u32| {
        let texts: Vec<_> = (0..count).map(|n| format!("{name}{n}")).collect();
        let message = |text: &String| {
            let message = Message::new(text.clone());
            dedup(text).map_or_else(|| message.clone(), |key| message.clone().dedup_key(key))
        };
        for text in &texts {
            producer.send(message(text)).await.unwrap();
        }
        // Sends that store nothing tell nothing.
        for text in texts.iter().filter(|text| dedup(text).is_some()) {
            producer.send(message(text)).await.unwrap();
        }
    };
    send("kept", kept).await;
    let snapshot = snapshot(&server).await;
    send("lost", 5).await;
    put_back(&server, &snapshot).await;
    send("new", 8).await;
    let mut told = Vec::new();
    producer.shutdown(20 * SECOND).await.unwrap();
    drop(producer);
    while let Some(event) = within(20 * SECOND, "the events' end", events.next()).await {
        if let ProducerEvent::LostTail { partition, first, last } = event {
            assert_eq!(first.partition(), partition);
            told.push((first, last));
        }
    }
    let [(first, last)] = told[..] else { panic!("{told:?}") };
    assert_eq!((first.sequence(), last.sequence()), (kept + 1, kept + 5));
    let mut alerts = said(Level::ERROR, "alert", "lost_tail");
    alerts.retain(|said| {
        said.has("first", &first.to_string()) && said.has("last", &last.to_string())
    });
    assert_eq!(alerts.len(), 1);
}

/// The same batch of the same producer comes to the same id again, before it another one: all but
/// the time of appending is equal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_repeats_its_batch_onto_the_same_id_hides_nothing() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    send(&producer, "kept", 1).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    read(&mut messages, "kept", 1).await.remove(0).ack().unwrap();
    messages.flush().await.unwrap();
    let before = snapshot(&server).await;
    let sql = test.sql(0).await;
    let append = |text: &'static str, producer: u128| {
        let sql = format!(
            "select shardmq.append(10101, array['{text}']::bytea[], producer => '{}', sequence => 9)",
            uuid_text(producer)
        );
        sql
    };
    sql.batch_execute(&append("x", 1)).await.unwrap();
    sql.batch_execute(&append("y", 2)).await.unwrap();
    // In hand all the time.
    let old =
        [next(&mut messages, &mut Vec::new()).await, next(&mut messages, &mut Vec::new()).await];
    assert_eq!(old.each_ref().map(|(text, _)| text.as_str()), ["x", "y"]);
    put_back(&server, &before).await;

    let sql = test.sql(0).await;
    sql.batch_execute(&append("z", 3)).await.unwrap();
    sql.batch_execute(&append("y", 2)).await.unwrap();
    let mut news = Vec::new();
    let (first, one) = next(&mut messages, &mut news).await;
    let (second, two) = next(&mut messages, &mut news).await;
    assert_eq!((first.as_str(), second.as_str()), ("z", "y"));
    one.ack().unwrap();
    two.ack().unwrap();
    messages.shutdown(SECOND).await.unwrap();
}

fn uuid_text(number: u128) -> String {
    format!("00000000-0000-0000-0000-{number:012}")
}

/// The server is put back to before the owner took the partition, and another has taken it: the
/// epoch is the same number again. All that was read is still there, so that nothing but the owner
/// tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_that_was_rolled_back_and_raised_again_by_another_lets_no_old_owner_in() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    let partition = test.cluster.topic("orders").await.unwrap().partitions[0].partition;
    send(&producer, "kept", 3).await;
    let quiet = |cluster: &Cluster| {
        let consumer = cluster.consumer("orders", "g").partitions([partition]);
        consumer.lease(600 * SECOND).flush_interval(60 * SECOND)
    };
    // The cursor is there already, so that both owners raise the same epoch.
    let first = quiet(&test.cluster).stream().await.unwrap();
    let holds = async || first.handle().held_partitions() == 1;
    eventually("it is held", 20 * SECOND, holds).await;
    first.shutdown(SECOND).await.unwrap();
    let before = snapshot(&server).await;
    // The other takes it first, and that is kept for later: side by side either could be the faster
    // one.
    let other = Cluster::builder(&test.control_url).upkeep(false).connect().await.unwrap();
    let mut new = quiet(&other).stream().await.unwrap();
    read(&mut new, "kept", 3).await.remove(0).ack().unwrap();
    within(20 * SECOND, "the new owner's flush", new.flush()).await.unwrap();
    let taken = snapshot(&server).await;
    let held = cursor(&test.sql(0).await, "g", partition).await;
    new.shutdown(SECOND).await.unwrap();
    put_back(&server, &before).await;

    let mut old = quiet(&test.cluster).stream().await.unwrap();
    let read_before = read(&mut old, "kept", 3).await;
    let owned = cursor(&test.sql(0).await, "g", partition).await;
    assert_eq!((held.epoch, held.reset_epoch), (owned.epoch, owned.reset_epoch));
    assert_ne!(held.owner, owned.owner);
    put_back(&server, &taken).await;

    // Refused at once where it has noticed already.
    let acked: Vec<_> = read_before.into_iter().map(shardmq::Delivery::ack).collect();
    let flushed = within(20 * SECOND, "the old owner's flush", old.flush()).await;
    let sql = test.sql(0).await;
    assert_eq!(cursor(&sql, "g", partition).await, held, "{flushed:?}");
    // Nothing is accepted, and forgotten.
    assert_eq!(flushed.is_err(), acked.iter().any(Result::is_ok), "{acked:?}, {flushed:?}");
    for refused in acked.into_iter().chain([flushed]).filter_map(Result::err) {
        assert_eq!(refused.kind(), ErrorKind::LeaseLost);
    }
    let _ = old.shutdown(SECOND).await;
    assert_eq!(cursor(&sql, "g", partition).await, held, "after the old owner's end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_restart_costs_no_lease_and_repeats_nothing() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    send(&producer, "a", 5).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let mut held = read(&mut messages, "a", 5).await;
    server.restart(StopMode::Immediate).await.unwrap();
    send(&producer, "b", 3).await;
    held.extend(read(&mut messages, "b", 3).await);
    for delivery in held {
        delivery.ack().unwrap();
    }
    within(20 * SECOND, "the flush", messages.flush()).await.unwrap();
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

/// The key goes with the message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_message_with_a_dedup_key_is_stored_when_it_is_sent_again() {
    let server = own_server().await;
    let (test, producer) = start(&server).await;
    let once = |key: &str| Message::new(key.to_owned()).dedup_key(key);
    let kept = producer.send(once("kept")).await.unwrap();
    let before = snapshot(&server).await;
    let send = |key| within(20 * SECOND, "a send", producer.send(once(key)));
    let lost = send("lost").await.unwrap();
    put_back(&server, &before).await;
    // Its id is another's now.
    assert_eq!(send("new").await.unwrap(), lost);
    let again = send("lost").await.unwrap();
    assert!(again > lost);
    assert_eq!((send("lost").await.unwrap(), send("kept").await.unwrap()), (again, kept));
    let sql = test.sql(0).await;
    let all = crate::support::stored::stored(&sql, kept.partition()).await;
    let texts: Vec<_> = all.iter().map(|m| (m.text(), m.id)).collect();
    assert_eq!(texts, [("kept", kept), ("new", lost), ("lost", again)]);
}
