//! Batches that are repeated since their answer was lost: one copy, whichever of original and
//! repeat comes first, over midnight, and when the partition is sealed or full meanwhile.

use std::time::Duration;

use shardmq::{ErrorKind, Message, ProducerBuilder};

use crate::support::clocks::Clocks;
use crate::support::held::Way;
use crate::support::proxy::{Rule, cluster_behind_proxy};
use crate::support::stored::{all_stored, assert_acknowledged, stored, table, topic, waiting};
use crate::support::{eventually, within};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_that_comes_after_its_repeat_is_not_stored_again() {
    let way = Way::new(|builder| builder).await;
    let (send, original) = way.send_held().await;
    way.free_all_but(&original);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_that_comes_after_its_original_gets_its_id() {
    let way = Way::new(|builder| builder).await;
    let (send, original) = way.send_held().await;
    way.given_up(&original).await;
    way.release(&original).await;
    way.eventually_stored(2).await;
    way.proxy.to_server(Rule::Pass);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_from_before_midnight_that_comes_after_its_repeat_is_turned_away() {
    let way = Way::new(|builder| builder).await;
    let (send, original) = way.send_held().await;
    way.given_up(&original).await;
    way.clocks.set("1 day 00:00:05").await;
    way.free_all_but(&original);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    assert_eq!(id.day().yymmdd(), way.clocks.day(1).await.unsigned_abs());
    // Also where the clock has gone back since: the partition has not.
    way.clocks.set("23:59:55").await;
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_after_midnight_finds_its_original_in_the_day_that_is_over() {
    for days in [1, 2] {
        let way = Way::new(|builder| builder).await;
        let (send, original) = way.send_held().await;
        way.given_up(&original).await;
        way.release(&original).await;
        way.eventually_stored(2).await;
        for day in 1..=days {
            way.clocks.set(&format!("{day} days 00:00:05")).await;
            way.roll().await;
        }
        way.proxy.to_server(Rule::Pass);
        let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
        let all = way.stored().await;
        assert_eq!((all.len(), all[1].id), (2, id));
        assert_eq!(id.day().yymmdd(), way.clocks.day(0).await.unsigned_abs());
    }
}

/// Its first attempt names tomorrow, which the server is not at yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_clock_is_ahead_finds_its_original() {
    let (test, proxy) = cluster_behind_proxy().await;
    let clocks = Clocks::of(&test).await;
    clocks.set("21:00").await;
    clocks.move_client(5 * 3600);
    let partition = topic(&test, "orders", 1).await[0];
    let (sql, holder) = (test.sql(0).await, test.sql(0).await);
    let builder = test.cluster.producer("orders").append_timeout(8 * SECOND);
    let producer = clocks.on(builder).build().await.unwrap();
    // The first attempts find nothing to insert into; the one that does waits, and its answer is
    // lost.
    let wait = format!(
        "create function public.wait() returns trigger language plpgsql as
            $$ begin perform pg_advisory_xact_lock(42); return new; end $$;
         create trigger wait before insert on {} execute function public.wait()",
        table(partition, clocks.day(0).await)
    );
    sql.batch_execute(&wait).await.unwrap();
    let hold = "begin; select pg_advisory_xact_lock(42)";
    holder.batch_execute(hold).await.unwrap();
    let send = tokio::spawn(async move { producer.send(Message::new("x")).await });
    let asks = "select exists (select from pg_locks where not granted and objid = 42)";
    let waits = || async { sql.query_one(asks, &[]).await.unwrap().get(0) };
    eventually("an insert waits", 20 * SECOND, waits).await;
    proxy.to_client(Rule::Swallow);
    holder.batch_execute("commit").await.unwrap();
    let there = || async { stored(&sql, partition).await.len() == 1 };
    eventually("it is stored", 20 * SECOND, there).await;
    proxy.cut();
    proxy.to_client(Rule::Pass);
    let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
    let all = stored(&sql, partition).await;
    assert_eq!((all.len(), all[0].id), (1, id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_finds_its_original_in_a_partition_that_was_sealed_or_is_full_since() {
    for full in [false, true] {
        let way = Way::new(|builder| builder).await;
        let (send, original) = way.send_held().await;
        way.given_up(&original).await;
        way.release(&original).await;
        way.eventually_stored(2).await;
        if full {
            way.fill().await;
        } else {
            way.set_state("state = 'sealed', generation = 2").await;
        }
        way.proxy.to_server(Rule::Pass);
        let id = within(20 * SECOND, "the repeat", send).await.unwrap().unwrap();
        let all = stored(&way.sql, way.partition).await;
        assert_eq!((all.len(), all[1].id), (2 + usize::from(full), id));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_that_comes_after_the_seal_is_turned_away_and_its_repeat_says_so() {
    for (change, kind) in [
        ("state = 'sealed'", ErrorKind::Unavailable),
        ("generation = 2", ErrorKind::Unavailable),
        ("topic = 'other', topic_id = gen_random_uuid()", ErrorKind::NotFound),
    ] {
        let way = Way::new(|builder| builder).await;
        let (send, original) = way.send_held().await;
        way.given_up(&original).await;
        way.set_state(change).await;
        way.free_all_but(&original);
        let outcome = within(20 * SECOND, "the repeat", send).await.unwrap();
        assert_eq!(outcome.unwrap_err().kind(), kind, "{change}");
        way.release(&original).await;
        assert_eq!(way.stored().await.len(), 1, "{change}");
    }
}

/// Given up while its lock was another's: the answer is that it was not stored, and it never is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_given_up_is_fenced_and_its_late_original_turned_away() {
    // Its repeat waits for the lock until the send timeout is over, and then the fence does.
    let settings =
        |builder: ProducerBuilder| builder.send_timeout(5 * SECOND).append_timeout(4 * SECOND);
    let way = Way::new(settings).await;
    let holder = way.test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", way.partition);
    holder.batch_execute(&lock).await.unwrap();
    let (send, original) = way.send_held().await;
    way.free_all_but(&original);
    let asks = "select exists (select from pg_stat_activity where datname = current_database()
                   and wait_event_type = 'Lock' and query like '%fence_batch%')";
    let fences = || async { way.sql.query_one(asks, &[]).await.unwrap().get(0) };
    eventually("the fence waits for the lock", 20 * SECOND, fences).await;
    holder.batch_execute("commit").await.unwrap();
    let outcome = within(20 * SECOND, "an answer", send).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(way.refused().await, 1);
    way.release(&original).await;
    assert_eq!(way.stored().await.len(), 1, "what was said not to be sent is stored");
    // The next goes as ever; the day's end takes the fence away.
    let id = way.send("next").await.unwrap().unwrap();
    assert_eq!(id.sequence(), 2);
    way.clocks.set("1 day 00:10").await;
    way.roll().await;
    assert_eq!(way.refused().await, 0);
}

/// The client's clock is past midnight, the partition is not. When the original arrives at last,
/// the partition has come to the day that the client's clock showed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_of_a_client_whose_clock_is_ahead_is_turned_away_after_midnight_too() {
    let settings =
        |builder: ProducerBuilder| builder.send_timeout(5 * SECOND).append_timeout(4 * SECOND);
    let mut way = Way::new(settings).await;
    let ahead = format!("select shardmq.make_days_ahead({}, 3)", way.partition);
    way.sql.batch_execute(&ahead).await.unwrap();
    way.clocks.move_client(3600);
    // It has not heard of the partition's day yet.
    let builder = settings(way.test.cluster.producer("orders"));
    way.producer = way.clocks.on(builder).build().await.unwrap();
    let holder = way.test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", way.partition);
    holder.batch_execute(&lock).await.unwrap();
    let (send, original) = way.send_held().await;
    way.free_all_but(&original);
    let asks = "select exists (select from pg_stat_activity where datname = current_database()
                   and wait_event_type = 'Lock' and query like '%fence_batch%')";
    let fences = || async { way.sql.query_one(asks, &[]).await.unwrap().get(0) };
    eventually("the fence waits for the lock", 20 * SECOND, fences).await;
    holder.batch_execute("commit").await.unwrap();
    let outcome = within(20 * SECOND, "an answer", send).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
    way.clocks.set("1 day 00:10").await;
    way.roll().await;
    way.release(&original).await;
    assert_eq!(way.stored().await.len(), 1, "what was said not to be sent is stored");
}

/// As where a standby is promoted that lacks a roll: an attempt named a day that the partition
/// comes to again.
#[tokio::test]
async fn a_fence_is_kept_until_the_partition_has_left_every_day_that_was_named() {
    let way = Way::new(|builder| builder).await;
    let uuid = "00000000-0000-4000-8000-000000000001";
    let (partition, today, tomorrow) =
        (way.partition, way.clocks.day(0).await, way.clocks.day(1).await);
    for latest in [tomorrow, today] {
        let fence =
            format!("select shardmq.fence_batch({partition}, '{uuid}', 1, {today}, {latest})");
        let found: Option<i64> = way.sql.query_one(&fence, &[]).await.unwrap().get(0);
        assert_eq!(found, None);
    }
    way.clocks.set("1 day 00:10").await;
    way.roll().await;
    let original = format!(
        "select outcome from shardmq.append_batch({partition},
                    (select topic_id from shardmq.partition where partition = {partition}), 1, {tomorrow}, {tomorrow},
                    '{uuid}', 1, 1, null, null, array['x'::bytea])"
    );
    let outcome: String = way.sql.query_one(&original, &[]).await.unwrap().get(0);
    assert_eq!((outcome.as_str(), way.refused().await), ("refused", 1));
    way.clocks.set("2 days 00:10").await;
    way.roll().await;
    assert_eq!(way.refused().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_node_can_not_be_asked_is_unknown_and_does_not_rise_after_its_successor() {
    let way = Way::new(|builder| builder.send_timeout(5 * SECOND)).await;
    let (send, original) = way.send_held().await;
    way.proxy.to_server(Rule::Hold);
    let outcome = within(30 * SECOND, "an answer", send).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unknown);
    way.free_all_but(&original);
    let next = within(20 * SECOND, "the next", way.send("next")).await.unwrap().unwrap();
    way.release(&original).await;
    let all = way.stored().await;
    assert_eq!((all.len(), all[1].id), (2, next));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_sent_is_not_called_unknown() {
    let way = Way::new(|builder| builder.send_timeout(5 * SECOND)).await;
    way.proxy.refuse(true);
    way.proxy.cut();
    // The first may have been on its way when the connection was found to be cut.
    let _ = within(20 * SECOND, "an answer", way.send("maybe")).await.unwrap();
    let outcome = within(20 * SECOND, "an answer", way.send("never")).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout);
    way.proxy.refuse(false);
    within(20 * SECOND, "a send", way.send("now")).await.unwrap().unwrap();
    assert!(way.stored().await.iter().all(|m| m.text() != "never"));
}

/// The server refuses the data of a repeat while the original is still on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_original_whose_repeat_was_refused_is_turned_away() {
    for code in ["check_violation", "raise_exception"] {
        // The fence has to have its answer.
        let way = Way::new(|builder| builder.append_timeout(3 * SECOND)).await;
        let (send, original) = way.send_held().await;
        way.given_up(&original).await;
        let table = table(way.partition, way.clocks.day(0).await);
        let refuse = format!(
            "create function public.no() returns trigger language plpgsql as
                $$ begin raise exception 'no' using errcode = '{code}'; end $$;
             create trigger no before insert on {table} execute function public.no()"
        );
        way.sql.batch_execute(&refuse).await.unwrap();
        way.free_all_but(&original);
        let outcome = within(20 * SECOND, "the repeat", send).await.unwrap();
        assert_ne!(outcome.unwrap_err().kind(), ErrorKind::Unknown);
        let allow = format!("drop trigger no on {table}");
        way.sql.batch_execute(&allow).await.unwrap();
        way.release(&original).await;
        assert_eq!(way.stored().await.len(), 1, "{code}");
    }
}

/// Small random numbers, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_anywhere_lose_nothing_and_repeat_nothing() {
    let (test, proxy) = cluster_behind_proxy().await;
    let partitions = topic(&test, "orders", 3).await;
    let sql = test.sql(0).await;
    let mut senders = Vec::new();
    for sender in 0..4 {
        let builder = test.cluster.producer("orders").send_timeout(30 * SECOND);
        let producer = builder.build().await.unwrap();
        senders.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0..60 {
                let text = format!("{sender}-{n}");
                let message = Message::new(text.clone()).key(format!("{sender}"));
                acknowledged.push((text, producer.send(message).await.unwrap()));
            }
            acknowledged
        }));
    }
    let mut random = Random(7);
    let mut cuts = 0;
    while senders.iter().any(|sender| !sender.is_finished()) {
        if random.below(2) == 0 {
            proxy.to_server(Rule::CutAfter(random.below(9_000)));
        } else {
            proxy.to_client(Rule::CutAfter(random.below(6_000)));
        }
        // As long as some bytes pass.
        tokio::time::sleep(Duration::from_millis(random.below(20))).await;
        proxy.to_server(Rule::Pass);
        proxy.to_client(Rule::Pass);
        cuts += 1;
        tokio::time::sleep(Duration::from_millis(random.below(20))).await;
    }
    let mut acknowledged = Vec::new();
    for sender in senders {
        acknowledged.extend(sender.await.unwrap());
    }
    let all = all_stored(&sql, &partitions).await;
    assert_eq!(all.len(), 240, "after {cuts} cuts");
    assert_acknowledged(&all, &acknowledged);
    for sender in acknowledged.chunks(60) {
        assert!(sender.is_sorted_by_key(|(_, id)| *id), "order by key");
    }
    assert_eq!(waiting(&sql, partitions[0]).await, 0);
}
