//! A role that may do no more than publish.

use tokio_postgres::error::SqlState;

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
        "select shardmq.keep_relaying(gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 1e9)",
        "select shardmq.end_relaying(gen_random_uuid())",
        "delete from shardmq.outbox",
    ];
    for statement in refused {
        let error = sql.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
    }
    let grant =
        format!("reset role; grant execute on function shardmq.cancel to {role}; set role {role}");
    sql.batch_execute(&grant).await.unwrap();
    let cancel = "select shardmq.cancel($1)";
    assert!(sql.query_one(cancel, &[&id]).await.unwrap().get::<_, bool>(0));
}
