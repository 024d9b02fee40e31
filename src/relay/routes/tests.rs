use super::*;
use crate::topology::even_slots;

/// Nodes that are away, and partitions that something waits for.
#[derive(Default)]
struct Stand {
    away: Vec<NodeId>,
    busy: Vec<PartitionId>,
}

impl Fares for Stand {
    fn is_away(&self, node: NodeId) -> bool {
        self.away.contains(&node)
    }

    fn is_busy(&self, partition: PartitionId) -> bool {
        self.busy.contains(&partition)
    }
}

fn partitions() -> Vec<PartitionId> {
    [10_101, 10_102, 10_201, 10_202].map(|n| PartitionId::try_from(n).unwrap()).to_vec()
}

fn topology() -> Topology {
    let partitions = partitions();
    let slots = even_slots(&partitions);
    Topology { topic: TopicName::new("orders").unwrap(), generation: 1, partitions, slots }
}

fn message(id: i64, topic: &str, key: Option<&str>) -> Waiting {
    let key = key.map(str::to_owned);
    Waiting { id, topic: Some(topic.to_owned()), key, bytes: 100, due_at: None }
}

fn now() -> (Instant, SystemTime) {
    (Instant::now(), SystemTime::now())
}

fn ids(target: &Target) -> Vec<i64> {
    target.messages.iter().map(|message| message.0).collect()
}

#[test]
fn keys_go_by_their_slot_and_the_rest_to_whoever_is_free() {
    let mut routes = Routes::default();
    routes.learn(topology());
    let stand = Stand { away: vec![NodeId::new(1).unwrap()], busy: vec![partitions()[2]] };
    let messages: Vec<Waiting> = (1..=3_000)
        .map(|id| message(id, "orders", (id % 2 == 0).then_some("customer-42")))
        .collect();
    let found = routes.route(&messages, &stand, now());
    // Slot 5,299 belongs to the second of four, also while its node is away.
    let keyed: Vec<&Target> =
        found.step.targets.iter().filter(|target| ids(target)[0] % 2 == 0).collect();
    assert!(keyed.iter().all(|target| target.partition == partitions()[1]));
    let keyed: Vec<i64> = keyed.iter().flat_map(|target| ids(target)).collect();
    assert_eq!(keyed, (1..=1_500).map(|n| n * 2).collect::<Vec<_>>());
    let mut free = found.step.targets.iter().filter(|target| ids(target)[0] % 2 == 1);
    assert_eq!(free.next().unwrap().partition, partitions()[3]);
    assert_eq!(free.next().unwrap().partition.node().number(), 2);
    assert!(found.step.targets.iter().all(|target| target.messages.len() <= 1_000));
}

#[test]
fn that_there_is_no_such_topic_holds_for_those_that_were_there_when_it_was_asked() {
    let mut routes = Routes::default();
    let (stand, first) = (Stand::default(), [message(1, "new", None), message(3, "new", None)]);
    let found = routes.route(&first, &stand, now());
    assert_eq!((found.ask.as_slice(), found.step.targets.len()), (&["new".to_owned()][..], 0));
    assert!(routes.released(Instant::now(), false).is_empty());
    routes.is_missing("new".to_owned(), "there is none".to_owned());
    assert_eq!(routes.released(Instant::now(), false), [(1, 3)]);
    // Another was published meanwhile: the topic may be there by then.
    let all = [message(1, "new", None), message(3, "new", None), message(4, "new", None)];
    let found = routes.route(&all, &stand, now());
    let dead: Vec<i64> = found.step.dead.iter().map(|dead| dead.0).collect();
    assert_eq!((dead, found.ask), (vec![1, 3], vec!["new".to_owned()]));
}

#[test]
fn what_waits_for_a_topic_holds_up_no_other_and_comes_in_order() {
    let mut routes = Routes::default();
    routes.learn(topology());
    let stand = Stand::default();
    let messages = [message(1, "new", Some("k")), message(2, "orders", Some("k"))];
    let found = routes.route(&messages, &stand, now());
    assert_eq!(ids(&found.step.targets[0]), [2]);
    // The control database is away, and more comes.
    routes.is_away("new".to_owned(), Instant::now());
    let found = routes.route(&[message(3, "new", Some("k"))], &stand, now());
    assert!(found.step.targets.is_empty() && found.ask.is_empty());
    assert!(routes.released(Instant::now(), false).is_empty() && routes.retry_at().is_some());
    // The first asks again, and the rest with it once there is an answer.
    let later = Instant::now() + 2 * ASK_AGAIN;
    assert_eq!(routes.released(later, false), [(1, 1)]);
    let found = routes.route(&messages[..1], &stand, (later, SystemTime::now()));
    assert_eq!(found.ask, ["new"]);
    assert!(routes.released(later, false).is_empty());
    let mut known = topology();
    known.topic = TopicName::new("new").unwrap();
    routes.learn(known);
    assert_eq!(routes.released(later, true), [(1, 3)]);
}

#[test]
fn of_many_that_wait_for_a_partition_the_first_is_tried_alone() {
    let mut routes = Routes::default();
    routes.learn(topology());
    let (stand, partition) = (Stand::default(), partitions()[1]);
    routes.closed.insert(partition, Closed::Until(Instant::now() + CLOSED));
    let all: Vec<Waiting> =
        (1..=100).map(|id| message(id, "orders", Some("customer-42"))).collect();
    let at = |secs| Instant::now() + Duration::from_secs(secs);
    routes.route(&all, &stand, now());
    assert!(routes.released(at(4), true).is_empty(), "there is something to look at");
    assert_eq!(routes.released(at(4), false), [(1, 1)]);
    assert!(routes.route(&all[..1], &stand, now()).step.targets.is_empty());
    assert!(routes.released(at(0), false).is_empty());
    // It is open by now.
    assert_eq!(routes.released(at(8), false), [(1, 1)]);
    assert!(routes.released(at(8), true).is_empty(), "it was not looked at yet");
    let later = (at(8), SystemTime::now());
    let newer = [all[0].clone(), message(200, "orders", Some("customer-42"))];
    let found = routes.route(&newer, &stand, later);
    assert_eq!(found.step.targets.iter().flat_map(ids).collect::<Vec<_>>(), [1]);
    assert_eq!(routes.released(at(8), false), [(2, 200)]);
    let found = routes.route(&all[1..], &stand, later);
    assert_eq!(found.step.targets.iter().map(|t| t.messages.len()).sum::<usize>(), 99);
}

#[test]
fn keyed_messages_wait_for_a_partition_that_has_refused_some_until_those_are_back() {
    let mut routes = Routes::default();
    routes.learn(topology());
    let (stand, partition) = (Stand::default(), partitions()[1]);
    let name = TopicName::new("orders").unwrap();
    routes.has_refused(&name, partition, Instant::now());
    let all = [message(1, "orders", Some("customer-42")), message(2, "orders", Some("a"))];
    let found = routes.route(&all, &stand, now());
    assert!(found.step.targets.is_empty(), "the topic waits: {:?}", found.step.targets);
    routes.settle(|_| false);
    assert!(routes.released(Instant::now(), false).is_empty());
    routes.settle(|_| true);
    assert_eq!(routes.released(Instant::now(), false), [(1, 2)]);
    routes.learn(topology());
    let found = routes.route(&all, &stand, now());
    assert_eq!(found.step.targets.len(), 1);
    assert_eq!(ids(&found.step.targets[0]), [2]);
    // It waits, and so does what comes after it, also when the partition is open by then.
    let later = (Instant::now() + 2 * CLOSED, SystemTime::now());
    let found = routes.route(&[message(5, "orders", Some("customer-42"))], &stand, later);
    assert!(found.step.targets.is_empty());
    assert!(routes.released(Instant::now(), false).is_empty());
    // Keys may have other partitions: what waits is looked at with what comes.
    routes.forget_topics();
    assert_eq!(routes.released(Instant::now(), false), [(1, 5)]);
}

#[test]
fn few_topics_are_asked_for_at_once_and_those_that_are_missing_are_not_all_kept() {
    let (mut routes, stand) = (Routes::default(), Stand::default());
    let all: Vec<Waiting> =
        (1..=100).map(|id| message(id, &format!("unknown{id}"), None)).collect();
    let (mut at, mut dead) = (Instant::now(), 0);
    for _ in 0..100 {
        let found = routes.route(&all, &stand, (at, SystemTime::now()));
        assert!(found.ask.len() <= MAX_ASKED, "{:?}", found.ask);
        dead = dead.max(found.step.dead.len());
        for topic in found.ask {
            routes.is_missing(topic, "there is none".to_owned());
        }
        at += ASK_NEXT;
    }
    assert_eq!(dead, 100);
    for id in 0..=MAX_TOPICS {
        routes.is_missing(format!("gone{id}"), "there is none".to_owned());
    }
    routes.route(&[], &stand, now());
    assert!(routes.topics.is_empty());
}
