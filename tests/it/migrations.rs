//! Schemas: made by many at once, brought up to date, left alone where they are newer, refused where
//! they do not fit.

mod busy;
mod rights;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shardmq::migrate::{Schema, migrate};
use shardmq::{Cluster, ErrorKind, Message, NodeId};
use tokio_postgres::Client;

use crate::support::reading::{next, text};
use crate::support::stored::topic;
use crate::support::{TestCluster, client, database, shared_server, within};

const ALL: [Schema; 5] =
    [Schema::Control, Schema::Log, Schema::Outbox, Schema::Node, Schema::Dedup];
const SOON: Duration = Duration::from_secs(10);

/// A database without any of our schemas.
async fn empty(options: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let server = shared_server().await;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("empty{}_{number}", std::process::id());
    let admin = client(&server.url("postgres")).await;
    let create = format!("create database {name} {options}");
    admin.batch_execute(&create).await.unwrap();
    server.url(&name)
}

/// The table that says which migrations were applied.
fn history(schema: Schema) -> String {
    let prefix = if schema == Schema::Outbox { "outbox_" } else { "" };
    format!("{}.{prefix}migration", schema.name())
}

async fn applied(sql: &Client, schema: Schema) -> Vec<i32> {
    let text = format!("select version from {} order by version", history(schema));
    let rows = sql.query(&text, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_that_migrate_an_empty_database_at_once_one_does_and_all_succeed() {
    let url = empty("").await;
    for schema in ALL {
        let mut migrating = Vec::new();
        for _ in 0..10 {
            let url = url.clone();
            migrating.push(tokio::spawn(async move { migrate(&url, schema).await }));
        }
        let mut did_something = 0;
        for task in migrating {
            did_something += usize::from(!task.await.unwrap().unwrap().is_empty());
        }
        assert_eq!(did_something, 1, "{schema:?}");
        assert!(migrate(&url, schema).await.unwrap().is_empty());
        let versions = applied(&client(&url).await, schema).await;
        let dense: Vec<i32> = (1..=i32::try_from(versions.len()).unwrap()).collect();
        assert_eq!(versions, dense);
    }
}

/// Everything outside of our schemas that a migration could have touched, by name.
async fn surroundings(sql: &Client) -> BTreeSet<String> {
    let rows = sql
        .query(
            "select format('%s %s.%s %s', c.relkind, n.nspname, c.relname, c.relacl)
               from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where n.nspname !~ '^(shardmq|pg_toast|pg_temp)'
             union all
             select format('function %s', p.oid::regprocedure)
               from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname !~ '^shardmq'
             union all
             select format('type %s', t.oid::regtype)
               from pg_type t join pg_namespace n on n.oid = t.typnamespace
              where n.nspname !~ '^(shardmq|pg_toast|pg_temp)'
             union all
             select format('schema %s %s %s', nspname, nspowner, nspacl) from pg_namespace
              where nspname !~ '^(shardmq|pg_toast|pg_temp)'
             union all select format('extension %s %s', extname, extversion) from pg_extension
             union all select format('role %s', rolname) from pg_roles
             union all select format('setting %s %s %s', setdatabase, setrole, setconfig)
                         from pg_db_role_setting s
                        where setdatabase in (0, (select oid from pg_database where datname = current_database()))
             union all select format('event trigger %s', evtname) from pg_event_trigger
             union all select format('orders %s', o) from public.orders o
             union all select format('history %s', h) from public.refinery_schema_history h",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_has_in_the_database_is_not_touched() {
    let url = empty("").await;
    let sql = client(&url).await;
    sql.batch_execute(
        "create table public.orders (id int primary key, partition text);
         insert into public.orders values (1, 'mine');
         create table public.refinery_schema_history
             (version int4 primary key, name text, applied_on text, checksum text);
         insert into public.refinery_schema_history values (1, 'users', 'long ago', '7');
         create schema app; create table app.member (id int); create type app.cursor as (a int);
         create function app.clock() returns int language sql as 'select 1'",
    )
    .await
    .unwrap();
    let before = surroundings(&sql).await;
    for schema in ALL {
        migrate(&url, schema).await.unwrap();
    }
    assert_eq!(surroundings(&sql).await, before);
    // Nor does using it.
    let test = TestCluster::of(vec![url]).await;
    round_trip(&test).await;
    assert_eq!(surroundings(&sql).await, before);
}

async fn round_trip(test: &TestCluster) {
    topic(test, "orders", 1).await;
    let producer = test.cluster.producer("orders").build().await.unwrap();
    producer.send(Message::new("x")).await.unwrap();
    let mut messages = test.cluster.consumer("orders", "g").stream().await.unwrap();
    let delivery = next(&mut messages).await;
    assert_eq!(text(&delivery), "x");
    delivery.ack().unwrap();
    messages.flush().await.unwrap();
    messages.shutdown(SOON).await.unwrap();
    producer.shutdown(SOON).await.unwrap();
    assert_eq!(test.cluster.lag("orders").await.unwrap()[0].lag, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_the_schema_is_refused_with_the_way_out() {
    let url = empty("").await;
    let error = Cluster::connect(&url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("run `shardmq migrate`"), "{error}");
    let test = TestCluster::new(1).await;
    let error = test.cluster.add_node(NodeId::new(2).unwrap(), &url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("run `shardmq migrate`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_that_needs_a_newer_library_refuses_this_one_and_names_both() {
    let url = database(shared_server().await).await;
    let sql = client(&url).await;
    for schema in ALL {
        // The log centre's schema may say it too.
        let table = history(schema).replace("migration", "compatibility");
        let says = format!("update {table} set min_library = '7.8.9'");
        if sql.batch_execute(&says).await.is_err() {
            continue;
        }
        let error = migrate(&url, schema).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        let told = error.to_string();
        assert!(told.contains("7.8.9") && told.contains(env!("CARGO_PKG_VERSION")), "{told}");
    }
    let error = Cluster::connect(&url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("7.8.9"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_needs_a_newer_library_is_refused_while_the_others_work() {
    let test = TestCluster::new(2).await;
    topic(&test, "orders", 2).await;
    let newer = test.sql(1).await;
    newer.batch_execute("update shardmq.compatibility set min_library = '7.8.9'").await.unwrap();
    let cluster = Cluster::connect(&test.control_url).await.unwrap();
    let error = cluster.lag("orders").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    let described = cluster.topic("orders").await.unwrap();
    let states: Vec<&str> = described.partitions.iter().map(|p| p.state.as_str()).collect();
    assert_eq!(states, ["open", "unreachable"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_that_a_newer_library_has_migrated_further_is_used_as_it_is() {
    let url = database(shared_server().await).await;
    let sql = client(&url).await;
    for schema in ALL {
        let further = format!(
            "insert into {} select 999, 'from_the_future', applied_on, '1' from {0} limit 1",
            history(schema)
        );
        sql.batch_execute(&further).await.unwrap();
        assert!(migrate(&url, schema).await.unwrap().is_empty());
    }
    round_trip(&TestCluster::of(vec![url]).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_older_than_the_library_says_migrate() {
    let url = database(shared_server().await).await;
    let sql = client(&url).await;
    for schema in [Schema::Control, Schema::Node] {
        let name = schema.name();
        let older = format!(
            "delete from {name}.migration where version = (select max(version) from {name}.migration)"
        );
        sql.batch_execute(&older).await.unwrap();
    }
    let error = Cluster::connect(&url).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    let told = error.to_string();
    assert!(told.contains("run `shardmq migrate`") && told.contains("version"), "{told}");
    let test = TestCluster::new(1).await;
    let error = test.cluster.add_node(NodeId::new(2).unwrap(), &url).await.unwrap_err();
    assert!(error.to_string().contains("run `shardmq migrate`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_not_utf8_is_refused_and_left_empty() {
    let url = empty("encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0").await;
    for schema in ALL {
        let error = migrate(&url, schema).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("SQL_ASCII"), "{error}");
    }
    let count = "select count(*) from pg_namespace where nspname like 'shardmq%'";
    let made: i64 = client(&url).await.query_one(count, &[]).await.unwrap().get(0);
    assert_eq!(made, 0);
}

/// As the module's documentation says, for services that have refinery run their own migrations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_runners_work_in_a_users_own_migration() {
    let url = empty("").await;
    let mut sql = client(&url).await;
    for schema in ALL {
        sql.batch_execute(schema.prepare_sql()).await.unwrap();
        schema.runner().run_async(&mut sql).await.unwrap();
        assert!(migrate(&url, schema).await.unwrap().is_empty());
    }
    round_trip(&TestCluster::of(vec![url]).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_the_database_do_not_matter() {
    let url = empty("").await;
    let name = url.rsplit('/').next().unwrap();
    let sql = client(&url).await;
    sql.batch_execute(&format!(
        "alter database {name} set default_transaction_read_only = on;
         alter database {name} set default_transaction_isolation = 'serializable';
         alter database {name} set statement_timeout = '400ms';
         alter database {name} set lock_timeout = '20ms';
         alter database {name} set search_path = 'nowhere';
         alter database {name} set timezone = 'Pacific/Kiritimati';
         alter database {name} set datestyle = 'German';
         alter database {name} set intervalstyle = 'sql_standard';
         alter database {name} set bytea_output = 'escape'"
    ))
    .await
    .unwrap();
    for schema in ALL {
        let (one, two) = tokio::join!(migrate(&url, schema), migrate(&url, schema));
        assert_ne!(one.unwrap().is_empty(), two.unwrap().is_empty());
    }
    // What they have made is used on a busy machine, too.
    sql.batch_execute(&format!("alter database {name} set statement_timeout = '5s'"))
        .await
        .unwrap();
    let test = within(SOON, "a cluster", TestCluster::of(vec![url])).await;
    round_trip(&test).await;
}

/// With an outbox of its own, and then as a node: publishing works before and after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_with_an_outbox_becomes_a_node() {
    let url = empty("").await;
    assert!(!migrate(&url, Schema::Outbox).await.unwrap().is_empty());
    assert!(migrate(&url, Schema::Outbox).await.unwrap().is_empty());
    let sql = client(&url).await;
    sql.batch_execute("select shardmq.publish('orders', 'before')").await.unwrap();
    assert!(!migrate(&url, Schema::Node).await.unwrap().is_empty());
    migrate(&url, Schema::Control).await.unwrap();
    assert!(migrate(&url, Schema::Outbox).await.unwrap().is_empty());
    // By whoever may use the schema, and they may do nothing else.
    let anybody = "select array_agg(proname::text order by proname) from pg_proc
                    where pronamespace = 'shardmq'::regnamespace
                      and has_function_privilege('public', oid, 'execute')";
    let anybody: Vec<String> = sql.query_one(anybody, &[]).await.unwrap().get(0);
    assert_eq!(anybody, ["deliver_all", "publish"]);
    sql.batch_execute("select shardmq.publish('orders', 'after')").await.unwrap();
    let test = TestCluster::of(vec![url]).await;
    let partitions = topic(&test, "orders", 1).await;
    let _relay = crate::support::relays::Relay::start(&test, "orders").await;
    let all = crate::support::relays::arrive(&sql, &partitions, 2).await;
    assert_eq!(crate::support::relays::texts(&all), ["before", "after"]);
}
