//! A role that may do no more than publish.

use tokio_postgres::error::SqlState;

use crate::support::stored::topic;
use crate::support::{TestCluster, own_server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_use_the_schema_publishes_and_does_nothing_else() {
    // Roles are the server's.
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let sql = test.sql(0).await;
    let role = "publisher";
    sql.batch_execute(&format!(
        "create role {role}; grant usage on schema shardmq to {role}; set role {role}"
    ))
    .await
    .unwrap();
    let publish = "select shardmq.publish('orders', 'x')";
    let id: i64 = sql.query_one(publish, &[]).await.unwrap().get(0);
    let later = "select shardmq.deliver_all(gen_random_uuid(), 'orders', null, 60, array['x'::bytea], null, null)";
    sql.batch_execute(later).await.unwrap();
    let refused = [
        &format!("select shardmq.cancel({id})"),
        "select shardmq.outbox_revive()",
        "select shardmq.keep_relaying(gen_random_uuid(), '{}', gen_random_uuid(), 1e9)",
        "select shardmq.end_relaying(gen_random_uuid())",
        "delete from shardmq.outbox",
    ];
    for statement in refused {
        let error = sql.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
    }
    // Of all functions, in whatever migration they were made.
    let may = "select array_agg(proname::text order by proname) from pg_proc
                where pronamespace = 'shardmq'::regnamespace and has_function_privilege(oid, 'execute')";
    let may: Vec<String> = sql.query_one(may, &[]).await.unwrap().get(0);
    assert_eq!(may, ["deliver_all", "publish"]);
    let grant =
        format!("reset role; grant execute on function shardmq.cancel to {role}; set role {role}");
    sql.batch_execute(&grant).await.unwrap();
    let cancel = "select shardmq.cancel($1)";
    assert!(sql.query_one(cancel, &[&id]).await.unwrap().get::<_, bool>(0));
}

/// What the README grants to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_that_produce_and_consume_by_sql_need_their_functions_alone() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let partition = topic(&test, "orders", 1).await[0];
    let sql = test.sql(0).await;
    for grant in include_str!("../../../README.md").lines() {
        if grant.starts_with("grant ") || grant.starts_with("create role ") {
            sql.batch_execute(grant).await.unwrap();
        }
    }
    sql.batch_execute("set role producer").await.unwrap();
    let append = format!("select shardmq.append({partition}, array['x', 'y']::bytea[])");
    sql.batch_execute(&append).await.unwrap();
    let once = format!("select shardmq.append_once({partition}, 'z', dedup_key => 'z')");
    sql.batch_execute(&once).await.unwrap();
    let take = "select token from shardmq.take('orders', 'billing', gen_random_uuid())";
    let error = sql.query(take, &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
    sql.batch_execute("reset role; set role consumer").await.unwrap();
    let token: String = sql.query_one(take, &[]).await.unwrap().get(0);
    let pull = "select id from shardmq.pull($1)";
    let ids = sql.query(pull, &[&token]).await.unwrap();
    assert_eq!(ids.len(), 3);
    let ack = "select shardmq.ack($1, $2)";
    sql.query(ack, &[&token, &ids[2].get::<_, i64>(0)]).await.unwrap();
    let error = sql.batch_execute(&append).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
}
