//! The highest id that was drawn, as a relay reads it beside those who draw.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::types::ToSql;

use crate::support::TestCluster;

const LOOK: &str = include_str!("../../../src/store/sql/outbox_look.sql");

/// One that is too high for a moment makes the relay pass over ids that are drawn after that, and take the
/// database for another when it is lower again.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn it_never_goes_back_and_is_never_ahead() {
    let test = TestCluster::new(1).await;
    let mut drawing = JoinSet::new();
    for _ in 0..2 {
        let sql = test.sql(0).await;
        drawing.spawn(async move {
            loop {
                let draw =
                    "select count(nextval('shardmq.outbox_id')) from generate_series(1, 20000)";
                sql.batch_execute(draw).await.unwrap();
            }
        });
    }
    let sql = test.sql(0).await;
    let look = sql.prepare(LOOK).await.unwrap();
    let none: Vec<i64> = Vec::new();
    let params: [&(dyn ToSql + Sync); 5] = [&0_i64, &1_i32, &none, &none, &false];
    let (mut last, mut reads, until) = (0_i64, 0, Instant::now() + Duration::from_secs(2));
    while Instant::now() < until {
        let now: i64 = sql.query_one(&look, &params).await.unwrap().get("last_id");
        assert!(now >= last, "{now} after {last}, at read {reads}");
        (last, reads) = (now, reads + 1);
    }
    drawing.shutdown().await;
}
