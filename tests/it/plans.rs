//! Every statement is one that the server takes, and the hot ones go by indexes only.

use std::path::Path;

use shardmq::{Message, PartitionId};
use tokio_postgres::Client;

use crate::support::stored::{number, table, topic};
use crate::support::{TestCluster, client, eventually};

const SECOND: std::time::Duration = std::time::Duration::from_secs(1);

/// The statements of src/store/sql by name, for one partition and day.
fn statements(partition: PartitionId, day: i32) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/sql");
    let first = (i64::from(number(partition)) * 1_000_000 + i64::from(day)) * 100_000_000 + 1;
    let mut all = Vec::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text
            .replace("{partition}", &partition.to_string())
            .replace("{day}", &format!("{day:06}"))
            .replace("{day_number}", &day.to_string())
            .replace("{first_id}", &first.to_string())
            .replace("{last_id}", &(first + 99_999_998).to_string());
        all.push((path.file_stem().unwrap().to_str().unwrap().to_owned(), text));
    }
    all.sort();
    all
}

fn named(all: &[(String, String)], name: &str) -> String {
    all.iter().find(|(n, _)| n == name).unwrap().1.clone()
}

async fn today(sql: &Client) -> i32 {
    let today = "select shardmq.day_of(shardmq.clock())";
    sql.query_one(today, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let all = statements(partition, today(&sql).await);
    assert!(all.len() > 40);
    for (name, text) in all {
        if text.contains("begin isolation level") {
            // Several at once, without parameters.
            sql.batch_execute(&text).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
            sql.batch_execute("rollback").await.unwrap();
        } else {
            sql.prepare(&text).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        }
    }
}

/// 100,000 rows of one message in today's table, from 1,000 producers.
async fn fill(sql: &Client, partition: PartitionId, day: i32) {
    let fill = format!(
        "insert into {} (base_id, count, bytes, appended_at, producer, sequence, payloads)
         select shardmq.first_id({partition}, {day}) + n, 1, 1, shardmq.clock(),
                ('00000000-0000-4000-8000-' || lpad((n % 1000)::text, 12, '0'))::uuid, n, array['x'::bytea]
           from generate_series(0, 99999) n",
        table(partition, day)
    );
    sql.batch_execute(&fill).await.unwrap();
}

/// The generic plan of a statement, as the pooled connections run it.
async fn plan(sql: &Client, name: &str, types: &str, text: &str) -> String {
    let nulls = types.split(',').map(|_| "null").collect::<Vec<_>>().join(", ");
    let body: String =
        text.lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n");
    let prepare =
        format!("set plan_cache_mode = force_generic_plan; prepare {name} ({types}) as {body}");
    sql.batch_execute(&prepare).await.unwrap();
    let explain = format!("explain (costs off) execute {name} ({nulls})");
    let rows = sql.query(&explain, &[]).await.unwrap();
    rows.iter().map(|row| row.get::<_, String>(0) + "\n").collect()
}

#[tokio::test]
async fn appends_and_fetches_go_by_indexes_in_a_large_day() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let day = today(&sql).await;
    fill(&sql, partition, day).await;
    let all = statements(partition, day);
    let types = [
        ("append_insert", "int, int, uuid, bigint, text[], jsonb[], bytea[], text, int"),
        ("fetch", "bigint, bigint, int"),
    ];
    let name_of_table = table(partition, day);
    for analyzed in [false, true] {
        if analyzed {
            sql.batch_execute(&format!("analyze {name_of_table}")).await.unwrap();
        }
        for (name, types) in types {
            let plan = plan(&sql, &format!("{name}_{analyzed}"), types, &named(&all, name)).await;
            assert!(!plan.contains("Seq Scan on batch"), "{name}, {analyzed}: {plan}");
            assert!(!plan.contains("Sort"), "{name}, {analyzed}: {plan}");
            assert!(plan.contains("Index"), "{plan}");
        }
    }
}

/// Has the session's counts told at once; Postgres 14 can't, and tells them soon.
const TELL: &str = "do $$ begin
    if to_regproc('pg_stat_force_next_flush') is not null then
        execute 'select pg_stat_force_next_flush()';
    end if; end $$";

async fn scans(sql: &Client, table: &str) -> (i64, i64) {
    let scans =
        "select seq_scan, idx_scan from pg_stat_user_tables where relid = $1::text::regclass";
    let row = sql.query_one(scans, &[&table]).await.unwrap();
    (row.get(0), row.get(1))
}

/// What is done through functions, whose plans can't be seen from outside, and by the library.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_on_the_way_of_a_message_scans_a_day() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    let day = today(&sql).await;
    fill(&sql, partition, day).await;
    let table = table(partition, day);
    sql.batch_execute(TELL).await.unwrap();
    let before = scans(&sql, &table).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    for n in 0..10 {
        producer.send(Message::new(n.to_string())).await.unwrap();
    }
    let last = producer.send(Message::new("last")).await.unwrap();
    test.cluster.shutdown().await;
    let other = client(&test.control_url).await;
    let append = "select shardmq.append($1, array['x'::bytea], producer => gen_random_uuid(), sequence => 1)";
    let p = number(partition);
    for _ in 0..7 {
        other.query_one(append, &[&p]).await.unwrap();
        let fence = "select shardmq.fence_batch($1, gen_random_uuid(), 1, 0, 0)";
        other.query_one(fence, &[&p]).await.unwrap();
        let id = last.number();
        other.query_one("select count(*) from shardmq.message($1)", &[&id]).await.unwrap();
        let some = "select count(*) from shardmq.messages($1, $2, 5)";
        other.query_one(some, &[&p, &(id - 7)]).await.unwrap();
        other.query_one("select shardmq.last_id($1)", &[&p]).await.unwrap();
        other.query_one("select shardmq.next_appended_at($1, $2)", &[&p, &id]).await.unwrap();
        other.query_one("select shardmq.position_at($1, now())", &[&p]).await.unwrap();
    }
    let roll = format!(
        "create or replace function shardmq.clock() returns timestamptz language sql volatile
            as 'select clock_timestamp() + interval ''24 hours''';
         select outcome from shardmq.roll({p}, shardmq.clock());
         {TELL}"
    );
    other.batch_execute(&roll).await.unwrap();
    let told = || async { scans(&sql, &table).await.1 > before.1 + 50 };
    eventually("the scans are counted", 20 * SECOND, told).await;
    let after = scans(&sql, &table).await;
    assert!(after.0 <= 2, "more than when its two indexes were made: {after:?}");
}

/// The plan is made while the table of keys is empty, and kept by the session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dedup_keys_are_found_by_index_where_there_are_many_more_than_before() {
    let test = TestCluster::new(1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let (sql, append) = (test.sql(0).await, "select shardmq.append_once($1, 'x', $2::int::text)");
    let p = number(partition);
    // One page, read as a whole, is the quickest way as yet.
    sql.execute(append, &[&p, &0]).await.unwrap();
    sql.batch_execute("vacuum analyze shardmq.sent_key").await.unwrap();
    for n in 1..20 {
        sql.execute(append, &[&p, &n]).await.unwrap();
    }
    let fill = "insert into shardmq.sent_key
        select 10101, 'old-' || n, 1010126112200000001, shardmq.clock() from generate_series(1, 50000) n";
    sql.batch_execute(fill).await.unwrap();
    for n in 0..40 {
        sql.execute(append, &[&p, &n]).await.unwrap();
    }
    sql.batch_execute("analyze shardmq.sent_key").await.unwrap();
    for _ in 0..5 {
        sql.batch_execute("select shardmq.prune_sent_keys(10, shardmq.clock())").await.unwrap();
    }
    sql.batch_execute(TELL).await.unwrap();
    let keys = "shardmq.sent_key";
    let told = || async { scans(&sql, keys).await.1 > 90 };
    eventually("the scans are counted", 20 * SECOND, told).await;
    let after = scans(&sql, keys).await;
    assert!(after.0 <= 2, "more than when its two indexes were made: {after:?}");
}
