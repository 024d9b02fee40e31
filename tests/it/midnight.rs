//! Midnight, and clocks that are wrong.

use std::time::Duration;

use futures_util::future::join_all;
use shardmq::{ErrorKind, Message, PartitionId, Producer};
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::stored::{Stored, assert_dense, number, stored, table, topic, waiting};
use crate::support::{TestCluster, eventually, within};

const SECOND: Duration = Duration::from_secs(1);

/// A topic of one partition on a node whose clock can be moved, and a producer with such a clock.
struct Night {
    test: TestCluster,
    clocks: Clocks,
    sql: Client,
    partition: PartitionId,
    producer: Producer,
}

impl Night {
    async fn at(since_midnight: &str) -> Self {
        let test = TestCluster::new(1).await;
        let clocks = Clocks::of(&test).await;
        clocks.set(since_midnight).await;
        let partition = topic(&test, "orders", 1).await[0];
        let builder = test.cluster.producer("orders");
        let builder = builder.send_timeout(20 * SECOND);
        let producer = clocks.on(builder).build().await.unwrap();
        let sql = test.sql(0).await;
        Self { test, clocks, sql, partition, producer }
    }

    async fn send(&self, text: &str) -> i32 {
        let sent = self.producer.send(Message::new(text.to_owned())).await;
        i32::try_from(sent.unwrap().day().yymmdd()).unwrap()
    }

    /// The rows of shardmq.day: day, first, last and count, ids as sequences.
    async fn finished_days(&self) -> Vec<(i32, i64, i64, i64)> {
        let sql = "select day, first_id % 100000000, last_id % 100000000, count
                     from shardmq.day where partition = $1 order by day";
        let rows = self.sql.query(sql, &[&number(self.partition)]).await;
        let read = |row: &tokio_postgres::Row| (row.get(0), row.get(1), row.get(2), row.get(3));
        rows.unwrap().iter().map(read).collect()
    }

    async fn partition_day(&self) -> i32 {
        let sql = "select day from shardmq.partition where partition = $1";
        let row = self.sql.query_one(sql, &[&number(self.partition)]).await;
        row.unwrap().get(0)
    }

    /// Calls shardmq.roll with a clock that is so many seconds from the server's.
    async fn roll(&self, client_ahead_secs: f64) -> (String, i32) {
        let sql = "select outcome, day
                     from shardmq.roll($1, shardmq.clock() + make_interval(secs => $2))";
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 2] =
            [&number(self.partition), &client_ahead_secs];
        let row = self.sql.query_one(sql, &params).await.unwrap();
        (row.get(0), row.get(1))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_for_the_lock_over_midnight_are_stored_in_the_new_day() {
    let night = Night::at("23:59:50").await;
    let (today, tomorrow) = (night.clocks.day(0).await, night.clocks.day(1).await);
    assert_eq!(night.send("before").await, today);
    let holder = night.test.sql(0).await;
    let lock = format!("begin; select shardmq.lock_partition({})", night.partition);
    holder.batch_execute(&lock).await.unwrap();
    let producer = night.producer.clone();
    let sends = tokio::spawn(async move {
        let texts = (0..30).map(|n| Message::new(n.to_string()));
        producer.send_all(texts).await
    });
    let waits = || async { waiting(&night.sql, night.partition).await > 0 };
    eventually("an append waits", 20 * SECOND, waits).await;
    night.clocks.set("1 day 00:00:05").await;
    holder.batch_execute("commit").await.unwrap();
    for sent in sends.await.unwrap() {
        assert_eq!(sent.unwrap().day().yymmdd(), tomorrow.unsigned_abs());
    }
    assert_eq!(night.finished_days().await, [(today, 1, 1, 1)]);
    let all = stored(&night.sql, night.partition).await;
    assert_dense(&all);
    assert_eq!(all.len(), 31);
    let left = format!("select sum(count)::bigint from {}", table(night.partition, today));
    let left = night.sql.query_one(&left, &[]).await.unwrap();
    assert_eq!(left.get::<_, i64>(0), 1);
}

/// The insert alone, without a client that asks again: it must not land in the day that is over.
#[tokio::test]
async fn a_late_original_that_names_yesterday_is_turned_away() {
    let night = Night::at("23:59:50").await;
    night.send("before").await;
    night.clocks.set("1 day 00:00:05").await;
    let today = night.clocks.day(0).await;
    let call =
        "select outcome from shardmq.append_batch($1, (select topic_id from shardmq.partition), 1, $2, $2, $3::text::uuid, 1, 1,
                    null, null, array['x'::bytea])";
    let uuid = "00000000-0000-4000-8000-000000000001";
    for rolled in [false, true] {
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&number(night.partition), &today, &uuid];
        let row = night.sql.query_one(call, &params).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "wrong_day", "rolled: {rolled}");
        night.roll(0.0).await;
    }
    assert_eq!(stored(&night.sql, night.partition).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_roll_at_once_one_does_and_appends_go_on() {
    let night = Night::at("23:59:50").await;
    for n in 0..3 {
        night.send(&n.to_string()).await;
    }
    let tomorrow = night.clocks.day(1).await;
    let mut rollers = Vec::new();
    for _ in 0..8 {
        rollers.push(night.test.sql(0).await);
    }
    night.clocks.set("1 day 00:00:01").await;
    let roll =
        format!("select outcome, day from shardmq.roll({}, shardmq.clock())", night.partition);
    let rolls = join_all(rollers.iter().map(|sql| sql.query_one(&roll, &[])));
    let sends = night.producer.send_all((3..50).map(|n| Message::new(n.to_string())));
    let (rolls, sends) = tokio::join!(rolls, sends);
    let outcomes: Vec<String> = rolls.into_iter().map(|row| row.unwrap().get(0)).collect();
    assert!(outcomes.iter().filter(|o| *o == "rolled").count() <= 1);
    assert!(outcomes.iter().all(|o| o == "rolled" || o == "current"));
    for sent in sends {
        assert_eq!(sent.unwrap().day().yymmdd(), tomorrow.unsigned_abs());
    }
    let today = night.clocks.day(0).await;
    assert_eq!(night.finished_days().await, [(today, 1, 3, 3)]);
    assert_dense(&stored(&night.sql, night.partition).await);
}

#[tokio::test]
async fn a_clock_that_goes_back_over_midnight_does_not_take_the_partition_with_it() {
    let night = Night::at("23:59:30").await;
    let (today, tomorrow) = (night.clocks.day(0).await, night.clocks.day(1).await);
    assert_eq!(night.send("a").await, today);
    night.clocks.set("1 day 00:00:02").await;
    assert_eq!(night.send("b").await, tomorrow);
    night.clocks.set("23:59:55").await;
    assert_eq!(night.send("c").await, tomorrow);
    assert_eq!(night.roll(0.0).await, ("current".to_owned(), tomorrow));
    night.clocks.set("12:00").await;
    assert_eq!(night.send("d").await, tomorrow);
    night.clocks.set("1 day 01:00").await;
    assert_eq!(night.send("e").await, tomorrow);
    let all = stored(&night.sql, night.partition).await;
    assert_dense(&all);
    let texts: Vec<&str> = all.iter().map(Stored::text).collect();
    assert_eq!(texts, ["a", "b", "c", "d", "e"]);
    assert_eq!(night.finished_days().await, [(today, 1, 1, 1)]);
}

#[tokio::test]
async fn a_server_clock_that_leaps_a_year_is_refused_and_pins_nothing() {
    let night = Night::at("12:00").await;
    let today = night.clocks.day(0).await;
    night.send("before").await;
    night.clocks.set_server("370 days").await;
    let builder = night.test.cluster.producer("orders").send_timeout(4 * SECOND);
    let hurried = night.clocks.on(builder).build().await.unwrap();
    let error = hurried.send(Message::new("never")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.chain().contains("clock"), "{}", error.chain());
    let by_sql = "select shardmq.append($1, array['never'::bytea])";
    let error = night.sql.query_one(by_sql, &[&number(night.partition)]).await;
    let error = error.unwrap_err().as_db_error().unwrap().message().to_owned();
    assert!(error.contains("clock"), "{error}");

    // Sent during the leap, stored after it.
    let producer = night.producer.clone();
    let patient = tokio::spawn(async move { producer.send(Message::new("after")).await });
    let asks = || async { night.roll(-370.0 * 86_400.0).await.0 == "clock" };
    eventually("the roll is refused", 20 * SECOND, asks).await;
    night.clocks.set_server("12:00:20").await;
    let sent = within(15 * SECOND, "the send", patient).await;
    assert_eq!(sent.unwrap().unwrap().day().yymmdd(), today.unsigned_abs());
    assert_eq!(night.partition_day().await, today);
    assert_eq!(night.finished_days().await, []);
    // Also by whoever makes tables ahead.
    night.clocks.set_server("370 days").await;
    let ahead = format!("select shardmq.make_days_ahead({}, 3)", night.partition);
    night.sql.batch_execute(&ahead).await.unwrap();
    let far = "select count(*) from pg_class where relname like 'batch\\_%' and relkind = 'r'
                  and right(relname, 6)::int > $1 + 10000";
    let far = night.sql.query_one(far, &[&(today - 9_000)]).await.unwrap();
    assert_eq!(far.get::<_, i64>(0), 0, "tables of far days");
    assert_eq!(stored(&night.sql, night.partition).await.len(), 2);
}

#[tokio::test]
async fn a_client_whose_clock_is_hours_behind_does_not_roll_and_one_ahead_does() {
    let night = Night::at("23:50").await;
    let (today, tomorrow) = (night.clocks.day(0).await, night.clocks.day(1).await);
    night.send("before").await;
    night.clocks.set("1 day 00:30").await;
    assert_eq!(night.roll(-2.0 * 3600.0).await, ("clock".to_owned(), today));
    assert_eq!(night.partition_day().await, today);
    // Half an hour short of midnight is near enough, and so are five hours ahead.
    assert_eq!(night.roll(-3600.0).await, ("rolled".to_owned(), tomorrow));
    night.clocks.set("2 days 00:30").await;
    let next = night.clocks.day(2).await;
    assert_eq!(night.roll(5.0 * 3600.0).await, ("rolled".to_owned(), next));
    assert_eq!(night.finished_days().await.len(), 1);
}

#[tokio::test]
async fn a_producer_hours_ahead_stores_in_the_servers_day_and_one_behind_says_so() {
    let night = Night::at("21:00").await;
    let today = night.clocks.day(0).await;
    night.clocks.move_client(5 * 3600);
    assert_eq!(night.send("ahead").await, today);
    night.clocks.set("1 day 00:30").await;
    night.clocks.move_client(-3 * 3600);
    let builder = night.test.cluster.producer("orders").send_timeout(4 * SECOND);
    let behind = night.clocks.on(builder).build().await.unwrap();
    let error = behind.send(Message::new("behind")).await.unwrap_err();
    assert!(error.chain().contains("clock"), "{}", error.chain());
    assert_eq!(night.partition_day().await, today);
    night.clocks.move_client(3 * 3600);
    assert_eq!(night.send("right").await, night.clocks.day(1).await);
}

#[tokio::test]
async fn days_without_messages_are_left_out() {
    let night = Night::at("12:00").await;
    let mut expected = Vec::new();
    for (day, count) in [(0, 2), (1, 1), (5, 3), (36, 1)] {
        night.clocks.set(&format!("{day} days 12:00")).await;
        for _ in 0..count {
            let number = night.clocks.day(day).await;
            assert_eq!(night.send("x").await, number);
        }
        expected.push((night.clocks.day(day).await, 1, count, count));
    }
    expected.pop();
    assert_eq!(night.finished_days().await, expected);
    assert_eq!(stored(&night.sql, night.partition).await.len(), 7);
    night.clocks.set("40 days").await;
    night.roll(0.0).await;
    night.clocks.set("41 days").await;
    night.roll(0.0).await;
    assert_eq!(night.finished_days().await.len(), 4);
}

#[tokio::test]
async fn prepared_plans_notice_that_the_clock_was_replaced() {
    let night = Night::at("12:00").await;
    for n in 0..12 {
        night.send(&n.to_string()).await;
    }
    night.clocks.set("1 day 12:00").await;
    let fixed =
        "create or replace function shardmq.clock() returns timestamptz language sql volatile
                    as 'select clock_timestamp() + interval ''3 days''";
    let fixed = format!("{fixed}'");
    night.sql.batch_execute(&fixed).await.unwrap();
    night.clocks.move_client(2 * 86_400);
    assert!(night.send("later").await >= night.clocks.day(3).await);
}

#[tokio::test]
async fn tables_are_made_ahead_and_used_at_midnight() {
    let night = Night::at("23:59:00").await;
    night.send("before").await;
    night.test.cluster.look_after_nodes().await.unwrap();
    let tomorrow = table(night.partition, night.clocks.day(1).await);
    let made = format!("select to_regclass('{tomorrow}') is not null");
    let there = || async {
        let row = night.sql.query_one(&made, &[]).await;
        row.unwrap().get(0)
    };
    eventually("tomorrow's table is there", 20 * SECOND, there).await;
}
