//! Positions, last ids and lag are computed, never counted: here they are compared with a count, over
//! logs of several days with batches of any size and equal times.

use shardmq::PartitionId;
use tokio_postgres::Client;

use crate::support::TestCluster;
use crate::support::reading::append_texts;
use crate::support::stored::{number, topic};

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A partition with messages of up to twelve days, some of them empty, some with one batch only; many
/// batches bear the same time.
async fn random_log(test: &TestCluster, name: &str, random: &mut Random) -> (Client, PartitionId) {
    let partition = topic(test, name, 1).await[0];
    let sql = test.sql(0).await;
    for day in 0..12 {
        let batches = [0, 0, 1, 2, 7][usize::try_from(random.below(5)).unwrap()];
        let mut micros = 0;
        for _ in 0..batches {
            micros += [0, 0, 1, 977_000_000][usize::try_from(random.below(4)).unwrap()];
            set_clock(&sql, day, micros).await;
            let size = 1 + random.below(6);
            append_texts(&sql, partition, 0..size).await;
        }
        if random.below(3) == 0 {
            set_clock(&sql, day, micros).await;
            let roll = "select shardmq.roll($1, null)";
            sql.execute(roll, &[&number(partition)]).await.unwrap();
        }
    }
    (sql, partition)
}

/// A clock that stands still.
async fn stop_clock(test: &TestCluster) {
    test.sql(0)
        .await
        .batch_execute(
            "create table public.stopped as select date_trunc('day', clock_timestamp()) as at;
             create table public.began as table public.stopped;
             create or replace function shardmq.clock() returns timestamptz language sql volatile
                as 'select at from public.stopped'",
        )
        .await
        .unwrap();
}

async fn set_clock(sql: &Client, day: i32, micros: i64) {
    let set = "update public.stopped set at =
               (select at from public.began) + $1 * interval '1 day' + $2 * interval '1 microsecond'";
    let (day, micros) = (
        f64::from(day),
        f64::from(i32::try_from(micros / 1000).unwrap()) * 1000.0
            + f64::from(i32::try_from(micros % 1000).unwrap()),
    );
    sql.execute(set, &[&day, &micros]).await.unwrap();
}

/// Where a comparison finds differences, it returns them as rows.
async fn nothing_differs(sql: &Client, partition: PartitionId, comparison: &str) {
    let differences = sql.query(comparison, &[&number(partition)]).await.unwrap();
    assert!(differences.is_empty(), "{} differ, as {:?}", differences.len(), differences[0]);
}

const MESSAGES: &str = "m as materialized (select * from shardmq.messages($1, 0, 1000000))";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_by_time_divides_earlier_messages_from_later_ones() {
    let test = TestCluster::new(1).await;
    stop_clock(&test).await;
    let mut random = Random(7);
    for round in 0..4 {
        let (sql, partition) = random_log(&test, &format!("t{round}"), &mut random).await;
        let comparison = format!(
            "with {MESSAGES},
             probe as (select distinct appended_at + d * interval '1 microsecond' as at
                         from m, generate_series(-1, 1) d
                       union select at + d * interval '12 hours' from public.began, generate_series(-3, 30) d),
             found as (select at, shardmq.position_at($1, at) as position from probe)
             select f.at::text, f.position, m.id, m.appended_at::text from found f, m
              where (m.id > f.position) <> (m.appended_at >= f.at)"
        );
        nothing_differs(&sql, partition, &comparison).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_ids_and_times_of_the_next_message_are_those_of_a_scan() {
    let test = TestCluster::new(1).await;
    stop_clock(&test).await;
    let mut random = Random(11);
    for round in 0..4 {
        let (sql, partition) = random_log(&test, &format!("t{round}"), &mut random).await;
        let last = format!(
            "with {MESSAGES}
             select shardmq.last_id($1), (select max(id) from m)
              where shardmq.last_id($1) <> coalesce((select max(id) from m), 0)"
        );
        nothing_differs(&sql, partition, &last).await;
        let next = format!(
            "with {MESSAGES}, {PROBES},
             found as (select id, shardmq.next_appended_at($1, id) as at from probe)
             select f.id, f.at::text from found f
              where f.at is distinct from (select min(m.appended_at) from m where m.id > f.id)"
        );
        nothing_differs(&sql, partition, &next).await;
    }
}

/// Ids in, before, between and after the messages, and around the ends of days.
const PROBES: &str = "probe as (
    select distinct id + d as id from m, generate_series(-1, 1) d
    union select 0
    union select shardmq.first_id($1, shardmq.day_of(at + n * interval '1 day')) + d
            from public.began, generate_series(0, 12) n, unnest(array[-1, 0, 50]) d)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lag_is_the_number_of_messages_that_are_left() {
    let test = TestCluster::new(1).await;
    stop_clock(&test).await;
    let mut random = Random(13);
    for round in 0..4 {
        let name = format!("t{round}");
        let (sql, partition) = random_log(&test, &name, &mut random).await;
        // A group at every possible position, with some of what follows acknowledged ahead.
        let groups = format!(
            "with {MESSAGES}, {PROBES}
             insert into shardmq.cursor (group_name, partition, acked_id, acked_ahead)
             select 'g' || p.id, $1, p.id,
                    coalesce((select range_agg(int8range(m.id, m.id + 1)) from m
                               where m.id > p.id + 1 and (m.id + p.id) % 3 = 0), '{{}}')
               from probe p"
        );
        sql.execute(&groups, &[&number(partition)]).await.unwrap();
        let comparison = format!(
            "with {MESSAGES},
             left_over as (select c.group_name, c.acked_id, count(m.id), min(m.appended_at) as at
                             from shardmq.cursor c
                             left join m on m.id > c.acked_id and not m.id <@ c.acked_ahead
                            where c.partition = $1 group by 1, 2)
             select o.acked_id, o.count, l.lag, l.last_id, l.oldest_at::text
               from left_over o join shardmq.lag('{name}') l using (group_name)
              where l.lag is distinct from o.count
                 or (l.oldest_at is null) <> (o.count = 0)
                 or l.last_id <> coalesce((select max(id) from m), 0)"
        );
        nothing_differs(&sql, partition, &comparison).await;
        let groups: i64 =
            sql.query_one("select count(*) from shardmq.cursor", &[]).await.unwrap().get(0);
        assert!(groups > 20);
    }
}
