//! Databases with settings of their own, and commits that are none.

use std::time::Duration;

use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, ErrorKind, Message, NodeId, PartitionId, TopicOptions};
use tokio_postgres::Client;

use crate::support::clocks::Clocks;
use crate::support::stored::{all_stored, assert_dense, number, stored, table, topic, waiting};
use crate::support::{TestCluster, client, eventually, shared_server, within};

const SECOND: Duration = Duration::from_secs(1);

/// A new database whose defaults are hostile, and a superuser's connection that overrides them.
async fn hostile(name: &str, isolation: &str, durability: &str) -> (String, Client) {
    let server = shared_server().await;
    let name = format!("{name}_{}", std::process::id());
    server.create_database(&name).await.unwrap();
    let url = server.url(&name);
    let sql = client(&url).await;
    for setting in [
        &format!("default_transaction_isolation = '{isolation}'"),
        "default_transaction_read_only = on",
        "default_transaction_deferrable = on",
        &format!("synchronous_commit = {durability}"),
        "client_min_messages = error",
        "statement_timeout = '5s'",
        "lock_timeout = '50ms'",
        "timezone = 'America/St_Johns'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "search_path = 'pg_catalog'",
        "check_function_bodies = off",
    ] {
        let alter = format!("alter database {name} set {setting}");
        sql.batch_execute(&alter).await.unwrap();
    }
    let sql = client(&url).await;
    let own =
        "set default_transaction_read_only = off; set statement_timeout = 0; set lock_timeout = 0;
               set default_transaction_isolation = 'read committed'";
    sql.batch_execute(own).await.unwrap();
    (url, sql)
}

/// Notes the durability of each transaction that writes to a table, as it is when it commits.
async fn note_durability(sql: &Client, tables: &[String]) {
    let note = "create table if not exists public.noted (relation text, durability text);
        create or replace function public.note() returns trigger language plpgsql as $$ begin
            insert into public.noted values (tg_relid::regclass, current_setting('synchronous_commit'));
            return null;
        end $$";
    sql.batch_execute(note).await.unwrap();
    for table in tables {
        let trigger = format!(
            "create constraint trigger note after insert or update on {table}
             deferrable initially deferred for each row execute function public.note()"
        );
        sql.batch_execute(&trigger).await.unwrap();
    }
}

async fn noted(sql: &Client) -> Vec<(String, String)> {
    let distinct = "select distinct relation, durability from public.noted order by 1, 2";
    let rows = sql.query(distinct, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn everything_works_with(name: &str, isolation: &str, durability: &str) {
    let (url, sql) = hostile(name, isolation, durability).await;
    for schema in [Schema::Control, Schema::Log, Schema::Node, Schema::Dedup] {
        migrate(&url, schema).await.unwrap();
        assert!(migrate(&url, schema).await.unwrap().is_empty());
    }
    let cluster = Cluster::connect(&url).await.unwrap();
    cluster.add_node(NodeId::new(1).unwrap(), &url).await.unwrap();
    let options = TopicOptions::partitions(3);
    let made = cluster.create_topic("orders", options).await.unwrap();
    let partitions: Vec<PartitionId> = made.partitions.iter().map(|p| p.partition).collect();
    let today = "select shardmq.day_of(shardmq.clock())";
    let today: i32 = sql.query_one(today, &[]).await.unwrap().get(0);
    let mut tables: Vec<String> = partitions.iter().map(|p| table(*p, today)).collect();
    tables.push("shardmq.partition".to_owned());
    note_durability(&sql, &tables).await;

    let mut messages = cluster.consumer("orders", "g").stream().await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    let texts = (0..200).map(|n| Message::new(n.to_string()).key(format!("k{}", n % 20)));
    let mut sent = Vec::new();
    for id in producer.send_all(texts).await {
        sent.push(id.unwrap());
    }
    for _ in 0..200 {
        let next = within(20 * SECOND, "a delivery", messages.next()).await;
        let delivery = next.unwrap().unwrap();
        sent.retain(|id| *id != delivery.id());
        delivery.ack().unwrap();
    }
    assert!(sent.is_empty());
    messages.shutdown(5 * SECOND).await.unwrap();
    let lag = cluster.lag("orders").await.unwrap();
    assert_eq!(lag.iter().map(|lag| lag.lag).sum::<u64>(), 0);
    assert_eq!(all_stored(&sql, &partitions).await.len(), 200);
    let noted = noted(&sql).await;
    assert!(!noted.is_empty());
    assert!(noted.iter().all(|(_, durability)| durability == "on"), "{noted:?}");
    cluster.delete_topic("orders", false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_in_a_read_only_repeatable_read_database() {
    everything_works_with("settings_rr", "repeatable read", "off").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_in_a_serializable_database() {
    everything_works_with("settings_serializable", "serializable", "remote_write").await;
}

/// An append that waits longer for the lock than the database lets a statement run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_timeout_does_not_end_a_wait_for_the_lock() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let alter = "do $$ begin execute format('alter database %I set statement_timeout = ''3s''',
                 current_database()); end $$";
    sql.batch_execute(alter).await.unwrap();
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let partition = topic(&test, "orders", 1).await[0];
    let holder = test.sql(0).await;
    holder.batch_execute("set statement_timeout = 0").await.unwrap();
    let producer = cluster.producer("orders").append_timeout(12 * SECOND);
    let producer = producer.build().await.unwrap();
    producer.send(Message::new("first")).await.unwrap();
    let lock = format!("begin; select shardmq.lock_partition({partition})");
    holder.batch_execute(&lock).await.unwrap();
    let send = tokio::spawn(async move { producer.send(Message::new("second")).await });
    let long = "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
                    and datname = current_database()
                    and clock_timestamp() - query_start > interval '4 s')";
    let waits = || async { sql.query_one(long, &[]).await.unwrap().get(0) };
    eventually("an append waits for long", 20 * SECOND, waits).await;
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(send.await.unwrap().unwrap().sequence(), 2);
}

/// In repeatable read it would see the partition as it was before it waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_the_lock_sees_what_its_holder_has_done() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let alter = "do $$ begin execute format('alter database %I set default_transaction_isolation =
                 ''repeatable read''', current_database()); end $$";
    sql.batch_execute(alter).await.unwrap();
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let partition = topic(&test, "orders", 1).await[0];
    let producer = cluster.producer("orders").send_timeout(15 * SECOND);
    let producer = producer.build().await.unwrap();
    producer.send(Message::new("first")).await.unwrap();
    for (change, stored_then) in [
        ("perform shardmq.append({}, array['theirs'::bytea])", 3),
        ("update shardmq.partition set state = 'sealed' where partition = {}", 3),
    ] {
        let change = change.replace("{}", &partition.to_string());
        let hold = format!(
            "begin; select shardmq.lock_partition({partition}); do $$ begin {change}; end $$"
        );
        sql.batch_execute(&hold).await.unwrap();
        let (sender, look) = (producer.clone(), test.sql(0).await);
        let send = tokio::spawn(async move { sender.send(Message::new("ours")).await });
        let waits = || async { waiting(&look, partition).await == 1 };
        eventually("the append waits", 20 * SECOND, waits).await;
        sql.batch_execute("commit").await.unwrap();
        let sent = send.await.unwrap();
        assert_eq!(sent.is_ok(), change.starts_with("perform"), "{sent:?}");
        assert_eq!(stored(&look, partition).await.len(), stored_then);
    }
}

#[tokio::test]
async fn tables_ahead_are_whole_days_in_utc_where_clocks_change() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let _clocks = Clocks::of(&test).await;
    let partition = topic(&test, "orders", 1).await[0];
    let days = "update shardmq.partition set day = 270326;
        update public.moved set ahead = timestamptz '2027-03-26 23:30+00' - clock_timestamp();
        set timezone = 'Europe/Berlin'";
    sql.batch_execute(days).await.unwrap();
    let ahead = format!("select shardmq.make_days_ahead({partition}, 5)");
    sql.batch_execute(&ahead).await.unwrap();
    for day in 270_326..=270_331 {
        let made = format!("select to_regclass('{}') is not null", table(partition, day));
        let made: bool = sql.query_one(&made, &[]).await.unwrap().get(0);
        assert!(made, "{day}");
    }
}

/// Puts a trigger on today's table of a partition, which acts on messages that begin with "bad".
async fn trigger(sql: &Client, partition: PartitionId, when: &str, action: &str) {
    let day: i32 =
        sql.query_one("select shardmq.day_of(shardmq.clock())", &[]).await.unwrap().get(0);
    let table = table(partition, day);
    let text = format!(
        "create or replace function public.act_{partition}() returns trigger language plpgsql as $$ begin
             if exists (select from unnest(new.payloads) p where substr(p, 1, 3) = 'bad') then {action}; end if;
             return new;
         end $$;
         create {when} on {table} {deferred} for each row execute function public.act_{partition}()",
        deferred = if when.contains("constraint") { "deferrable initially deferred" } else { "" },
    );
    sql.batch_execute(&text).await.unwrap();
}

#[tokio::test]
async fn a_commit_that_fails_acknowledges_nothing() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    let raise = "raise exception 'not at commit' using errcode = 'check_violation'";
    trigger(&sql, partition, "constraint trigger act after insert", raise).await;
    let producer = test.cluster.producer("orders").send_timeout(5 * SECOND);
    let producer = producer.build().await.unwrap();
    let texts = ["a", "bad", "b"].map(Message::new);
    let [a, bad, b] = producer.send_all(texts).await.try_into().unwrap();
    assert_eq!(bad.unwrap_err().kind(), ErrorKind::Invalid);
    let all = stored(&sql, partition).await;
    assert_dense(&all);
    let ids: Vec<_> = all.iter().map(|m| m.id).collect();
    assert_eq!(ids, [a.unwrap(), b.unwrap()]);
}

#[tokio::test]
async fn an_insert_that_inserted_nothing_acknowledges_nothing() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let partition = topic(&test, "orders", 1).await[0];
    trigger(&sql, partition, "trigger act before insert", "return null").await;
    let producer = test.cluster.producer("orders").send_timeout(6 * SECOND);
    let producer = producer.build().await.unwrap();
    let error = producer.send(Message::new("bad")).await.unwrap_err();
    assert_ne!(error.kind(), ErrorKind::Unknown, "{error:?}");
    assert_eq!(producer.send(Message::new("good")).await.unwrap().sequence(), 1);
    let by_sql = "select shardmq.append($1, array['bad'::bytea])";
    sql.query_one(by_sql, &[&number(partition)]).await.unwrap_err();
    assert_eq!(stored(&sql, partition).await.len(), 1);
}

/// All batches of a transaction go or none: where one is refused, its neighbours go by themselves.
#[tokio::test]
async fn a_refusal_in_one_partition_of_a_transaction_leaves_the_others_whole() {
    for code in ["check_violation", "raise_exception"] {
        let test = TestCluster::new(1).await;
        let sql = test.sql(0).await;
        let partitions = topic(&test, "orders", 4).await;
        let raise = format!("raise exception 'not this' using errcode = '{code}'");
        trigger(&sql, partitions[2], "trigger act before insert", &raise).await;
        let builder = Cluster::builder(&test.control_url).connections_per_node(1);
        let cluster = builder.connect().await.unwrap();
        let producer = cluster.producer("orders").build().await.unwrap();
        // Alone in its transaction while the others gather.
        producer.send(Message::new("first")).await.unwrap();
        let keyed = (0..40).map(|n| Message::new(format!("bad{n}")).key(format!("k{n}")));
        let outcomes = producer.send_all(keyed).await;
        let all = all_stored(&sql, &partitions).await;
        let good = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(all.len(), good + 1);
        assert!(good > 0 && good < 40);
        assert!(stored(&sql, partitions[2]).await.iter().all(|m| m.text() == "first"));
        assert!(waiting(&sql, partitions[2]).await == 0);
    }
}
