//! Nodes that fail under a producer: what has no key goes on through the others, and nothing is lost,
//! or stored twice without saying so.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use shardmq::embedded::{Server, StopMode};
use shardmq::{
    Cluster, ErrorKind, KeyFailover, Message, NodeId, NodeState, Producer, ProducerBuilder,
    ProducerEvent, ProducerEvents, Receipt, TopicOptions, WhenFull,
};
use tokio::time::Instant;

use crate::support::proxy::{Link, Proxy, Rule};
use crate::support::{
    TestCluster, client, database, eventually, own_server, shared_server, within,
};

const SECOND: Duration = Duration::from_secs(1);
const MOMENT: Duration = Duration::from_millis(50);

/// Two nodes; the library reaches the second one through a proxy.
struct Pair {
    test: TestCluster,
    proxy: Proxy,
}

impl Pair {
    async fn new() -> Self {
        Self::with_second_on(shared_server().await).await
    }

    async fn with_second_on(second: &Server) -> Self {
        let node_urls = vec![database(shared_server().await).await, database(second).await];
        let proxy = Proxy::start(second.port()).await;
        let control_url = node_urls[0].clone();
        let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
        for (number, url) in [(1, node_urls[0].clone()), (2, proxy.url(&node_urls[1]))] {
            cluster.add_node(NodeId::new(number).unwrap(), &url).await.unwrap();
        }
        cluster.create_topic("orders", TopicOptions::partitions(4)).await.unwrap();
        Self { test: TestCluster { cluster, control_url, node_urls }, proxy }
    }

    /// A producer that probes often.
    fn producer(&self) -> ProducerBuilder {
        self.test.cluster.producer("orders").probe_interval(MOMENT, 4 * MOMENT)
    }

    /// The second node is gone: connections are cut, new ones closed at once.
    fn refuse(&self) {
        self.proxy.refuse(true);
        self.proxy.cut();
    }

    /// How often each payload is stored, and how many of these copies are marked.
    async fn copies(&self) -> HashMap<String, (usize, usize)> {
        let mut copies: HashMap<String, (usize, usize)> = HashMap::new();
        for url in &self.test.node_urls {
            let sql = client(url).await;
            let read = "select rtrim(convert_from(m.payload, 'UTF8')), coalesce(m.headers ? 'shardmq.duplicate', false)
                          from shardmq.partition p, shardmq.messages(p.partition, 0, 1000000) m";
            for row in sql.query(read, &[]).await.unwrap() {
                let entry = copies.entry(row.get(0)).or_default();
                entry.0 += 1;
                entry.1 += usize::from(row.get::<_, bool>(1));
            }
        }
        copies
    }
}

/// A key whose partition is on this node.
async fn key_on(test: &TestCluster, node: u8) -> String {
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for n in 0.. {
        let key = format!("key-{n}");
        let id = producer.send(Message::new("probe").key(&key)).await.unwrap();
        if id.partition().node().number() == node {
            return key;
        }
    }
    unreachable!("some key is")
}

/// Sends messages one after the other, each within a time; returns the nodes that took them.
async fn send(producer: &Producer, name: &str, count: usize, limit: Duration) -> Vec<u32> {
    let mut nodes = Vec::new();
    for n in 0..count {
        let sent = producer.send(Message::new(format!("{name}{n}")));
        let id = within(limit, "an answer", sent).await;
        let id = id.unwrap_or_else(|error| panic!("{name}{n}: {}", error.chain()));
        nodes.push(id.partition().node().number().into());
    }
    nodes
}

async fn event(events: &mut ProducerEvents, wanted: impl Fn(&ProducerEvent) -> bool) {
    let found = async {
        while let Some(event) = events.next().await {
            if wanted(&event) {
                return;
            }
        }
        panic!("the events ended");
    };
    within(15 * SECOND, "an event", found).await;
}

fn is_up(event: &ProducerEvent) -> bool {
    matches!(event, ProducerEvent::NodeUp { node, .. } if node.number() == 2)
}

fn is_down(event: &ProducerEvent) -> bool {
    matches!(event, ProducerEvent::NodeDown { node, .. } if node.number() == 2)
}

/// So many different messages are stored, and of each at most one copy without a mark.
fn assert_only_marked_copies(copies: &HashMap<String, (usize, usize)>, messages: usize) {
    assert_eq!(copies.len(), messages);
    for (text, (copies, marked)) in copies {
        assert!(*copies <= marked + 1, "{text}: {copies} copies, {marked} marked");
    }
}

/// A payload that the proxy takes for a large one.
fn large(text: &str) -> Message {
    Message::new(format!("{text}{}", " ".repeat(12_000)))
}

/// Sends large messages until one is held on its way to the second node.
async fn until_held(pair: &Pair, producer: &Producer) -> (Vec<Receipt>, Arc<Link>) {
    pair.proxy.to_server(Rule::HoldLarge(8_000));
    let mut receipts = Vec::new();
    loop {
        if let Some(held) = pair.proxy.holding(8_000) {
            return (receipts, held);
        }
        receipts.push(producer.enqueue(large(&format!("l{}", receipts.len()))).await.unwrap());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Sends some more, and waits until all are answered, in time. How many there were.
async fn all_answered(producer: &Producer, mut receipts: Vec<Receipt>) -> usize {
    for n in 0..400 {
        receipts.push(producer.enqueue(Message::new(format!("m{n}"))).await.unwrap());
    }
    let sent = within(15 * SECOND, "all are answered", join_all(receipts)).await;
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    sent.len()
}

/// The state of the second node, as the producer sees it.
fn second(producer: &Producer) -> NodeState {
    producer.status().nodes[1].state
}

/// Its share of round robin returns: messages sent one after the other go to each node in turn, as long as
/// no append takes so long that its node counts as slow. How many were sent.
async fn has_its_share(producer: &Producer, name: &str) -> usize {
    let until = Instant::now() + 15 * SECOND;
    let mut sent = 0;
    loop {
        let nodes = send(producer, &format!("{name}-{sent}-"), 40, 10 * SECOND).await;
        sent += nodes.len();
        let count = nodes.iter().filter(|node| **node == 2).count();
        if (15..=25).contains(&count) {
            return sent;
        }
        assert!(Instant::now() < until, "{nodes:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_refuses_is_gone_around_and_has_its_share_when_it_is_back() {
    let pair = Pair::new().await;
    let producer = pair.producer().build().await.unwrap();
    let mut events = producer.events();
    let mut sent = has_its_share(&producer, "first").await;
    pair.refuse();
    let nodes = send(&producer, "away", 60, 10 * SECOND).await;
    sent += nodes.len();
    assert!(nodes[10..].iter().all(|node| *node == 1), "{nodes:?}");
    event(&mut events, is_down).await;
    let only_one = || async {
        let status = producer.status();
        (status.nodes[0].state, status.nodes[1].state) == (NodeState::Up, NodeState::Down)
    };
    eventually("only the first is up", 15 * SECOND, only_one).await;
    let status = producer.status();
    assert!(status.nodes[1].error.as_ref().unwrap().contains("node 02"), "{status:?}");
    pair.proxy.refuse(false);
    event(&mut events, is_up).await;
    sent += has_its_share(&producer, "second").await;
    // The one that was under way may have been stored, for all that anybody could tell.
    assert_only_marked_copies(&pair.copies().await, sent);
}

/// Neither the messages under way nor those behind them wait for a node that takes everything and says
/// nothing. What it had been sent comes to it late, so that some are there twice: these say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hangs_holds_nothing_up_and_copies_are_marked() {
    let pair = Pair::new().await;
    let producer = pair.producer().build().await.unwrap();
    let mut events = producer.events();
    send(&producer, "before", 8, 10 * SECOND).await;
    let (receipts, held) = until_held(&pair, &producer).await;
    pair.proxy.to_server(Rule::Hold);
    let sent = all_answered(&producer, receipts).await;
    event(&mut events, |event| matches!(event, ProducerEvent::PossibleDuplicates { .. })).await;
    let all = send(&producer, "new", 20, 10 * SECOND).await;
    assert!(all.iter().all(|node| *node == 1), "{all:?}");
    pair.proxy.to_server(Rule::Pass);
    eventually("it is back", 15 * SECOND, || async { second(&producer) == NodeState::Up }).await;
    // The server closes what was given up when it has come to its end.
    let done = || async { held.to_client.ended() };
    eventually("what was held is done", 15 * SECOND, done).await;
    let copies = pair.copies().await;
    assert_only_marked_copies(&copies, sent + 8 + 20);
    assert!(copies.values().any(|(copies, _)| *copies > 1), "the originals came late");
}

/// Only the connection hangs: the node says that it has not stored the batch and never will. It goes
/// elsewhere without a mark, and the original is turned away when it arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_can_be_asked_stores_nothing_twice() {
    let pair = Pair::new().await;
    let producer = pair.producer().build().await.unwrap();
    send(&producer, "before", 8, 10 * SECOND).await;
    let (receipts, held) = until_held(&pair, &producer).await;
    pair.proxy.to_server_but_on(Rule::Pass, Some(&held));
    let sent = all_answered(&producer, receipts).await;
    held.to_server.set(Rule::Pass);
    let over = || async { held.to_client.ended() };
    eventually("the originals have arrived", 15 * SECOND, over).await;
    let copies = pair.copies().await;
    assert_eq!(copies.len(), sent + 8);
    assert!(copies.values().all(|(copies, marked)| (*copies, *marked) == (1, 0)), "{copies:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_with_a_key_wait_fail_or_go_elsewhere_as_configured() {
    let pair = Pair::new().await;
    let key = key_on(&pair.test, 2).await;
    let of = |failover| pair.producer().key_failover(failover).build();
    let waiting = of(KeyFailover::Wait).await.unwrap();
    let failing = of(KeyFailover::Fail).await.unwrap();
    let diverting = of(KeyFailover::Divert).await.unwrap();
    pair.refuse();
    let message = |text: &str| Message::new(text.to_owned()).key(&key);
    let first = waiting.enqueue(message("w1")).await.unwrap();
    let second = waiting.enqueue(message("w2")).await.unwrap();
    // Once it is known to be down: before that the message may be under way.
    let known = || async {
        send(&failing, "probe", 1, 10 * SECOND).await;
        crate::failover::second(&failing) == NodeState::Down
    };
    eventually("it is known to be down", 15 * SECOND, known).await;
    let error = within(10 * SECOND, "a failure", failing.send(message("f"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("node 02 is down"), "{}", error.chain());
    let diverted = within(10 * SECOND, "a detour", diverting.send(message("d"))).await.unwrap();
    assert_eq!(diverted.partition().node().number(), 1);
    assert!(matches!(waiting.status().nodes[1].state, NodeState::Down));
    pair.proxy.refuse(false);
    let first = within(15 * SECOND, "the node is back", first).await.unwrap();
    let second = within(15 * SECOND, "the next one", second).await.unwrap();
    assert!(first < second && first.partition() == second.partition());
    assert_eq!(first.partition().node().number(), 2);
    let copies = pair.copies().await;
    assert!(!copies.contains_key("f") && copies["w1"] == (1, 0) && copies["d"] == (1, 0));
}

/// Another node does not know what was sent to this one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_with_dedup_keys_wait_for_their_node_or_fail_and_never_leave_it() {
    let pair = Pair::new().await;
    let key = key_on(&pair.test, 2).await;
    let message = || Message::new("once").dedup_key(&key);
    let of = |failover| pair.producer().key_failover(failover).build();
    let failing = of(KeyFailover::Fail).await.unwrap();
    let waiting = of(KeyFailover::Wait).await.unwrap();
    let diverting = of(KeyFailover::Divert).await.unwrap();
    pair.refuse();
    let mut receipts = Vec::new();
    for producer in [&waiting, &diverting, &diverting] {
        receipts.push(producer.enqueue(message()).await.unwrap());
    }
    for producer in [&failing, &diverting] {
        let known = || async {
            send(producer, "probe", 1, 10 * SECOND).await;
            second(producer) == NodeState::Down
        };
        eventually("it is known to be down", 15 * SECOND, known).await;
    }
    let error = within(10 * SECOND, "a failure", failing.send(message())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("node 02 is down"), "{}", error.chain());
    // One that waits in its lane, and one that is sent while the node is known to be down.
    receipts.push(diverting.enqueue(message()).await.unwrap());
    let waited = tokio::time::timeout(SECOND, &mut receipts[3]).await;
    assert!(waited.is_err(), "it went elsewhere");
    pair.proxy.refuse(false);
    let first = within(15 * SECOND, "the node is back", receipts.remove(0)).await.unwrap();
    assert_eq!(first.partition().node().number(), 2);
    for receipt in receipts {
        assert_eq!(within(15 * SECOND, "the others", receipt).await.unwrap(), first);
    }
    assert_eq!(pair.copies().await["once"], (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_no_node_left_the_error_names_each_and_why() {
    let pair = Pair::new().await;
    pair.refuse();
    let server = own_server().await;
    let lonely = Pair::with_second_on(&server).await;
    // Only the second node has partitions of this topic.
    let options = TopicOptions::partitions(2).nodes([NodeId::new(2).unwrap()]);
    lonely.test.cluster.create_topic("alone", options).await.unwrap();
    let producer = lonely.test.cluster.producer("alone").send_timeout(SECOND);
    let producer = producer.build().await.unwrap();
    lonely.refuse();
    let error = producer.send(Message::new("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let text = error.chain();
    assert!(text.contains("no node is left: node 02 (for ") && text.contains("connect"), "{text}");
}

/// A server that is up and does not write: a standby, or one whose disk is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_write_is_gone_around() {
    let server = own_server().await;
    let pair = Pair::with_second_on(&server).await;
    let producer = pair.producer().build().await.unwrap();
    send(&producer, "before", 8, 10 * SECOND).await;

    let signal = server.data_dir().join("standby.signal");
    server.stop_server(StopMode::Fast).await.unwrap();
    std::fs::write(&signal, "").unwrap();
    server.start_server().await.unwrap();
    let nodes = send(&producer, "standby", 30, 10 * SECOND).await;
    assert!(nodes.iter().all(|node| *node == 1), "{nodes:?}");
    server.stop_server(StopMode::Fast).await.unwrap();
    std::fs::remove_file(&signal).unwrap();
    server.start_server().await.unwrap();
    eventually("it is back", 15 * SECOND, || async { second(&producer) == NodeState::Up }).await;
    has_its_share(&producer, "third").await;

    let sql = client(&pair.test.node_urls[1]).await;
    sql.batch_execute(
        "create function shardmq.no_space() returns trigger language plpgsql as
             $$ begin raise exception 'could not extend file' using errcode = 'disk_full'; end $$;
         do $$ declare t regclass; begin
             for t in select c.oid from pg_class c where relname like 'batch\\_%' and relkind = 'r' loop
                 execute format('create trigger no_space before insert on %s execute function shardmq.no_space()', t);
             end loop; end $$",
    )
    .await
    .unwrap();
    let nodes = send(&producer, "full", 60, 10 * SECOND).await;
    // It answers probes, so that it is tried now and then.
    assert!(nodes.iter().all(|node| *node == 1), "{nodes:?}");
    sql.batch_execute("drop function shardmq.no_space() cascade").await.unwrap();
    eventually("it is back", 15 * SECOND, || async {
        send(&producer, "again", 1, 10 * SECOND).await == [2]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_is_dropped_says_what_it_did_not_send() {
    let pair = Pair::new().await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    pair.test.cluster.create_topic("alone", options).await.unwrap();
    let producer = pair.test.cluster.producer("alone").build().await.unwrap();
    producer.send(Message::new("before")).await.unwrap();
    pair.proxy.to_server(Rule::HoldLarge(8_000));
    let under_way = producer.enqueue(large("under way")).await.unwrap();
    let held = || async { pair.proxy.holding(8_000).is_some() };
    eventually("it is under way", 15 * SECOND, held).await;
    let mut unsent = Vec::new();
    for n in 0..10 {
        unsent.push(producer.enqueue(Message::new(format!("m{n}"))).await.unwrap());
    }
    drop(producer);
    for receipt in unsent {
        let error = within(10 * SECOND, "an answer", receipt).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
    pair.proxy.to_server(Rule::Pass);
    let answer = within(10 * SECOND, "what was under way", under_way).await;
    answer.unwrap_or_else(|error| panic!("{}", error.chain()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_buffer_makes_senders_wait_and_says_so() {
    let pair = Pair::new().await;
    let options = TopicOptions::partitions(1).nodes([NodeId::new(2).unwrap()]);
    pair.test.cluster.create_topic("alone", options).await.unwrap();
    let builder = || pair.test.cluster.producer("alone").buffer_bytes(64 << 10);
    let producer = builder().build().await.unwrap();
    let mut events = producer.events();
    pair.proxy.to_server(Rule::Hold);
    let first = producer.enqueue(Message::new(vec![0; 60_000])).await.unwrap();
    let waiting = tokio::spawn({
        let producer = producer.clone();
        async move { producer.send(Message::new(vec![1; 60_000])).await }
    });
    event(&mut events, |event| matches!(event, ProducerEvent::Throttled)).await;
    let status = producer.status();
    assert_eq!((status.waiting, status.buffer_bytes), (1, 64 << 10));
    assert!(status.buffered_bytes >= 60_000);
    pair.proxy.to_server(Rule::Pass);
    event(&mut events, |event| matches!(event, ProducerEvent::Resumed)).await;
    first.await.unwrap();
    waiting.await.unwrap().unwrap();

    pair.proxy.to_server(Rule::Hold);
    let producer = builder().when_full(WhenFull::Fail).build().await.unwrap();
    let _first = producer.enqueue(Message::new(vec![0; 60_000])).await.unwrap();
    let error = producer.enqueue(Message::new(vec![1; 60_000])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    pair.proxy.to_server(Rule::Pass);
}
