use uuid::Uuid;

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
    let topic = TopicName::new("orders").unwrap();
    Topology { topic, id: Uuid::nil(), generation: 1, partitions, slots }
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

fn ask(routes: &mut Routes) -> Vec<String> {
    routes.unknown().ask(Instant::now())
}

/// Topics of these names exist.
fn exist(names: &[&str]) -> HashSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn dead(found: &Routed) -> Vec<i64> {
    let mut dead: Vec<i64> = found.step.dead.iter().map(|dead| dead.0).collect();
    dead.sort_unstable();
    dead
}

#[test]
fn that_there_is_no_such_topic_holds_for_those_that_were_there_when_it_was_asked() {
    let mut routes = Routes::default();
    let (stand, first) = (Stand::default(), [message(1, "new", None), message(3, "new", None)]);
    let found = routes.route(&first, &stand, now());
    assert!(found.step.targets.is_empty() && found.step.dead.is_empty());
    assert_eq!(ask(&mut routes), ["new"]);
    assert!(ask(&mut routes).is_empty(), "one question at a time");
    assert!(routes.released(Instant::now(), false).is_empty());
    // Another is published meanwhile: the topic may be there by then.
    let all = [message(1, "new", None), message(3, "new", None), message(4, "new", None)];
    routes.route(&all, &stand, now());
    routes.unknown().answered(vec!["new".to_owned()], &exist(&[]));
    assert!(routes.unknown().has_dead());
    let found = routes.route(&[], &stand, now());
    assert_eq!(dead(&found), [1, 3]);
    assert!(found.step.dead.iter().all(|dead| dead.2 == "topic new does not exist"));
    assert_eq!(ask(&mut routes), ["new"]);
    routes.unknown().answered(vec!["new".to_owned()], &exist(&["new"]));
    assert_eq!(routes.unknown().read(Instant::now()), ["new"]);
    // It was deleted, before its map was read.
    routes.unknown().has_read();
    routes.is_missing("new".to_owned(), "there is none");
    assert_eq!(dead(&routes.route(&[], &stand, now())), [4]);
    assert!(ask(&mut routes).is_empty() && routes.unknown().kept() == 0);
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
    let names = ask(&mut routes);
    routes.unknown().not_answered(names, Instant::now());
    let found = routes.route(&[message(3, "new", Some("k"))], &stand, now());
    assert!(found.step.targets.is_empty() && ask(&mut routes).is_empty());
    assert!(routes.released(Instant::now(), false).is_empty() && routes.retry_at().is_some());
    let later = Instant::now() + 2 * TRY_AGAIN;
    assert_eq!(routes.unknown().ask(later), ["new"]);
    routes.unknown().answered(vec!["new".to_owned()], &exist(&["new"]));
    assert_eq!(routes.unknown().read(later), ["new"]);
    let mut known = topology();
    known.topic = TopicName::new("new").unwrap();
    let mut learned = routes.learn(known);
    learned.ids.sort_unstable();
    assert_eq!((learned.ids.as_slice(), learned.for_later), (&[1, 3][..], false));
    let found = routes.route(&[message(1, "new", None)], &stand, now());
    assert_eq!(ids(&found.step.targets[0]), [1]);
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

/// Two messages for each of so many unknown topics, in rounds, are looked at 4,000 at a time, until
/// all are set aside. Returns how much was done, and how many questions were asked.
fn steps_for(topics: i64) -> (u64, usize) {
    let (mut routes, stand) = (Routes::default(), Stand::default());
    let all: Vec<Waiting> =
        (0..topics * 2).map(|n| message(n + 1, &format!("unknown{}", n % topics), None)).collect();
    let (mut dead, mut asked, mut looks, mut read) = (HashSet::new(), 0, 0_u64, 0);
    let mut looked: Vec<&[Waiting]> = all.chunks(4_000).rev().collect();
    while dead.len() < all.len() {
        let names = ask(&mut routes);
        if !names.is_empty() {
            asked += 1;
            routes.unknown().answered(names, &HashSet::new());
        }
        for (first, last) in routes.released(Instant::now(), !looked.is_empty()) {
            let place = |id: i64| usize::try_from(id).unwrap();
            looked.extend(all[place(first - 1)..place(last)].chunks(4_000).rev());
        }
        let messages = looked.pop().unwrap_or_default();
        looks += 1;
        read += messages.len() as u64;
        assert!(looks < 10_000, "{} of {} in the end", dead.len(), all.len());
        let found = routes.route(messages, &stand, now());
        assert!(found.step.targets.is_empty() && found.step.dead.len() <= 4_000);
        dead.extend(found.step.dead.iter().map(|dead| dead.0));
    }
    assert_eq!(routes.unknown().kept(), 0);
    (routes.unknown().steps + read, asked)
}

#[test]
fn an_unknown_topic_costs_the_same_however_many_there_are() {
    for topics in [1_000, 15_000, 30_000, 60_000] {
        let (once, twice) = (steps_for(topics), steps_for(topics * 2));
        assert!(twice.0 * 10 <= once.0 * 22, "{topics}: {once:?} {twice:?}");
        assert!(twice.1 <= once.1 * 2 + 1, "{topics}: {once:?} {twice:?}");
    }
}

#[test]
fn what_is_not_kept_is_read_again_before_what_comes_after_it() {
    let (mut routes, stand) = (Routes::default(), Stand::default());
    let of = |from: i64, to: i64| -> Vec<Waiting> {
        (from..to).map(|id| message(id, &format!("unknown{id}"), None)).collect()
    };
    routes.route(&of(1, 50_001), &stand, now());
    // No room any more.
    routes.route(&[message(50_001, "orders", Some("customer-42"))], &stand, now());
    routes.route(&of(50_002, 50_010), &stand, now());
    assert!(routes.released(Instant::now(), false).is_empty());
    routes.learn(topology());
    let behind = [message(50_010, "orders", Some("customer-42"))];
    assert!(routes.route(&behind, &stand, now()).step.targets.is_empty());
    while routes.unknown().kept() > 0 {
        let names = ask(&mut routes);
        routes.unknown().answered(names, &HashSet::new());
        routes.route(&[], &stand, now());
    }
    assert!(routes.released(Instant::now(), true).is_empty(), "something is looked at yet");
    assert_eq!(routes.released(Instant::now(), false), [(50_001, 50_010)]);
    let all = [message(50_001, "orders", Some("customer-42")), behind[0].clone()];
    let found = routes.route(&all, &stand, now());
    assert_eq!(ids(&found.step.targets[0]), [50_001, 50_010]);
}

#[test]
fn few_maps_are_read_at_once_and_every_topic_has_its_turn() {
    let (mut routes, stand) = (Routes::default(), Stand::default());
    let all: Vec<Waiting> = (1..=20).map(|id| message(id, &format!("t{id}"), None)).collect();
    routes.route(&all, &stand, now());
    let names = ask(&mut routes);
    let existing = names.iter().cloned().collect();
    routes.unknown().answered(names, &existing);
    let mut read = Vec::new();
    for _ in 0..20 {
        let now_read = routes.unknown().read(Instant::now());
        assert!(now_read.len() <= 8);
        for name in now_read {
            routes.unknown().has_read();
            let topic = TopicName::new(&name).unwrap();
            read.extend(routes.learn(Topology { topic, ..topology() }).ids);
        }
    }
    assert_eq!(read, (1..=20).collect::<Vec<_>>());
}
