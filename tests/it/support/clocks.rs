//! Clocks that a test moves: that of a database, and that of a producer's machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use shardmq::ProducerBuilder;
use tokio_postgres::Client;

use super::TestCluster;

/// The clocks of a cluster's first node and of its clients.
pub struct Clocks {
    sql: Client,
    client_ahead_ms: Arc<AtomicI64>,
}

impl Clocks {
    /// Puts a clock that can be moved in place of the database's, at the right time as yet.
    pub async fn of(test: &TestCluster) -> Self {
        let sql = test.sql(0).await;
        sql.batch_execute(
            "create table public.moved (midnight timestamptz, ahead interval);
             insert into public.moved
             values (date_trunc('day', clock_timestamp() at time zone 'UTC') at time zone 'UTC', '0');
             grant select on public.moved to public;
             create or replace function shardmq.clock() returns timestamptz language sql volatile
                as 'select clock_timestamp() + (select ahead from public.moved)'",
        )
        .await
        .unwrap();
        Self { sql, client_ahead_ms: Arc::default() }
    }

    /// Sets both clocks: the time since the real midnight before the test began, as an interval.
    pub async fn set(&self, since_midnight: &str) {
        let ahead = self.set_server(since_midnight).await;
        self.client_ahead_ms.store(ahead, Ordering::SeqCst);
    }

    /// Sets the database's clock only. Returns how many milliseconds it is ahead of the true one.
    pub async fn set_server(&self, since_midnight: &str) -> i64 {
        let row = self
            .sql
            .query_one(
                "update public.moved
                    set ahead = make_interval(secs => extract(epoch from
                        midnight + $1::text::interval - clock_timestamp())::double precision)
                 returning (extract(epoch from ahead) * 1000)::bigint",
                &[&since_midnight],
            )
            .await
            .unwrap();
        row.get(0)
    }

    /// Moves the database's clock ahead, from where it is.
    pub async fn move_server(&self, by: &str) {
        let moved = "update public.moved set ahead = ahead + $1::text::interval";
        self.sql.execute(moved, &[&by]).await.unwrap();
    }

    /// Moves the clients' clocks, from where they are.
    pub fn move_client(&self, seconds: i64) {
        self.client_ahead_ms.fetch_add(seconds * 1000, Ordering::SeqCst);
    }

    /// A producer that goes by the clients' clock.
    pub fn on(&self, builder: ProducerBuilder) -> ProducerBuilder {
        let ahead = Arc::clone(&self.client_ahead_ms);
        builder.clock(move || moved(&ahead))
    }

    /// A day (YYMMDD) counted from the one on which the test began.
    pub async fn day(&self, days_later: i32) -> i32 {
        let sql = "select shardmq.day_of(midnight + $1 * interval '24 hours') from public.moved";
        let days = f64::from(days_later);
        self.sql.query_one(sql, &[&days]).await.unwrap().get(0)
    }
}

/// Looks after a cluster's nodes by its first node's clock, as a machine does whose clock was moved alike.
pub async fn look_after(test: &TestCluster) {
    let now: SystemTime =
        test.sql(0).await.query_one("select shardmq.clock()", &[]).await.unwrap().get(0);
    test.cluster.look_after_nodes_at(|| now).await.unwrap();
}

fn moved(ahead_ms: &AtomicI64) -> SystemTime {
    let ms = ahead_ms.load(Ordering::SeqCst);
    let by = Duration::from_millis(ms.unsigned_abs());
    if ms < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
}
