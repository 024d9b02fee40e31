//! Nobody takes the place of a function, an operator or a type that ShardMQ names, by one of the
//! same name in a schema that others may write to.

/// Through the library, in its own sessions and in those of a pooler.
mod sessions;

use tokio_postgres::Client;

use crate::support::{TestCluster, client, database, shared_server};

/// Each of these fits calls of ShardMQ's better than the server's own, which takes any type: where
/// a call is resolved by a search path that has `public`, it leads here.
const TAKEN: &[&str] = &[
    "function public.unnest(a int[]) returns setof int",
    "function public.unnest(a text[]) returns setof text",
    "function public.unnest(a bytea[]) returns setof bytea",
    "function public.unnest(a jsonb[]) returns setof jsonb",
    "function public.unnest(a uuid[]) returns setof uuid",
    "function public.unnest(a bigint[]) returns setof bigint",
    "function public.unnest(a int8multirange) returns setof int8range",
    "function public.make_timestamp(int, int, int, int, int, int) returns timestamp",
    "function public.to_char(timestamp, unknown_text) returns text",
    "function public.cardinality(bytea[]) returns int",
    "function public.cardinality(text[]) returns int",
    "function public.cardinality(jsonb[]) returns int",
    "function public.array_ndims(bytea[]) returns int",
    "function public.array_ndims(text[]) returns int",
    "function public.array_ndims(jsonb[]) returns int",
    "function public.array_position(bytea[], bytea) returns int",
    "function public.concat_ws(text, text, int, uuid, bigint, bigint, bigint) returns text",
    "function public.upper(int8range) returns bigint",
    "function public.lower(int8range) returns bigint",
    "function public.row_to_json(record) returns json",
    "operator public.|| (leftarg = text, rightarg = int, function = public.taken_text)",
    "operator public.|| (leftarg = text, rightarg = bigint, function = public.taken_text)",
    "operator public.|| (leftarg = uuid, rightarg = text, function = public.taken_text)",
    "operator public.+ (leftarg = bigint, rightarg = bigint, function = public.taken_bigint)",
    "operator public.@> (leftarg = int8multirange, rightarg = bigint, function = public.taken_bool)",
];

/// A database in which everybody may create in `public`, as on Postgres 14, and somebody has.
async fn hostile(url: &str) -> Client {
    let sql = client(url).await;
    sql.batch_execute(
        "grant create on schema public to public;
         create domain public.unknown_text as text;
         create function public.raise() returns void language plpgsql as
             $$ begin raise exception 'taken over by public'; end $$;
         create function public.taken_text(text, int) returns text language sql as
             'select public.raise(); select null::text';
         create function public.taken_text(text, bigint) returns text language sql as
             'select public.raise(); select null::text';
         create function public.taken_text(uuid, text) returns text language sql as
             'select public.raise(); select null::text';
         create function public.taken_bigint(bigint, bigint) returns bigint language sql as
             'select public.raise(); select null::bigint';
         create function public.taken_bool(int8multirange, bigint) returns bool language sql as
             'select public.raise(); select null::bool'",
    )
    .await
    .unwrap();
    for taken in TAKEN {
        let body = if taken.starts_with("function") {
            " language plpgsql as $$ begin raise exception 'taken over by public'; end $$"
        } else {
            ""
        };
        sql.batch_execute(&format!("create {taken}{body}")).await.unwrap();
    }
    sql
}

/// Every function is resolved by its own search path, or was when it was made.
#[tokio::test]
async fn every_function_has_a_search_path_or_was_resolved_when_it_was_made() {
    let sql = client(&database(shared_server().await).await).await;
    let loose = "select p.oid::regprocedure::text
                   from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                  where n.nspname like 'shardmq%' and p.prosqlbody is null
                    and not coalesce(p.proconfig::text ~ 'search_path=\"?pg_catalog, pg_temp', false)
                  order by 1";
    let loose: Vec<String> =
        sql.query(loose, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(loose.is_empty(), "not pinned: {loose:#?}");
}

/// The functions that SQL users call, in a session whose path leads to the others first.
#[tokio::test]
async fn sql_users_functions_do_not_lead_to_functions_of_others() {
    let test = TestCluster::new(1).await;
    test.cluster.create_topic("orders", shardmq::TopicOptions::partitions(1)).await.unwrap();
    let sql = hostile(&test.node_urls[0]).await;
    sql.batch_execute(
        "set search_path = public;
         select shardmq.append(10101, array['a', 'b']::bytea[], array['k', null],
                               array['{\"h\": 1}', null]::jsonb[]);
         select shardmq.append_once(10101, 'c', 'once');
         select shardmq.publish('orders', 'd', 'k', '{\"h\": \"x\"}');
         select * from shardmq.messages(10101);
         select m.* from shardmq.messages(10101) x, shardmq.message(x.id) m;
         select t.*, shardmq.ack(t.token, (select max(id) from shardmq.pull(t.token)))
           from shardmq.take('orders', 'g', '00000000-0000-4000-8000-000000000001') t;
         select * from shardmq.lag('orders');
         select shardmq.roll(10101, now());
         select shardmq.give_back('g', '00000000-0000-4000-8000-000000000001')",
    )
    .await
    .unwrap();
}
