//! What a group has given up: looked at, given to it again, dropped.

use shardmq::{DeadLetterId, GroupName, Message, TopicName};

use tokio::sync::Notify;

use super::*;
use crate::support::clocks::{Clocks, look_after};

fn of_group(group: &str) -> DeadLetterFilter {
    DeadLetterFilter { group: Some(GroupName::new(group).unwrap()), ..DeadLetterFilter::default() }
}

/// Rejects so many; the errors are numbered.
async fn reject(messages: &mut Messages, count: usize) {
    for n in 0..count {
        next(messages).await.reject(format!("error {n}"));
    }
}

async fn buried(test: &TestCluster, expected: usize) {
    eventually("all are dead", SOON, async || letters(test).await.len() == expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_is_the_whole_message() {
    let (test, _, _) = ready().await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    let message = Message::new(&b"\0\xff"[..]).key("k\u{fc}").header("h", "v");
    let id = producer.send(message).await.unwrap();
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let delivery = next(&mut messages).await;
    let uid = delivery.uid().to_string();
    delivery.reject("no\0thing");
    buried(&test, 1).await;
    let letter = letters(&test).await.remove(0);
    let stored = test.cluster.message(id).await.unwrap().unwrap();
    assert_eq!((&letter.message, &letter.message.uid), (&stored, &uid));
    assert_eq!(letter.failures[0].error, "no\u{fffd}thing");
    assert_eq!(test.cluster.dead_letter(letter.id).await.unwrap(), Some(letter.clone()));
    let other = DeadLetterId { number: 1_000, ..letter.id };
    assert_eq!(test.cluster.dead_letter(other).await.unwrap(), None);
    assert_eq!(letter.id.to_string().parse::<DeadLetterId>().unwrap(), letter.id);
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_goes_to_its_group_again_and_to_no_other() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 1..=2).await;
    // It would look for what comes again when it renews its lease, too.
    let builder = consumer(&test, Order::ByPartition).lease(600 * SECOND);
    let mut ours = builder.stream().await.unwrap();
    let others = test.cluster.consumer("orders", "others").poll_interval(SECOND / 5);
    let mut others = others.stream().await.unwrap();
    assert_eq!(texts_until(&mut others, "2").await, ["1"]);
    reject(&mut ours, 1).await;
    assert_eq!(texts_until(&mut ours, "2").await, Vec::<String>::new());
    buried(&test, 1).await;
    let moved = test.cluster.retry_dead_letters(&of_group("g"), |_| {}).await.unwrap();
    assert_eq!((moved.moved, moved.unreachable.len()), (1, 0));
    let again = next(&mut ours).await;
    assert_eq!((text(&again).as_str(), again.attempt()), ("1", 1));
    assert_eq!(again.failures()[0].error, "error 0", "its history stays");
    again.retry("still bad");
    // Though the order is by partition it holds nothing up now: those behind it have passed it.
    append_texts(&sql, partition, 3..=3).await;
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        let delivery = next(&mut ours).await;
        seen.insert((text(&delivery), delivery.attempt()));
        delivery.ack().unwrap();
    }
    assert_eq!(seen, BTreeSet::from([("1".to_owned(), 2), ("3".to_owned(), 1)]));
    assert_eq!(texts_until(&mut others, "3").await, Vec::<String>::new());
    ours.shutdown(SECOND).await.unwrap();
    others.shutdown(SECOND).await.unwrap();
    assert_eq!((count(&sql, "retry").await, count(&sql, "dead_letter").await), (0, 0));
}

/// Given to the group again, it is never in hand together with another of its partition.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_an_order_what_comes_again_has_its_turn_like_all_others() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 0..20).await;
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    reject(&mut messages, 20).await;
    buried(&test, 20).await;
    messages.shutdown(SECOND).await.unwrap();
    append_texts(&sql, partition, 20..40).await;
    test.cluster.retry_dead_letters(&of_group("g"), |_| {}).await.unwrap();
    let messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    let handle = messages.handle();
    let (in_hand, most, done) = (
        Arc::<AtomicUsize>::default(),
        Arc::<AtomicUsize>::default(),
        Arc::<AtomicUsize>::default(),
    );
    let counts = (Arc::clone(&in_hand), Arc::clone(&most), Arc::clone(&done));
    let running = tokio::spawn(messages.run(8, move |_| {
        let (in_hand, most, done) = counts.clone();
        async move {
            most.fetch_max(in_hand.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            in_hand.fetch_sub(1, Ordering::SeqCst);
            done.fetch_add(1, Ordering::SeqCst);
            Ok::<(), String>(())
        }
    }));
    eventually("all are done", SOON, async || done.load(Ordering::SeqCst) == 40).await;
    handle.shutdown(SECOND).await.unwrap();
    within(SOON, "the run ends", running).await.unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 1);
    assert_eq!(count(&sql, "retry").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_is_filtered_and_comes_in_pages() {
    let test = TestCluster::new(2).await;
    let partitions = topic(&test, "orders", 2).await;
    for (partition, node) in partitions.iter().zip(0..) {
        append_texts(&test.sql(node).await, *partition, 0..5).await;
    }
    let mut messages = consumer(&test, Order::ByPartition).stream().await.unwrap();
    for _ in 0..10 {
        let delivery = next(&mut messages).await;
        let why = format!("{} of {}", text(&delivery), delivery.partition());
        delivery.reject(why);
    }
    buried(&test, 10).await;
    let (mut after, mut pages) = (None, Vec::new());
    loop {
        let page = test.cluster.dead_letters(&of_group("g"), after, 4).await.unwrap();
        after = page.letters.last().map(|letter| letter.id);
        pages.extend(page.letters.into_iter().map(|letter| letter.id));
        if !page.more {
            break;
        }
    }
    let all: Vec<_> = letters(&test).await.into_iter().map(|letter| letter.id).collect();
    assert_eq!((pages.len(), &pages), (10, &all));
    let of = async |filter: DeadLetterFilter| {
        test.cluster.dead_letters(&filter, None, 100).await.unwrap().letters.len()
    };
    let any = DeadLetterFilter::default;
    let topic = |name: &str| Some(TopicName::new(name).unwrap());
    assert_eq!(of(DeadLetterFilter { partition: Some(partitions[1]), ..any() }).await, 5);
    assert_eq!(of(DeadLetterFilter { error: Some("3 of".to_owned()), ..any() }).await, 2);
    assert_eq!(of(DeadLetterFilter { ids: Some(all[3..6].to_vec()), ..any() }).await, 3);
    assert_eq!(of(DeadLetterFilter { ids: Some(Vec::new()), ..any() }).await, 0);
    assert_eq!(of(DeadLetterFilter { topic: topic("orders"), ..any() }).await, 10);
    assert_eq!(of(DeadLetterFilter { topic: topic("others"), ..any() }).await, 0);
    assert_eq!(of(of_group("h")).await, 0);
    let some = DeadLetterFilter { error: Some("3 of".to_owned()), ..any() };
    assert_eq!(test.cluster.drop_dead_letters(&some, |_| {}).await.unwrap().moved, 2);
    assert_eq!(letters(&test).await.len(), 8);
    messages.shutdown(SECOND).await.unwrap();
}

/// Cut off in the middle and called again: each comes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_retry_that_is_cut_off_is_taken_up_again() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 0..1_200).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    reject(&mut messages, 1_200).await;
    let all = async || count(&sql, "dead_letter").await == 1_200;
    eventually("all are dead", SOON, all).await;
    let (told, some, filter) = (AtomicUsize::new(0), Notify::new(), of_group("g"));
    let cut = test.cluster.retry_dead_letters(&filter, |count| {
        told.store(usize::try_from(count).unwrap(), Ordering::SeqCst);
        some.notify_one();
    });
    // Dropped as soon as some were moved.
    tokio::select! {
        biased;
        () = some.notified() => {}
        _ = cut => {}
    }
    let first = told.load(Ordering::SeqCst);
    assert!((1..1_200).contains(&first), "{first}");
    let rest = test.cluster.retry_dead_letters(&filter, |_| {}).await.unwrap().moved;
    assert!(first as u64 + rest <= 1_200, "{first} and {rest}");
    let mut seen = BTreeMap::<u32, u32>::new();
    while seen.len() < 1_200 {
        let delivery = next(&mut messages).await;
        *seen.entry(text(&delivery).parse().unwrap()).or_default() += 1;
        delivery.ack().unwrap();
    }
    assert!(seen.values().all(|times| *times == 1));
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!((count(&sql, "retry").await, count(&sql, "dead_letter").await), (0, 0));
}

/// As large ones on a slow disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_retry_takes_the_time_that_it_takes() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 0..120).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    reject(&mut messages, 120).await;
    buried(&test, 120).await;
    let slow = "create function public.slow() returns trigger language plpgsql as
                    $$ begin perform pg_sleep(0.06); return new; end $$;
                create trigger slow before insert on shardmq.retry
                    for each row execute function public.slow()";
    sql.batch_execute(slow).await.unwrap();
    let mut told = Vec::new();
    let moved = test.cluster.retry_dead_letters(&of_group("g"), |count| told.push(count)).await;
    let moved = moved.unwrap();
    assert_eq!((moved.moved, moved.unreachable.len()), (120, 0), "{told:?}");
    // What takes long comes in smaller portions.
    let portions = told.iter().zip(&told[1..]).map(|(before, after)| after - before);
    assert!(told.len() > 1 && portions.clone().all(|portion| portion < told[0]), "{told:?}");
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_a_group_that_is_gone_stay_until_their_time_is_over() {
    let (test, partition, sql) = ready().await;
    let clocks = Clocks::of(&test).await;
    append_texts(&sql, partition, 0..2).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    reject(&mut messages, 1).await;
    next(&mut messages).await.retry_after(3600 * SECOND, "later");
    buried(&test, 1).await;
    eventually("one is parked", SOON, async || count(&sql, "retry").await == 1).await;
    messages.shutdown(SECOND).await.unwrap();
    test.cluster.delete_group("orders", "g").await.unwrap();
    assert_eq!(count(&sql, "retry").await, 0, "what was to be tried again goes with its group");
    let moved = test.cluster.retry_dead_letters(&of_group("g"), |_| {}).await.unwrap();
    assert_eq!((moved.moved, letters(&test).await.len()), (0, 1));
    clocks.move_server("29 days").await;
    look_after(&test).await;
    assert_eq!(letters(&test).await.len(), 1);
    clocks.move_server("2 days").await;
    look_after(&test).await;
    assert_eq!(letters(&test).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_deleted_topic_is_left_under_its_partitions_numbers() {
    let (test, partition, sql) = ready().await;
    append_texts(&sql, partition, 0..2).await;
    let mut messages = consumer(&test, Order::Unordered).stream().await.unwrap();
    reject(&mut messages, 1).await;
    next(&mut messages).await.retry_after(3600 * SECOND, "later");
    buried(&test, 1).await;
    eventually("one is parked", SOON, async || count(&sql, "retry").await == 1).await;
    messages.shutdown(SECOND).await.unwrap();
    test.cluster.delete_topic("orders", true).await.unwrap();
    assert_eq!((count(&sql, "retry").await, count(&sql, "dead_letter").await), (0, 0));
}
