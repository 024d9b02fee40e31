//! Databases in which others may create functions and operators, and whose search_path finds those
//! first: no statement of ours calls one. And every statement of ours is bounded in time.

use std::time::Duration;

use shardmq::embedded::Server;
use shardmq::migrate::{Schema, migrate};
use shardmq::{
    Cluster, DeadLetterFilter, Message, NodeId, Order, PreparedStatements, Start, TopicOptions,
    dedup,
};
use tokio_postgres::Client;

use crate::support::pgbouncer::{PgBouncer, Unknown};
use crate::support::reading::next;
use crate::support::{client, eventually, shared_server};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(15);

/// A function that tells that it was called, also where the caller is rolled back then.
fn trap(signature: &str, returns: &str) -> String {
    format!(
        "create function public.{signature} returns {returns} language plpgsql as $$ begin
             perform pg_catalog.nextval('public.caught');
             raise exception 'taken over: {signature}';
         end $$;"
    )
}

/// Traps for what statements call, with the types that they call it with: each is a better match
/// than the one of Postgres, or as good and found before.
fn traps() -> String {
    let functions = [
        ("unnest(int[])", "setof int"),
        ("unnest(bigint[])", "setof bigint"),
        ("unnest(uuid[])", "setof uuid"),
        ("unnest(text[])", "setof text"),
        ("unnest(bytea[])", "setof bytea"),
        ("unnest(jsonb[])", "setof jsonb"),
        ("cardinality(bytea[])", "int"),
        ("cardinality(text[])", "int"),
        ("array_position(bytea[], bytea)", "int"),
        ("make_timestamp(int, int, int, int, int, int)", "timestamp"),
        ("make_interval(secs float8)", "interval"),
        ("range_agg(int8range)", "int8multirange"),
        ("current_setting(text)", "text"),
        ("current_setting(text, boolean)", "text"),
        ("set_config(text, text, boolean)", "text"),
        ("to_regclass(text)", "regclass"),
        ("clock_timestamp()", "timestamptz"),
        ("current_database()", "name"),
        ("pg_postmaster_start_time()", "timestamptz"),
        ("pg_advisory_xact_lock(int, int)", "void"),
        ("pg_try_advisory_xact_lock(int, int)", "boolean"),
        ("pg_try_advisory_xact_lock(bigint)", "boolean"),
        ("pg_advisory_lock(int, int)", "void"),
        ("pg_notify(text, text)", "void"),
        ("pg_logical_emit_message(boolean, text, text)", "pg_lsn"),
        ("gen_random_uuid()", "uuid"),
        ("octet_length(bytea)", "int"),
        ("octet_length(text)", "int"),
        ("lpad(text, int, text)", "text"),
        ("to_char(timestamp, text)", "text"),
        ("int8range(bigint, bigint, text)", "int8range"),
        ("int8multirange(int8range)", "int8multirange"),
    ];
    let types =
        ["int", "bigint", "text", "uuid", "boolean", "timestamptz", "int8multirange", "tid"];
    let compares = ["=", "<>", "<", ">", "<=", ">="];
    let mut all = String::from("create sequence public.caught;");
    for (signature, returns) in functions {
        all += &trap(signature, returns);
    }
    for (nth, of) in types.iter().enumerate() {
        all += &trap(&format!("compare_{nth}({of}, {of})"), "boolean");
        for operator in compares {
            all += &format!(
                "create operator public.{operator} (leftarg = {of}, rightarg = {of},
                     function = public.compare_{nth});"
            );
        }
    }
    for (nth, operator, left, right, returns) in [
        (0, "+", "int8multirange", "int8multirange", "int8multirange"),
        (1, "-", "int8multirange", "int8multirange", "int8multirange"),
        (2, "@>", "int8multirange", "bigint", "boolean"),
        (3, "-", "timestamptz", "interval", "timestamptz"),
        (4, "+", "bigint", "int", "bigint"),
        (5, "->>", "json", "text", "text"),
        (6, "||", "text", "text", "text"),
    ] {
        all += &trap(&format!("other_{nth}({left}, {right})"), returns);
        all += &format!(
            "create operator public.{operator} (leftarg = {left}, rightarg = {right},
                 function = public.other_{nth});"
        );
    }
    all
}

/// A database whose `search_path` finds the traps first, and a superuser's session that does not
/// use it.
async fn hostile(server: &Server, name: &str) -> (String, Client) {
    let name = format!("{name}_{}", std::process::id());
    server.create_database(&name).await.unwrap();
    let url = server.url(&name);
    let sql = client(&url).await;
    let set = format!("alter database {name} set search_path = public, pg_catalog");
    sql.batch_execute(&set).await.unwrap();
    sql.batch_execute(&traps()).await.unwrap();
    // As a session that was opened before.
    (url, sql)
}

/// Notes the statements in which the time is asked for that have no bound.
async fn note_unbounded(sql: &Client) {
    let note = "create table public.unbounded (statement text);
        create table public.ahead (by interval);
        insert into public.ahead values ('0');
        create or replace function shardmq.clock() returns timestamptz language plpgsql volatile
            set search_path = pg_catalog as $$ begin
                if '0' in (current_setting('statement_timeout'), current_setting('lock_timeout')) then
                    insert into public.unbounded values (current_query());
                end if;
                return clock_timestamp() + (select by from public.ahead);
            end $$";
    sql.batch_execute(note).await.unwrap();
}

/// All that a cluster does, in short.
async fn everything(cluster: &Cluster, node: &str, effects: &str) {
    cluster.add_node(NodeId::new(1).unwrap(), node).await.unwrap();
    cluster.create_topic("orders", TopicOptions::partitions(2)).await.unwrap();
    let producer = cluster.producer("orders").build().await.unwrap();
    for n in 0..6 {
        producer.send(Message::new(n.to_string()).key("k").header("h", "v")).await.unwrap();
    }
    producer.send(Message::new("once").key("k").dedup_key("d")).await.unwrap();
    producer.deliver_after(SECOND / 10, Message::new("later")).await.unwrap();
    let mut own = client(effects).await;
    let transaction = own.transaction().await.unwrap();
    producer.send_in(&transaction, Message::new("published")).await.unwrap();
    transaction.commit().await.unwrap();
    let builder = cluster.consumer("orders", "g").start(Start::Earliest).order(Order::Unordered);
    let builder = builder.poll_interval(SECOND / 10).flush_interval(SECOND / 10);
    let mut messages = builder.stream().await.unwrap();
    let mut left = 9;
    while left > 0 {
        let mut delivery = next(&mut messages).await;
        match (delivery.payload(), delivery.attempt()) {
            (b"0", 1) => delivery.retry("again"),
            (b"1", _) => {
                delivery.reject("never");
                left -= 1;
            }
            (b"2", _) => {
                let transaction = own.transaction().await.unwrap();
                let done = delivery.commit_in(&transaction).await.unwrap();
                transaction.commit().await.unwrap();
                done.committed();
                left -= 1;
            }
            _ => {
                let transaction = own.transaction().await.unwrap();
                assert!(dedup::record(&delivery, &transaction).await.unwrap());
                transaction.commit().await.unwrap();
                delivery.ack().unwrap();
                left -= 1;
            }
        }
    }
    dedup::prune(&own, SECOND).await.unwrap();
    messages.shutdown(5 * SECOND).await.unwrap();
    for lag in cluster.lag("orders").await.unwrap() {
        assert_eq!(lag.lag, 0, "{lag:?}");
    }
    let of_all = DeadLetterFilter::default();
    assert_eq!(cluster.retry_dead_letters(&of_all, |_| {}).await.unwrap().moved, 1);
    cluster.delete_group("orders", "g").await.unwrap();
}

/// The node's days are closed, and upkeep has frozen the last of their tables: the last that it
/// does.
async fn upkeep(sql: &Client, url: &str) {
    let day_later = "update public.ahead set by = '24 hours';
        set search_path = pg_catalog;
        select shardmq.roll(partition, shardmq.clock()) from shardmq.partition";
    sql.batch_execute(day_later).await.unwrap();
    // Upkeep is done by processes that produce or consume.
    let cluster = Cluster::connect(url).await.unwrap();
    let _producer = cluster.producer("orders").build().await.unwrap();
    let frozen = "select count(*) > 0 and bool_and(frozen) from shardmq.day";
    let is_frozen = || async { sql.query_one(frozen, &[]).await.unwrap().get(0) };
    eventually("closed days are frozen", SOON, is_frozen).await;
    cluster.shutdown().await;
}

/// Nothing was taken over, and every statement was bounded.
async fn assert_clean(sql: &Client, name: &str) {
    let caught = "select case when is_called then last_value else 0 end from public.caught";
    let caught: i64 = sql.query_one(caught, &[]).await.unwrap().get(0);
    assert_eq!(caught, 0, "{name}: calls were taken over");
    // Publishing is done in the user's own transaction, with the user's own bounds; so is this
    // test.
    let unbounded = "select statement from public.unbounded
         where statement !~ 'shardmq.publish[(]|^update public.ahead'";
    let unbounded = sql.query(unbounded, &[]).await.unwrap();
    let unbounded: Vec<String> = unbounded.iter().map(|row| row.get(0)).collect();
    assert!(unbounded.is_empty(), "{name}: {unbounded:?}");
}

async fn migrated(url: &str, sql: &Client) {
    for schema in [Schema::Control, Schema::Log, Schema::Node, Schema::Dedup] {
        migrate(url, schema).await.unwrap();
    }
    note_unbounded(sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_over_and_all_is_bounded_in_sessions_of_our_own() {
    let server = shared_server().await;
    for (name, setting) in
        [("path_auto", PreparedStatements::Auto), ("path_never", PreparedStatements::Never)]
    {
        let (url, sql) = hostile(server, name).await;
        migrated(&url, &sql).await;
        let cluster = Cluster::builder(&url).prepared_statements(setting).connect().await.unwrap();
        everything(&cluster, &url, &url).await;
        cluster.shutdown().await;
        upkeep(&sql, &url).await;
        assert_clean(&sql, name).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_over_and_all_is_bounded_through_a_pooler() {
    let server = shared_server().await;
    for (name, unknown) in [("path_refused", Unknown::Refused), ("path_ignored", Unknown::Ignored)]
    {
        let pooler = PgBouncer::start(server, 4, unknown).await;
        let (url, sql) = hostile(server, name).await;
        migrated(&url, &sql).await;
        let pooled = pooler.url(&url);
        let cluster = Cluster::connect(&pooled).await.unwrap();
        everything(&cluster, &pooled, &url).await;
        cluster.shutdown().await;
        upkeep(&sql, &pooled).await;
        assert_clean(&sql, name).await;
    }
}
