//! Rows that can't be read: the tables refuse them, and one that is there all the same is told,
//! becomes dead letters or stops its partition, and hides nothing.

use std::time::Duration;

use shardmq::embedded::StopMode;
use shardmq::{DeadLetterFilter, Error, ErrorKind, MessageId, Messages, PartitionId, Unreadable};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::reading::{append_texts, next_text, text};
use crate::support::stored::{number, table, topic};
use crate::support::{TestCluster, eventually, own_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// A topic of two partitions, the first one's table, and a connection.
async fn ready() -> (TestCluster, Client, Vec<PartitionId>, String) {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partitions = topic(&test, "orders", 2).await;
    append_texts(&sql, partitions[0], ["first"]).await;
    let day = sql.query_one("select shardmq.day_of(shardmq.clock())", &[]).await.unwrap().get(0);
    let table = table(partitions[0], day);
    (test, sql, partitions, table)
}

/// Takes the checks of a day table away.
async fn without_checks(sql: &Client, table: &str) {
    let drop = format!(
        "do $$ declare c text; begin
             for c in select conname from pg_constraint
                       where conrelid = '{table}'::regclass and contype = 'c' loop
                 execute format('alter table {table} drop constraint %I', c);
             end loop;
         end $$"
    );
    sql.batch_execute(&drop).await.unwrap();
}

/// Writes a row behind the last one, that says that it has so many messages. Returns its first id.
async fn write(sql: &Client, table: &str, count: i32, arrays: &str) -> Result<i64, String> {
    let insert = format!(
        "insert into {table} (base_id, count, bytes, appended_at, producer, sequence, keys, headers, payloads)
         select l.base_id + greatest(l.count, 1), $1, 10, l.appended_at, $2, 1, {arrays}
           from {table} l order by l.base_id desc limit 1
         returning base_id"
    );
    let row = sql.query_one(&insert, &[&count, &Uuid::new_v4()]).await;
    row.map(|row| row.get(0)).map_err(|error| error.as_db_error().unwrap().message().to_owned())
}

/// Odd rows: their count, their arrays, and the texts of the messages that can be read. None: none
/// can.
type Odd = (i32, &'static str, Option<&'static [&'static str]>);

const ODD: &[Odd] = &[
    (2, "array[['k1', 'k2']], null, array['a', 'b']::bytea[]", Some(&["a:k1", "b:k2"])),
    (2, "'[0:1]={k1,k2}', null, '[7:8]={c,d}'", Some(&["c:k1", "d:k2"])),
    (2, "null, array[['{}', '{}']]::jsonb[], array[['e'], ['f']]::bytea[]", Some(&["e:", "f:"])),
    (3, "null, null, array['x', 'x']::bytea[]", None),
    (1, "null, null, array['x', 'x']::bytea[]", None),
    (2, "array['k'], null, array['x', 'x']::bytea[]", None),
    (1, "null, array['{}', '{}']::jsonb[], array['x']::bytea[]", None),
    (2, "null, null, array['x', null]::bytea[]", None),
    (1, "null, array['[1]']::jsonb[], array['x']::bytea[]", None),
    (1, "null, array['null']::jsonb[], array['x']::bytea[]", None),
    (1, "null, null, '{}'", None),
    (0, "null, null, array['x']::bytea[]", None),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tables_and_the_functions_refuse_what_readers_cannot_take() {
    let (_test, sql, partitions, table) = ready().await;
    for (count, arrays, _) in ODD {
        let refused = write(&sql, &table, *count, arrays).await.unwrap_err();
        assert!(refused.contains("violates check constraint"), "{arrays}: {refused}");
    }
    let calls = [
        ("array['x', 'y']::bytea[], array[['k1', 'k2']]", "keys has 2 dimensions"),
        ("array['x', 'y']::bytea[], '[0:1]={k1,k2}'", "keys has 1 dimensions and begins at 0"),
        ("array[['x', 'y']]::bytea[]", "payloads has 2 dimensions"),
        (
            "array['x', 'y']::bytea[], null, array[['{}', '{}']]::jsonb[]",
            "headers has 2 dimensions",
        ),
        ("array['x', 'y']::bytea[], array['k']", "1 keys for 2 messages"),
        ("array['x']::bytea[], array[]::text[]", "0 keys for 1 messages"),
        ("array['x', null]::bytea[]", "payload 2 is null"),
        ("array['x'::bytea], array[repeat('k', 1025)]", "1024 bytes"),
        ("array['x'::bytea], null, array['[1]']::jsonb[]", "JSON object"),
        ("array['x'::bytea], null, array[jsonb_build_object('h', repeat('v', 65536))]", "65536"),
    ];
    for (arguments, words) in calls {
        let call = format!("select shardmq.append({}, {arguments})", number(partitions[0]));
        let error = sql.query_one(&call, &[]).await.unwrap_err();
        let said = error.as_db_error().unwrap().message();
        assert!(said.contains(words), "{arguments}: {said}");
    }
}

/// Everything up to a message with this text, acknowledged, as texts with their keys; and the news.
async fn until(messages: &mut Messages, last: &str) -> (Vec<String>, Vec<Error>) {
    let (mut texts, mut news) = (Vec::new(), Vec::new());
    while texts.last().is_none_or(|text| text != last) {
        match within(20 * SECOND, "something", messages.next()).await.unwrap() {
            Ok(delivery) => {
                let key = delivery.key().map(|key| format!(":{key}")).unwrap_or_default();
                texts.push(text(&delivery) + &key);
                delivery.ack().unwrap();
            }
            Err(error) => news.push(error),
        }
    }
    (texts, news)
}

async fn lag(test: &TestCluster, partition: PartitionId) -> u64 {
    let lag = test.cluster.lag("orders").await.unwrap();
    lag.iter().find(|lag| lag.partition == partition).map_or(u64::MAX, |lag| lag.lag)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_written_past_the_checks_are_delivered_or_become_dead_letters() {
    let (test, sql, partitions, table) = ready().await;
    without_checks(&sql, &table).await;
    let (mut expected, mut dead) = (vec!["first".to_owned()], Vec::new());
    for (n, (count, arrays, readable)) in ODD.iter().enumerate() {
        let base_id = write(&sql, &table, *count, arrays).await.unwrap();
        match readable {
            Some(texts) => {
                expected.extend(texts.iter().map(|text| text.trim_end_matches(':').to_owned()));
            }
            None => dead.extend(base_id..base_id + i64::from((*count).max(1))),
        }
        if *count > 0 {
            append_texts(&sql, partitions[0], [n]).await;
            expected.push(n.to_string());
        }
    }
    write(&sql, &table, 1, "null, null, array['last']::bytea[]").await.unwrap();
    expected.push("last".to_owned());
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let (texts, news) = until(&mut messages, "last").await;
    assert_eq!(texts, expected);
    let unreadable = ODD.iter().filter(|(.., readable)| readable.is_none()).count();
    assert_eq!(news.len(), unreadable, "{news:?}");
    for error in &news {
        assert_eq!(error.kind(), ErrorKind::Database);
        assert!(error.to_string().contains(&partitions[0].to_string()), "{error}");
    }
    messages.flush().await.unwrap();
    assert_eq!(lag(&test, partitions[0]).await, 0);
    let letters = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 100).await.unwrap();
    let ids: Vec<i64> = letters.letters.iter().map(|letter| letter.message.id.number()).collect();
    assert_eq!(ids, dead);
    for letter in &letters.letters {
        assert!(letter.unread && letter.message.payload.is_empty());
        assert!(letter.failures[0].error.contains("read messages"), "{letter:?}");
    }
    // Nobody gets them a second time, nor does another dead letter come.
    messages.shutdown(SECOND).await.unwrap();
    let mut again = test.cluster.consumer("orders", "g").stream().await.unwrap();
    append_texts(&sql, partitions[0], ["new"]).await;
    assert_eq!(until(&mut again, "new").await.0, ["new"]);
    again.shutdown(SECOND).await.unwrap();
    let again = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 100).await.unwrap();
    assert_eq!(again.letters.len(), dead.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_no_time_that_cannot_be_read_become_dead_letters_too() {
    let (test, sql, _, table) = ready().await;
    without_checks(&sql, &table).await;
    for (time, payload) in [("-infinity", "null"), ("infinity", "null"), ("now", "'last'")] {
        let row = format!("null, null, array[{payload}]::bytea[]");
        let id = write(&sql, &table, 1, &row).await.unwrap();
        let set = format!("update {table} set appended_at = '{time}' where base_id = {id}");
        sql.batch_execute(&set).await.unwrap();
    }
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let (texts, news) = until(&mut messages, "last").await;
    assert_eq!((texts, news.len()), (vec!["first".to_owned(), "last".to_owned()], 2));
    let letters = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 100).await.unwrap();
    assert_eq!(letters.letters.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_without_payload_is_sent_again_once_its_row_can_be_read() {
    let (test, sql, partitions, table) = ready().await;
    without_checks(&sql, &table).await;
    let mended = write(&sql, &table, 1, "null, null, array['x', 'x']::bytea[]").await.unwrap();
    write(&sql, &table, 1, "null, null, '{}'").await.unwrap();
    append_texts(&sql, partitions[0], ["last"]).await;
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    assert_eq!(until(&mut messages, "last").await.0, ["first", "last"]);
    let all = DeadLetterFilter::default();
    let moved = test.cluster.retry_dead_letters(&all, |_| {}).await.unwrap();
    assert_eq!((moved.moved, moved.unread), (0, 2));
    let mend =
        format!("update {table} set payloads = '{{mended}}', keys = '{{k}}' where base_id = $1");
    sql.execute(&mend, &[&mended]).await.unwrap();
    let moved = test.cluster.retry_dead_letters(&all, |_| {}).await.unwrap();
    assert_eq!((moved.moved, moved.unread), (1, 1));
    let (texts, news) = until(&mut messages, "mended:k").await;
    assert_eq!((texts, news.len()), (vec!["mended:k".to_owned()], 0));
    let dropped = test.cluster.drop_dead_letters(&all, |_| {}).await.unwrap();
    assert_eq!((dropped.moved, dropped.unread), (1, 0));
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_asked_for_the_partition_stops_and_goes_on_once_the_row_can_be_read() {
    let (test, sql, partitions, table) = ready().await;
    without_checks(&sql, &table).await;
    let odd = write(&sql, &table, 1, "null, null, array['x', 'x']::bytea[]").await.unwrap();
    append_texts(&sql, partitions[0], ["last"]).await;
    let consumer = test.cluster.consumer("orders", "g").unreadable(Unreadable::Stop);
    let mut messages = consumer.stream().await.unwrap();
    assert_eq!(next_text(&mut messages).await, "first");
    let error = within(20 * SECOND, "the news", messages.next()).await.unwrap().unwrap_err();
    let told = error.to_string();
    assert!(told.contains(&partitions[0].to_string()) && told.contains(&odd.to_string()), "{told}");
    // The other one goes on.
    append_texts(&sql, partitions[1], ["other"]).await;
    assert_eq!(next_text(&mut messages).await, "other");
    assert!(lag(&test, partitions[0]).await >= 2);
    let mend = format!("update {table} set payloads = '{{mended}}' where base_id = $1");
    sql.execute(&mend, &[&odd]).await.unwrap();
    assert_eq!(
        [next_text(&mut messages).await, next_text(&mut messages).await],
        ["mended", "last"]
    );
    messages.shutdown(SECOND).await.unwrap();
    let letters = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 100).await.unwrap();
    assert!(letters.letters.is_empty());
}

/// It can't be acknowledged by ids that another day has, or nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_whose_ids_are_not_of_its_day_stops_its_partition() {
    let (test, sql, partitions, table) = ready().await;
    without_checks(&sql, &table).await;
    let beyond = format!(
        "insert into {table}
         select l.base_id / 100000000 * 100000000 + 99999999, 2, 1, l.appended_at, gen_random_uuid(), 1, null, null,
                '{{x,y}}'
           from {table} l order by l.base_id desc limit 1"
    );
    sql.batch_execute(&beyond).await.unwrap();
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    assert_eq!(next_text(&mut messages).await, "first");
    let error = within(20 * SECOND, "the news", messages.next()).await.unwrap().unwrap_err();
    let told = error.to_string();
    assert!(told.contains(&partitions[0].to_string()) && told.contains("its ids"), "{told}");
    append_texts(&sql, partitions[1], ["other"]).await;
    assert_eq!(next_text(&mut messages).await, "other");
    messages.shutdown(SECOND).await.unwrap();
}

/// The pages that keep a large payload are gone from the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_damaged_on_the_disk_becomes_dead_letters_and_its_neighbours_come() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partitions = topic(&test, "orders", 2).await;
    let sql = test.sql(0).await;
    append_texts(&sql, partitions[0], ["before"]).await;
    let large = "select shardmq.append($1, array['in its row', (select string_agg(
                     decode(md5(g::text), 'hex'), '') from generate_series(1, 10000) g)]::bytea[])";
    let first: i64 = sql.query_one(large, &[&number(partitions[0])]).await.unwrap().get(0);
    append_texts(&sql, partitions[0], ["after"]).await;
    let path: String = sql
        .query_one(
            "select pg_relation_filepath(c.reltoastrelid) from pg_class c
              where c.relname = format('batch_%s_%s', $1::int,
                                       lpad(shardmq.day_of(shardmq.clock())::text, 6, '0'))",
            &[&number(partitions[0])],
        )
        .await
        .unwrap()
        .get(0);
    sql.batch_execute("checkpoint").await.unwrap();
    server.stop_server(StopMode::Fast).await.unwrap();
    std::fs::File::options()
        .write(true)
        .open(server.data_dir().join(path))
        .unwrap()
        .set_len(0)
        .unwrap();
    server.start_server().await.unwrap();

    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let (texts, news) = until(&mut messages, "after").await;
    assert_eq!(texts, ["before", "after"]);
    assert!(news.iter().any(|error| error.to_string().contains(&first.to_string())), "{news:?}");
    messages.flush().await.unwrap();
    assert_eq!(lag(&test, partitions[0]).await, 0);
    let letters = test.cluster.dead_letters(&DeadLetterFilter::default(), None, 100).await.unwrap();
    let ids: Vec<MessageId> = letters.letters.iter().map(|letter| letter.message.id).collect();
    assert_eq!(ids.iter().map(|id| id.number()).collect::<Vec<_>>(), [first, first + 1]);
    let moved =
        test.cluster.retry_dead_letters(&DeadLetterFilter::default(), |_| {}).await.unwrap();
    assert_eq!((moved.moved, moved.unread), (0, 2));
    messages.shutdown(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_by_sql_get_what_is_before_a_row_that_cannot_be_read_and_then_its_ids() {
    let (_test, sql, partitions, table) = ready().await;
    without_checks(&sql, &table).await;
    let odd = write(&sql, &table, 2, "null, null, array['x']::bytea[]").await.unwrap();
    append_texts(&sql, partitions[0], ["last"]).await;
    let take =
        "select token from shardmq.take('orders', 'g', gen_random_uuid(), 2) where partition = $1";
    let token: String = sql.query_one(take, &[&number(partitions[0])]).await.unwrap().get(0);
    let pull = "select id, convert_from(payload, 'UTF8') from shardmq.pull($1)";
    let ack = async |id: i64| {
        let acked = sql.query_one("select shardmq.ack($1, $2)", &[&token, &id]).await.unwrap();
        assert!(acked.get::<_, bool>(0));
    };
    let rows = sql.query(pull, &[&token]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get(1)).collect::<Vec<&str>>(), ["first"]);
    ack(rows[0].get(0)).await;
    for _ in 0..2 {
        let error = sql.query(pull, &[&token]).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "SMQ04");
        assert!(error.message().contains(&format!("{odd} to {}", odd + 1)), "{error}");
    }
    ack(odd + 1).await;
    let rows = sql.query(pull, &[&token]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get(1)).collect::<Vec<&str>>(), ["last"]);
}

/// A table that is gone stops its partition, which is told, and no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_that_lasts_is_told_by_partition_and_what_is_well_goes_on() {
    let (test, sql, partitions, table) = ready().await;
    let mut messages =
        test.cluster.consumer("orders", "g").poll_interval(SECOND / 10).stream().await.unwrap();
    assert_eq!(next_text(&mut messages).await, "first");
    let name = table.trim_start_matches("shardmq.").to_owned();
    let hidden = format!(
        "alter table {table} rename to elsewhere; create table {table} (base_id text, count int)"
    );
    sql.batch_execute(&hidden).await.unwrap();
    let error = within(20 * SECOND, "the news", messages.next()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains(&partitions[0].to_string()), "{error}");
    append_texts(&sql, partitions[1], ["other"]).await;
    assert_eq!(next_text(&mut messages).await, "other");
    let back = format!("drop table {table}; alter table shardmq.elsewhere rename to {name}");
    sql.batch_execute(&back).await.unwrap();
    append_texts(&sql, partitions[0], ["second"]).await;
    assert_eq!(next_text(&mut messages).await, "second");
    messages.shutdown(SECOND).await.unwrap();
    eventually("all is done", 20 * SECOND, async || lag(&test, partitions[0]).await == 0).await;
}
