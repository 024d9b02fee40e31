//! Messages for later: they come when they are due, once, or not at all where they were taken back.

use std::time::{Duration, SystemTime};

use shardmq::embedded::StopMode;
use shardmq::{ErrorKind, Message, NodeId, ScheduledId};
use tokio::time::Instant;

use crate::support::clocks::Clocks;
use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::relays::{Relay, arrive, publish, texts};
use crate::support::stored::{stored, topic};
use crate::support::{TestCluster, client, database, eventually, own_server, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_hours(1);

async fn pending(sql: &tokio_postgres::Client) -> i64 {
    sql.query_one("select count(*) from shardmq.delayed", &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_in_the_order_in_which_they_are_due() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    let sql = test.sql(0).await;
    let now = SystemTime::now();
    for secs in [10, 8, 9] {
        let message = Message::new(secs.to_string()).key("k").header("h", "v");
        producer.deliver_at(now + Duration::from_secs(secs), message).await.unwrap();
    }
    producer.deliver_after(Duration::ZERO, Message::new("0").key("k")).await.unwrap();
    // Both at once would come by the time at which they are due.
    arrive(&sql, &partitions, 1).await;
    let past = now.checked_sub(HOUR).unwrap();
    producer.deliver_at(past, Message::new("past").key("k")).await.unwrap();
    let all = arrive(&sql, &partitions, 5).await;
    assert_eq!(texts(&all), ["0", "past", "8", "9", "10"]);
    for message in &all[2..] {
        let due = now + Duration::from_secs(message.text().parse().unwrap());
        let late = message.appended_at.duration_since(due);
        assert!(late.as_ref().is_ok_and(|late| *late < SECOND * 10), "{} {late:?}", message.text());
    }
    assert_eq!(pending(&sql).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_back_before_it_is_due_never_comes() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    let messages = (0..100).map(|n| Message::new(n.to_string()).key(n.to_string()));
    let mut ids: Vec<ScheduledId> = Vec::new();
    for id in producer.deliver_all_after(SECOND * 8, messages).await {
        ids.push(id.unwrap());
    }
    let nodes: std::collections::BTreeSet<NodeId> = ids.iter().map(|id| id.node).collect();
    assert_eq!(nodes.len(), 2, "keys wait on the node of their partition");
    for id in ids.iter().step_by(2) {
        assert!(test.cluster.cancel(*id).await.unwrap());
        assert!(!test.cluster.cancel(*id).await.unwrap());
    }
    let (one, two) = (test.sql(0).await, test.sql(1).await);
    let come = async || {
        stored(&one, partitions[0]).await.len() + stored(&two, partitions[1]).await.len() == 50
    };
    eventually("the others come", SOON, come).await;
    for (sql, partition) in [(&one, partitions[0]), (&two, partitions[1])] {
        assert_eq!(pending(sql).await, 0);
        for message in stored(sql, partition).await {
            assert_eq!(message.text().parse::<usize>().unwrap() % 2, 1);
        }
    }
    assert!(!test.cluster.cancel(ids[1]).await.unwrap());
    // In SQL, and in a transaction.
    let id = producer.deliver_after(HOUR, Message::new("x").key("1")).await.unwrap();
    let sql = if id.node.number() == 1 { &one } else { &two };
    let cancel = "select shardmq.cancel($1)";
    assert!(sql.query_one(cancel, &[&id.number]).await.unwrap().get::<_, bool>(0));
    assert!(!test.cluster.cancel(id).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_publishes_for_later_or_not_at_all() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    let (mut sql, watch) = (test.sql(0).await, test.sql(0).await);
    let due = SystemTime::now() + SECOND * 6;
    let transaction = sql.transaction().await.unwrap();
    producer.deliver_at_in(&transaction, due, Message::new("never")).await.unwrap();
    transaction.rollback().await.unwrap();
    let transaction = sql.transaction().await.unwrap();
    producer.deliver_at_in(&transaction, due, Message::new("then")).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(pending(&watch).await, 1);
    // One whose transaction ends when it is long due.
    let open = sql.transaction().await.unwrap();
    let soon = SystemTime::now() + SECOND / 10;
    producer.deliver_at_in(&open, soon, Message::new("late")).await.unwrap();
    let all = arrive(&watch, &partitions, 1).await;
    assert_eq!(texts(&all), ["then"]);
    open.commit().await.unwrap();
    assert_eq!(texts(&arrive(&watch, &partitions, 2).await), ["then", "late"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_outlive_their_server_and_their_relay() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 1).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    for n in 0..5_u32 {
        let delay = SECOND * 8 + SECOND / 5 * n;
        producer.deliver_after(delay, Message::new(n.to_string()).key("k")).await.unwrap();
    }
    server.restart(StopMode::Fast).await.unwrap();
    let sql = client(&test.node_urls[0]).await;
    assert!(pending(&sql).await > 0);
    let all = arrive(&sql, &partitions, 5).await;
    assert_eq!(texts(&all), ["0", "1", "2", "3", "4"]);
    relay.cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clock_of_the_node_decides_also_when_it_is_set_forward_and_back() {
    let test = TestCluster::new(1).await;
    let clocks = Clocks::of(&test).await;
    clocks.set("12:00").await;
    let partitions = topic(&test, "orders", 1).await;
    let relay = Relay::start(&test, "orders").await;
    let producer = relay.cluster.producer("orders").build().await.unwrap();
    let sql = test.sql(0).await;
    for n in [1, 2, 3] {
        producer.deliver_after(HOUR * n, Message::new(n.to_string()).key("k")).await.unwrap();
    }
    clocks.move_server("61 minutes").await;
    let began = Instant::now();
    assert_eq!(texts(&arrive(&sql, &partitions, 1).await), ["1"]);
    assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
    clocks.move_server("-1 hour").await;
    producer.deliver_after(SECOND / 5, Message::new("soon").key("k")).await.unwrap();
    assert_eq!(texts(&arrive(&sql, &partitions, 2).await), ["1", "soon"]);
    assert_eq!(pending(&sql).await, 2);
    clocks.move_server("5 hours").await;
    assert_eq!(texts(&arrive(&sql, &partitions, 4).await), ["1", "soon", "2", "3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_answer_was_lost_stores_nothing_twice() {
    let (test, proxy) = cluster_behind_proxy().await;
    topic(&test, "orders", 1).await;
    let builder = test.cluster.producer("orders").append_timeout(SECOND * 8);
    let producer = builder.build().await.unwrap();
    let sql = test.sql(0).await;
    // Warm: what follows is the call alone.
    let first = producer.deliver_after(HOUR, Message::new("first")).await.unwrap();
    proxy.to_client(Rule::Hold);
    let sending = producer.clone();
    let later = tokio::spawn(async move {
        let messages = [Message::new("x").key("k"), Message::new("y").key("k")];
        sending.deliver_all_after(HOUR, messages).await
    });
    let there = async || pending(&sql).await == 3;
    eventually("they are stored", SOON, there).await;
    // As if they were due, and relayed: only what is left of the call tells.
    let gone = "delete from shardmq.delayed where payload = 'x'";
    sql.batch_execute(gone).await.unwrap();
    // The answer is lost for good.
    proxy.cut();
    proxy.to_client(Rule::Pass);
    let answers = later.await.unwrap();
    let numbers: Vec<i64> = answers.into_iter().map(|id| id.unwrap().number).collect();
    assert_eq!(numbers, [first.number + 1, first.number + 2]);
    assert_eq!(pending(&sql).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_says_nothing_of_a_call_before_that_had_no_answer() {
    let (test, proxy) = cluster_behind_proxy().await;
    topic(&test, "orders", 1).await;
    let builder = test.cluster.producer("orders").append_timeout(SECOND / 2);
    let producer = builder.build().await.unwrap();
    let sql = test.sql(0).await;
    producer.deliver_after(HOUR, Message::new("first")).await.unwrap();
    proxy.to_client(Rule::Hold);
    let sending = producer.clone();
    let later = tokio::spawn(async move { sending.deliver_after(HOUR, Message::new("x")).await });
    let there = async || pending(&sql).await == 2;
    eventually("it is stored", SOON, there).await;
    let refuse = "create function public.no() returns trigger language plpgsql as
                      $$ begin raise check_violation; end $$;
                  create trigger no before insert on shardmq.delayed_call
                      for each row execute function public.no()";
    sql.batch_execute(refuse).await.unwrap();
    proxy.cut();
    proxy.to_client(Rule::Pass);
    assert_eq!(later.await.unwrap().unwrap_err().kind(), ErrorKind::Unknown);
    let refused = producer.deliver_after(HOUR, Message::new("y")).await.unwrap_err();
    assert_ne!(refused.kind(), ErrorKind::Unknown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_refused_before_anything_is_sent() {
    let test = TestCluster::new(1).await;
    topic(&test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let kind = |result: shardmq::Result<ScheduledId>| result.unwrap_err().kind();
    let far = Duration::from_hours(24 * 366 * 100);
    assert_eq!(kind(producer.deliver_after(far, Message::new("x")).await), ErrorKind::Invalid);
    assert_eq!(
        kind(producer.deliver_after(Duration::MAX, Message::new("x")).await),
        ErrorKind::Invalid
    );
    let far = SystemTime::now() + far;
    assert_eq!(kind(producer.deliver_at(far, Message::new("x")).await), ErrorKind::Invalid);
    let many = (0..=1_000).map(|n: i32| Message::new(n.to_string()));
    let results = producer.deliver_all_after(HOUR, many).await;
    assert_eq!(results.len(), 1_001);
    for result in results {
        let error = result.unwrap_err();
        assert!(error.to_string().contains("the limit is 1000"), "{error}");
    }
    // A message that is too large fails alone.
    let messages = [Message::new("x"), Message::new("").key("k".repeat(1_025)), Message::new("y")];
    let results = producer.deliver_all_after(HOUR, messages).await;
    assert!(results[0].is_ok() && results[2].is_ok());
    assert!(results[1].as_ref().unwrap_err().to_string().contains("1024"));
    let sql = test.sql(0).await;
    assert_eq!(pending(&sql).await, 2);
    let thousand = (0..1_000).map(|n: i32| Message::new(n.to_string()));
    assert!(producer.deliver_all_after(HOUR * 24 * 365, thousand).await.iter().all(Result::is_ok));
    assert_eq!(pending(&sql).await, 1_002);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_nobody_repeats_any_more_are_forgotten_however_many_they_are() {
    let test = TestCluster::new(1).await;
    let partitions = topic(&test, "orders", 1).await;
    let sql = test.sql(0).await;
    let call = "insert into shardmq.delayed_call
                select gen_random_uuid(), array[n], now() - make_interval(hours => $1)
                  from generate_series(1, $2::int) n";
    sql.execute(call, &[&4, &25_000]).await.unwrap();
    sql.execute(call, &[&2, &3]).await.unwrap();
    // Somebody whose transaction stays open keeps the relay awake.
    let mut other = test.sql(0).await;
    let open = other.transaction().await.unwrap();
    publish(&open, "orders", "open", Some("k")).await;
    let _relay = Relay::start(&test, "orders").await;
    publish(&sql, "orders", "meanwhile", Some("k")).await;
    arrive(&sql, &partitions, 1).await;
    let count = "select count(*) from shardmq.delayed_call";
    let forgotten = async || sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0) == 3;
    eventually("old calls are forgotten", SOON, forgotten).await;
    open.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_holds_up_no_messages_that_wait_on_others() {
    let (test, proxy) = cluster_behind_proxy().await;
    let other = database(shared_server().await).await;
    test.cluster.add_node(NodeId::new(2).unwrap(), &other).await.unwrap();
    topic(&test, "orders", 2).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let sql = client(&other).await;
    proxy.refuse(true);
    proxy.cut();
    let keys: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let there = keys.iter().filter(|key| shardmq::key_slot(key) >= shardmq::SLOTS / 2).count();
    let messages: Vec<Message> = keys.iter().map(|key| Message::new("x").key(key)).collect();
    let sent = tokio::spawn(async move { producer.deliver_all_after(HOUR, messages).await });
    let stored = async || pending(&sql).await == i64::try_from(there).unwrap();
    eventually("those of the other node are stored", SOON, stored).await;
    assert!(there > 0 && there < 20 && !sent.is_finished());
    proxy.refuse(false);
    assert!(sent.await.unwrap().iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_which_messages_wait_is_not_removed() {
    let test = TestCluster::new(2).await;
    let node = NodeId::new(2).unwrap();
    let sql = test.sql(1).await;
    for publish in ["'orders', ''", "'orders', '', null, null, now() + interval '1 hour'"] {
        sql.batch_execute(&format!("select shardmq.publish({publish})")).await.unwrap();
    }
    let error = test.cluster.remove_node(node).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("2 messages"), "{error}");
    sql.batch_execute("delete from shardmq.outbox; delete from shardmq.delayed").await.unwrap();
    test.cluster.remove_node(node).await.unwrap();
}
