//! A message with a dedup key is stored once, whoever sends it again, for two days.

use std::time::Duration;

use futures_util::future::join_all;
use shardmq::notifier::LocalNotifier;
use shardmq::{
    Cluster, ErrorKind, Message, MessageId, NodeId, PartitionId, Producer, ProducerBuilder,
};
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::held::Way;
use crate::support::proxy::{Proxy, Rule};
use crate::support::stored::{
    Stored, all_stored, assert_dense, number, stored, table, topic, waiting,
};
use crate::support::{TestCluster, database, eventually, shared_server, within};

/// When a key is forgotten.
mod window;

const SECOND: Duration = Duration::from_secs(1);

/// A message whose text is its dedup key.
fn once(key: &str) -> Message {
    Message::new(key.to_owned()).dedup_key(key)
}

fn texts(stored: &[Stored]) -> Vec<&str> {
    stored.iter().map(Stored::text).collect()
}

/// A topic of one partition and a producer.
async fn ready() -> (TestCluster, Client, PartitionId, Producer) {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    (test, sql, partition, producer)
}

/// Has a message under way and these wait behind it, while somebody has the partition's lock.
async fn send_together(
    test: &TestCluster,
    partition: PartitionId,
    producer: &Producer,
    messages: Vec<Message>,
) -> Vec<shardmq::Result<MessageId>> {
    let (holder, sql) = (test.sql(0).await, test.sql(0).await);
    let lock = format!("begin; select shardmq.lock_partition({partition})");
    holder.batch_execute(&lock).await.unwrap();
    let first = producer.enqueue(Message::new("first").key("first")).await.unwrap();
    let waits = || async { waiting(&sql, partition).await == 1 };
    eventually("the first waits for the lock", 20 * SECOND, waits).await;
    let mut receipts = Vec::new();
    for message in messages {
        receipts.push(producer.enqueue(message).await.unwrap());
    }
    holder.batch_execute("commit").await.unwrap();
    first.await.unwrap();
    within(20 * SECOND, "the receipts", join_all(receipts)).await
}

/// A producer behind a proxy, that has a connection with the statement prepared: two messages are
/// stored.
async fn way(settings: impl FnOnce(ProducerBuilder) -> ProducerBuilder) -> Way {
    let server = shared_server().await;
    let (proxy, url) = (Proxy::start(server.port()).await, database(server).await);
    // Hints stay in this process: one on its way would have the connection.
    let builder = Cluster::builder(&url).upkeep(false).notifier(LocalNotifier::new());
    let cluster = builder.connect().await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &proxy.url(&url)).await.unwrap();
    let test = TestCluster { cluster, control_url: url.clone(), node_urls: vec![url] };
    let way = Way::of((test, proxy), settings).await;
    way.send_message(once("prepared")).await.unwrap().unwrap();
    way
}

fn good(results: Vec<shardmq::Result<MessageId>>) -> Vec<MessageId> {
    results.into_iter().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_sixteen_senders_over_four_producers_all_get_the_id_of_the_one_message() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 6).await;
    let other = Cluster::connect(&test.control_url).await.unwrap();
    let mut producers = Vec::new();
    for cluster in [&test.cluster, &test.cluster, &other, &other] {
        producers.push(cluster.producer("orders").build().await.unwrap());
    }
    let mut ids = std::collections::BTreeSet::new();
    for round in 0..20 {
        let key = format!("key-{round}");
        let send = |n: usize| {
            let (producer, message) = (producers[n % 4].clone(), once(&key));
            tokio::spawn(async move { producer.send(message).await })
        };
        let sent = within(20 * SECOND, "all answers", join_all((0..16).map(send))).await;
        let sent = good(sent.into_iter().map(Result::unwrap).collect());
        assert!(sent.iter().all(|id| *id == sent[0]), "{sent:?}");
        ids.insert(sent[0]);
    }
    let (mut all, mut nodes) = (0, 0);
    for node in 0..2 {
        let sql = test.sql(node).await;
        let here = "select id from shardmq.partition p, shardmq.messages(p.partition, 0, 1000)";
        let rows = sql.query(here, &[]).await.unwrap();
        assert!(
            rows.iter()
                .all(|row| ids.contains(&MessageId::try_from(row.get::<_, i64>(0)).unwrap()))
        );
        all += rows.len();
        nodes += usize::from(!rows.is_empty());
    }
    assert_eq!((all, ids.len(), nodes), (20, 20, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_send_finds_the_first_also_by_another_producer_of_another_process() {
    let (test, sql, partition, producer) = ready().await;
    let id = producer.send(once("a")).await.unwrap();
    assert_eq!(producer.send(once("a")).await.unwrap(), id);
    producer.shutdown(SECOND).await.unwrap();
    let rebuilt = test.cluster.producer("orders").build().await.unwrap();
    // Whatever else it has: the key says that it is the same.
    let another = Message::new("another").header("h", "v").dedup_key("a");
    assert_eq!(rebuilt.send(another).await.unwrap(), id);
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    assert_eq!(producer.enqueue(once("a")).await.unwrap().await.unwrap(), id);
    assert_eq!(good(producer.send_all([once("a"), once("b")]).await)[0], id);
    assert_eq!(texts(&stored(&sql, partition).await), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_one_batch_each_key_is_stored_once_and_known_ones_keep_their_ids() {
    let (test, sql, partition, producer) = ready().await;
    let known = good(producer.send_all(["k1", "k2"].map(once)).await);
    let keys = ["a", "k2", "b", "a", "c", "k1", "b", "a"];
    let messages = keys.map(|key| once(key).header("h", key));
    let ids = good(send_together(&test, partition, &producer, messages.to_vec()).await);
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    assert_eq!(texts(&all), ["k1", "k2", "first", "a", "b", "c"]);
    let [a, b, c] = [all[3].id, all[4].id, all[5].id];
    assert_eq!(ids, [a, known[1], b, a, c, known[0], b, a]);
    let batch = format!(
        "select bytes, headers[3] ->> 'h' from shardmq.batch_{partition}_{} where count = 3",
        all[3].id.day()
    );
    let row = sql.query_one(&batch, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(1), "c");
    assert!(row.get::<_, i32>(0) > 3, "its bytes are counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_repeated_since_its_answer_was_lost_is_stored_once() {
    let way = way(|builder| builder.append_timeout(8 * SECOND)).await;
    way.proxy.to_client(Rule::Hold);
    let send = way.send_message(once("x"));
    way.eventually_stored(3).await;
    way.proxy.cut();
    way.proxy.to_client(Rule::Pass);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    let all = way.stored().await;
    assert_eq!((all.len(), all[2].id), (3, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_that_comes_after_its_repeat_is_not_stored_again() {
    let way = way(|builder| builder).await;
    let large = Message::new("m".repeat(12_000)).dedup_key("x");
    let (send, original) = way.send_held_message(large).await;
    way.free_all_but(&original);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[2].id), (3, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_answer_until_the_send_timeout_is_unknown_and_may_be_sent_again() {
    let settings =
        |builder: ProducerBuilder| builder.send_timeout(5 * SECOND).append_timeout(3 * SECOND);
    let way = way(settings).await;
    way.proxy.to_client(Rule::Swallow);
    let sent = within(20 * SECOND, "an answer", way.send_message(once("x"))).await.unwrap();
    let error = sent.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    assert!(error.chain().contains("may be stored, or not"), "{}", error.chain());
    way.eventually_stored(3).await;
    way.proxy.cut();
    way.proxy.to_client(Rule::Pass);
    let id = within(20 * SECOND, "the next", way.send_message(once("x"))).await.unwrap().unwrap();
    let all = way.stored().await;
    assert_eq!((all.len(), all[2].id), (3, id));
    assert_eq!(way.refused().await, 0);
}

/// The server refuses a repeat while the original is still on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_whose_repeat_was_refused_may_still_come_and_is_not_called_refused() {
    for code in ["check_violation", "raise_exception"] {
        let way = Way::new(|builder| builder.append_timeout(3 * SECOND)).await;
        let large = || Message::new("m".repeat(12_000)).dedup_key("x");
        let (send, original) = way.send_held_message(large()).await;
        way.given_up(&original).await;
        let table = table(way.partition, way.clocks.day(0).await);
        let trigger =
            format!("create trigger no before insert on {table} execute function public.no()");
        let refuse = format!(
            "create function public.no() returns trigger language plpgsql as
                $$ begin raise exception 'no' using errcode = '{code}'; end $$; {trigger}"
        );
        way.sql.batch_execute(&refuse).await.unwrap();
        way.free_all_but(&original);
        let outcome = within(20 * SECOND, "the repeat", send).await.unwrap();
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unknown, "{code}");
        way.sql.batch_execute(&format!("drop trigger no on {table}")).await.unwrap();
        way.release(&original).await;
        let all = way.stored().await;
        let id = within(20 * SECOND, "the next", way.send_message(large())).await.unwrap().unwrap();
        assert_eq!((all.len(), all[1].id), (2, id), "{code}");
        // Where nothing had no answer, it is what it is.
        way.sql.batch_execute(&trigger).await.unwrap();
        let outcome = within(20 * SECOND, "an answer", way.send_message(once("y"))).await.unwrap();
        assert_ne!(outcome.unwrap_err().kind(), ErrorKind::Unknown, "{code}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_sent_is_not_called_unknown() {
    // The lock is waited for so long that the server says in time that it was not to be had.
    let settings =
        |builder: ProducerBuilder| builder.send_timeout(5 * SECOND).append_timeout(8 * SECOND);
    let way = Way::new(settings).await;
    let holder = way.test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", way.partition);
    holder.batch_execute(&lock).await.unwrap();
    let sent = within(20 * SECOND, "an answer", way.send_message(once("x"))).await.unwrap();
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Timeout);
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(way.stored().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_takes_nothing_more_still_knows_its_keys() {
    for full in [true, false] {
        let way = Way::new(|builder| builder).await;
        let known = way.send_message(once("a")).await.unwrap().unwrap();
        if full {
            way.fill().await;
        } else {
            way.set_state("state = 'sealed', generation = 2").await;
        }
        assert_eq!(way.send_message(once("a")).await.unwrap().unwrap(), known);
        let messages = ["b", "a", "c"].map(once);
        let sent = within(20 * SECOND, "answers", way.producer.send_all(messages)).await;
        let kind = if full { ErrorKind::Full } else { ErrorKind::Unavailable };
        for (nth, sent) in sent.into_iter().enumerate() {
            match nth {
                1 => assert_eq!(sent.unwrap(), known),
                _ => assert_eq!(sent.unwrap_err().kind(), kind),
            }
        }
    }
}

async fn two_topics(upkeep: bool) {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    let sql = test.sql(0).await;
    let orders = topic(&test, "orders", 1).await[0];
    let bills = topic(&test, "bills", 1).await[0];
    let send = async |name: &str| {
        let producer = clocks.on(test.cluster.producer(name)).build().await.unwrap();
        producer.send(once("a")).await.unwrap()
    };
    let (order, bill) = (send("orders").await, send("bills").await);
    assert_eq!((order.partition(), bill.partition()), (orders, bills));
    assert_eq!((send("orders").await, send("bills").await), (order, bill));
    test.cluster.delete_topic("orders", true).await.unwrap();
    if upkeep {
        test.cluster.look_after_nodes().await.unwrap();
        let keys = "select array_agg(partition) from shardmq.sent_key";
        let left = sql.query_one(keys, &[]).await.unwrap();
        assert_eq!(left.get::<_, Vec<i32>>(0), [number(bills)]);
    }
    // The number is free after a day, and the window is longer.
    clocks.set("1 day 23:00").await;
    assert_eq!(topic(&test, "others", 1).await[0], orders);
    let id = send("others").await;
    assert!(id.partition() == orders && id != order);
    assert_eq!(texts(&stored(&sql, orders).await), ["a"]);
    // Its creation that is taken up again keeps them.
    let again = "select shardmq.claim_partitions('others', p.topic_id, 1, 1, 1, '{}')
          from shardmq.partition p where p.topic = 'others' and p.state = 'open'";
    assert_eq!(sql.query_one(again, &[]).await.unwrap().get::<_, i32>(0), number(orders));
    assert_eq!((send("others").await, send("bills").await), (id, bill));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_do_not_share_keys_and_a_deleted_topics_are_forgotten_with_upkeep_and_without() {
    for upkeep in [true, false] {
        two_topics(upkeep).await;
    }
}

/// A producer that still has the topology of before: its topic's number is another's now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_topics_keys_are_not_taken_for_ones_own() {
    let (_test, sql, partition, producer) = ready().await;
    producer.send(once("a")).await.unwrap();
    let change = format!(
        "update shardmq.partition set topic = 'bills', topic_id = gen_random_uuid() where partition = {partition}"
    );
    sql.batch_execute(&change).await.unwrap();
    let error = within(20 * SECOND, "an answer", producer.send(once("a"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_a_key_it_chooses_the_partition() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 16).await;
    let sql = test.sql(0).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let place = producer.send(Message::new("key only").key("k")).await.unwrap().partition();
    for n in 0..20 {
        let key = format!("dedup-{n}");
        let message = || Message::new(key.clone()).key("k").dedup_key(&key);
        let id = producer.send(message()).await.unwrap();
        assert_eq!(id.partition(), place);
        assert_eq!(producer.send(message()).await.unwrap(), id);
    }
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 21);
    assert!(all.iter().all(|m| m.key.as_deref() == Some("k")));
    // Without one the dedup key does, by the same slots, and is not stored as the key.
    let by_key = producer.send(Message::new("x").key("slot")).await.unwrap();
    let id = producer.send(once("slot")).await.unwrap();
    assert_eq!(id.partition(), by_key.partition());
    let here = stored(&sql, id.partition()).await;
    let found = here.iter().find(|m| m.id == id).unwrap();
    assert_eq!(found.key, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_a_key_keep_their_order_with_and_without_dedup_keys() {
    let (test, sql, partition, producer) = ready().await;
    let message = |n: usize| {
        let message = Message::new(n.to_string()).key(format!("k{}", n % 2));
        if n.is_multiple_of(3) { message.dedup_key(format!("d{n}")) } else { message }
    };
    for n in 0..20 {
        producer.send(message(n)).await.unwrap();
    }
    let expected: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    assert_eq!(texts(&stored(&sql, partition).await), expected);
    // Also where nobody waits for the one before.
    let messages = (20..40).map(message).collect();
    let ids = good(send_together(&test, partition, &producer, messages).await);
    assert!(ids.is_sorted(), "{ids:?}");
    assert_eq!(stored(&sql, partition).await.len(), 41);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_keys_at_once_each_get_their_own_id_and_again_the_same() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 3).await;
    let sql = test.sql(0).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let send = async |step: usize| {
        let keys = (0..5_000).step_by(step).map(|n| once(&n.to_string()));
        good(within(20 * SECOND, "all", producer.send_all(keys)).await)
    };
    let ids = send(1).await;
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 5_000);
    let place: std::collections::HashMap<_, _> = all.iter().map(|m| (m.text(), m.id)).collect();
    for (n, id) in ids.iter().enumerate() {
        assert_eq!(place[n.to_string().as_str()], *id);
    }
    let again: Vec<_> = ids.iter().step_by(7).copied().collect();
    assert_eq!(send(7).await, again);
    assert_eq!(all_stored(&sql, &partitions).await.len(), 5_000);
}
