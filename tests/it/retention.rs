//! Old days go: whole tables, the low watermark first, and nobody stumbles over it.

use std::time::Duration;

use shardmq::{Cluster, ErrorKind, Message, NodeId, Retention, TopicOptions};
use tokio_postgres::Client;

use crate::support::clocks::look_after;
use crate::support::proxy::{Proxy, Rule};
use crate::support::{TestCluster, database, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// Moves this database's clock so many days on.
async fn days_on(sql: &Client, days: u32) {
    let text = format!(
        "create or replace function shardmq.clock() returns timestamptz language sql volatile
         as 'select clock_timestamp() + interval ''{days} days'''"
    );
    sql.batch_execute(&text).await.unwrap();
}

/// Appends so many messages, as psql does.
async fn append(sql: &Client, name: &str, count: u32) {
    let text = format!(
        "select shardmq.append(10101, (select array_agg(('{name}' || n)::bytea)
                                         from generate_series(1, {count}) n))"
    );
    sql.batch_execute(&text).await.unwrap();
}

async fn tables(sql: &Client) -> Vec<String> {
    let text = "select relname::text from pg_class
                 where relname like 'batch\\_10101\\_______' and relkind = 'r' order by 1";
    sql.query(text, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn topic(retention: Retention) -> (TestCluster, Client) {
    let test = TestCluster::new(1).await;
    let options = TopicOptions::partitions(1).retention(retention);
    test.cluster.create_topic("orders", options).await.unwrap();
    let sql = test.sql(0).await;
    (test, sql)
}

/// Consumes everything that is there and returns how many messages, and what news, came.
async fn consume(test: &TestCluster, group: &str, expected: usize) -> Vec<ErrorKind> {
    let consumer = test.cluster.consumer("orders", group);
    let mut messages = consumer.stream().await.unwrap();
    let (mut got, mut news) = (0, Vec::new());
    while got < expected {
        match within(20 * SECOND, "a delivery", messages.next()).await.unwrap() {
            Ok(delivery) => {
                got += 1;
                delivery.ack().unwrap();
            }
            Err(error) => news.push(error.kind()),
        }
    }
    messages.shutdown(SECOND).await.unwrap();
    news
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn days_go_when_their_time_is_over_and_every_group_has_finished_them() {
    let (test, sql) =
        topic(Retention { days: 2, drop_unread: false, ..Retention::default() }).await;
    append(&sql, "a", 10).await;
    assert!(consume(&test, "quick", 10).await.is_empty());
    let mut slow = test.cluster.consumer("orders", "slow").stream().await.unwrap();
    within(20 * SECOND, "a delivery", slow.next()).await.unwrap().unwrap().ack().unwrap();
    slow.shutdown(SECOND).await.unwrap();
    days_on(&sql, 1).await;
    append(&sql, "b", 5).await;

    // Two whole days after its end it could go, but a group has not finished it.
    days_on(&sql, 4).await;
    append(&sql, "c", 3).await;
    let before = tables(&sql).await;
    look_after(&test).await;
    let row = sql
        .query_one(
            "select outcome, group_name from shardmq.expire_day(10101, shardmq.clock())",
            &[],
        )
        .await;
    let row = row.unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), ("kept", "slow"));
    let kept = tables(&sql).await;
    assert!(before.iter().all(|name| sql_has(&kept, name)), "{kept:?}");

    assert!(consume(&test, "slow", 17).await.is_empty());
    assert!(consume(&test, "quick", 8).await.is_empty());
    look_after(&test).await;
    let left = tables(&sql).await;
    assert!(!sql_has(&left, &before[0]) && !sql_has(&left, &before[1]), "{left:?}");
    assert!(sql_has(&left, before.last().unwrap()), "{left:?}");
    let lag = test.cluster.lag("orders").await.unwrap();
    assert!(lag.iter().all(|lag| lag.lag == 0), "{lag:?}");
}

fn sql_has(tables: &[String], name: &str) -> bool {
    tables.iter().any(|table| table == name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_behind_the_watermark_goes_on_from_it_and_says_how_many_it_missed() {
    let (test, sql) = topic(Retention { days: 1, drop_unread: true, ..Retention::default() }).await;
    append(&sql, "a", 10).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    for _ in 0..4 {
        within(20 * SECOND, "a", messages.next()).await.unwrap().unwrap().ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    days_on(&sql, 1).await;
    append(&sql, "b", 7).await;
    days_on(&sql, 4).await;
    append(&sql, "c", 3).await;
    look_after(&test).await;

    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let news = within(20 * SECOND, "the news", messages.next()).await.unwrap().unwrap_err();
    assert_eq!(news.kind(), ErrorKind::Missed);
    assert!(news.to_string().contains("dropped 13 messages"), "{news}");
    for n in 1..=3 {
        let delivery = within(20 * SECOND, "c", messages.next()).await.unwrap().unwrap();
        assert_eq!(delivery.payload(), format!("c{n}").as_bytes());
        delivery.ack().unwrap();
    }
    messages.shutdown(SECOND).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_held_is_dropped_later_and_told_apart_from_nothing_to_do() {
    let (test, sql) = topic(Retention { days: 1, drop_unread: true, ..Retention::default() }).await;
    append(&sql, "a", 10).await;
    let first = tables(&sql).await.remove(0);
    days_on(&sql, 3).await;
    append(&sql, "b", 1).await;
    let holder = test.sql(0).await;
    holder
        .batch_execute(&format!("begin; lock table shardmq.{first} in access share mode"))
        .await
        .unwrap();
    look_after(&test).await;
    let day: i32 = first[first.len() - 6..].parse().unwrap();
    let drop_day = async || -> String {
        let row = sql.query_one("select shardmq.drop_day(10101, $1)", &[&day]).await.unwrap();
        row.get(0)
    };
    assert_eq!(drop_day().await, "contended");
    // Its messages are gone for readers all the same: the watermark was first.
    let row = sql.query_one("select count(*) from shardmq.messages(10101)", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 1);
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(drop_day().await, "dropped");
    assert_eq!(drop_day().await, "nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_on_the_very_table_and_a_writer_of_the_next_go_on() {
    let (test, sql) = topic(Retention { days: 1, drop_unread: true, ..Retention::default() }).await;
    append(&sql, "a", 2_000).await;
    let consumer = test.cluster.consumer("orders", "g").prefetch_messages(1).prefetch_bytes(65_536);
    let mut messages = consumer.poll_interval(SECOND / 20).stream().await.unwrap();
    within(20 * SECOND, "a", messages.next()).await.unwrap().unwrap().ack().unwrap();
    days_on(&sql, 3).await;
    append(&sql, "b", 1).await;
    look_after(&test).await;
    // What was fetched is handed out; then the reader finds the next day.
    loop {
        match within(20 * SECOND, "the next day", messages.next()).await.unwrap() {
            Ok(delivery) => {
                let is_next_day = delivery.payload() == b"b1";
                delivery.ack().unwrap();
                if is_next_day {
                    break;
                }
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Missed),
        }
    }
    append(&sql, "c", 1).await;
    let delivery = within(20 * SECOND, "c", messages.next()).await.unwrap().unwrap();
    assert_eq!(delivery.payload(), b"c1");
    messages.shutdown(SECOND / 10).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_client_keeps_tables_ahead_and_one_takes_over_from_another() {
    let (test, sql) = topic(Retention::default()).await;
    let client = Cluster::connect(&test.control_url).await.unwrap();
    let producer = client.producer("orders").build().await.unwrap();
    producer.send(Message::new("x")).await.unwrap();
    client.look_after_nodes().await.unwrap();
    assert_eq!(tables(&sql).await.len(), 4);
    eventually("the client holds the upkeep", 20 * SECOND, async || {
        sql.query_opt("select from shardmq.upkeep", &[]).await.unwrap().is_some()
    })
    .await;
    let take = "select shardmq.keep_up('00000000-0000-0000-0000-000000000001', 20)";
    assert!(!sql.query_one(take, &[]).await.unwrap().get::<_, bool>(0));
    // Its lease is over within 20 s; another tries every 8 s.
    let lease = "select extract(epoch from until - clock_timestamp())::float8 from shardmq.upkeep";
    assert!(sql.query_one(lease, &[]).await.unwrap().get::<_, f64>(0) <= 20.0);
    sql.batch_execute("update shardmq.upkeep set until = now() - interval '1 s'").await.unwrap();
    assert!(sql.query_one(take, &[]).await.unwrap().get::<_, bool>(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hangs_does_not_keep_the_others_from_being_looked_after() {
    let (test, sql) = topic(Retention::default()).await;
    let proxy = Proxy::start(shared_server().await.port()).await;
    let hanging = proxy.url(&database(shared_server().await).await);
    test.cluster.add_node(NodeId::new(2).unwrap(), &hanging).await.unwrap();
    let client = Cluster::connect(&test.control_url).await.unwrap();
    let _producer = client.producer("orders").build().await.unwrap();
    let of_hanging = crate::support::client(&hanging).await;
    for sql in [&sql, &of_hanging] {
        let held =
            async || sql.query_opt("select from shardmq.upkeep", &[]).await.unwrap().is_some();
        eventually("both are looked after", 20 * SECOND, held).await;
    }
    proxy.to_server(Rule::Hold);
    for _ in 0..2 {
        let asked = "update shardmq.upkeep set until = now() returning until";
        sql.query_one(asked, &[]).await.unwrap();
        eventually("the lease is renewed, each 8 s", 20 * SECOND, async || {
            let renewed = "select until > now() + interval '5 s' from shardmq.upkeep";
            sql.query_one(renewed, &[]).await.unwrap().get(0)
        })
        .await;
    }
}

/// Whether a vacuum of this database is under way.
async fn vacuums(sql: &Client) -> bool {
    let running = "select count(*) > 0 from pg_stat_activity
        where datname = current_database() and query like '%vacuum (freeze%' and state = 'active'
          and pid <> pg_backend_pid()";
    sql.query_one(running, &[]).await.unwrap().get(0)
}

/// With one data connection, which the vacuum does not take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_vacuum_keeps_no_message_waiting() {
    let (test, sql) = topic(Retention { days: 7, ..Retention::default() }).await;
    let fill = "select shardmq.append(10101, array(
        select decode(repeat(md5(n::text || b::text), 20), 'hex') from generate_series(1, 1000) n))
          from generate_series(1, 20) b";
    sql.batch_execute(fill).await.unwrap();
    days_on(&sql, 1).await;
    append(&sql, "new", 1).await;
    // A large table on a slow disk, in small.
    let slow = "do $$ begin
        execute format('alter database %I set vacuum_cost_delay = ''100ms''', current_database());
        execute format('alter database %I set vacuum_cost_limit = 10', current_database());
        end $$";
    sql.batch_execute(slow).await.unwrap();
    let builder = Cluster::builder(&test.control_url).connections_per_node(1);
    let cluster = builder.connect().await.unwrap();
    let consumer = cluster.consumer("orders", "g").start(shardmq::Start::Latest);
    let mut messages = consumer.stream().await.unwrap();
    eventually("the vacuum runs", 20 * SECOND, || vacuums(&sql)).await;
    for n in 0..10 {
        append(&sql, &format!("during{n}"), 1).await;
        sql.batch_execute("select pg_notify('shardmq', '10101')").await.unwrap();
        let next = within(2 * SECOND, "a message beside the vacuum", messages.next()).await;
        next.unwrap().unwrap().ack().unwrap();
    }
    assert!(vacuums(&sql).await, "it was over too soon to tell");
    messages.shutdown(SECOND).await.unwrap();
    cluster.shutdown().await;
    eventually("the vacuum ends with its process", 20 * SECOND, async || !vacuums(&sql).await)
        .await;
}
