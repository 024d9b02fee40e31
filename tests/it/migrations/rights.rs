//! Databases that were restored without their privileges, as `pg_dump -O -x` leaves them: everybody could
//! execute everything.

use std::time::Duration;

use shardmq::Cluster;
use shardmq::migrate::{Schema, migrate};
use tokio_postgres::Client;
use tracing::Level;

use super::empty;
use crate::support::said::said;
use crate::support::{TestCluster, client, database, eventually, shared_server};

const SOON: Duration = Duration::from_secs(20);

/// Functions that everybody may execute.
async fn open(sql: &Client) -> Vec<String> {
    let open = "select coalesce(array_agg(proname::text order by proname), '{}') from pg_proc
                 where pronamespace = 'shardmq'::regnamespace
                   and has_function_privilege('public', oid, 'execute')";
    sql.query_one(open, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_restore_gave_to_everybody_is_taken_back() {
    let node = database(shared_server().await).await;
    migrate(&node, Schema::Outbox).await.unwrap();
    let outbox = empty("").await;
    migrate(&outbox, Schema::Outbox).await.unwrap();
    for (url, schema) in [(node, Schema::Node), (outbox, Schema::Outbox)] {
        let sql = client(&url).await;
        let restored =
            "update pg_proc set proacl = null where pronamespace = 'shardmq'::regnamespace";
        sql.batch_execute(restored).await.unwrap();
        assert!(open(&sql).await.len() > 5);
        let done = migrate(&url, schema).await.unwrap();
        assert!(done.len() == 1 && done[0].starts_with("rights: execute on "), "{done:?}");
        assert_eq!(open(&sql).await, ["deliver_all", "publish"]);
        assert!(migrate(&url, schema).await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upkeep_and_the_relay_alert_while_functions_are_everybodys() {
    let test = TestCluster::new(1).await;
    let sql = test.sql(0).await;
    let outbox = empty("").await;
    migrate(&outbox, Schema::Outbox).await.unwrap();
    let shop = client(&outbox).await;
    // So many as no other test has.
    for (sql, count) in [(&sql, 17), (&shop, 19)] {
        let mut all = String::new();
        for n in 0..count {
            let make = format!(
                "create function shardmq.open{n}() returns int language sql as 'select 1'; \
                 grant execute on function shardmq.open{n}() to public;"
            );
            all.push_str(&make);
        }
        sql.batch_execute(&all).await.unwrap();
    }
    test.cluster.create_topic("orders", shardmq::TopicOptions::partitions(1)).await.unwrap();
    let keeps = Cluster::builder(&test.control_url).outbox(&outbox).connect().await.unwrap();
    let _producer = keeps.producer("orders").build().await.unwrap();
    for count in ["17", "19"] {
        let told = async || {
            said(Level::WARN, "functions", count).iter().any(|said| said.has("alert", "rights"))
        };
        eventually("it is told", SOON, told).await;
    }
}
