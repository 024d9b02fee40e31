//! Commits that wait for a standby that is away, and what ends such a wait.

use std::collections::HashSet;
use std::time::Duration;

use shardmq::embedded::Server;
use tokio_postgres::Client;

use super::{client, eventually};

const SOON: Duration = Duration::from_secs(20);

/// A server whose durable commits wait for a standby that never comes.
pub struct StandbyAway {
    sql: Client,
    ended: HashSet<(i32, String)>,
}

impl StandbyAway {
    /// From the return on, each durable commit on this server waits.
    pub async fn begin(server: &Server) -> Self {
        let sql = client(&server.url("postgres")).await;
        sql.batch_execute("create table if not exists public.written (n int)").await.unwrap();
        named(&sql, "nobody").await;
        // What is committed before the checkpointer has read the setting waits for nothing.
        let holder = client(&server.url("postgres")).await;
        let commit = tokio::spawn(async move {
            loop {
                let writing = holder.batch_execute("insert into public.written values (1)");
                if writing.await.is_err() {
                    return;
                }
            }
        });
        let waits = Self { sql, ended: HashSet::new() };
        eventually("a commit waits", SOON, async || !waits.all().await.is_empty()).await;
        let end =
            "select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'";
        waits.sql.query(end, &[]).await.unwrap();
        commit.await.unwrap();
        waits
    }

    /// The transactions that wait, by process and beginning.
    async fn all(&self) -> HashSet<(i32, String)> {
        let all = "select pid, xact_start::text from pg_stat_activity where wait_event = 'SyncRep'";
        let rows = self.sql.query(all, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// Waits until a transaction waits that was not ended here.
    pub async fn next(&self) {
        let is_new = async || !self.all().await.is_subset(&self.ended);
        eventually("another commit waits", SOON, is_new).await;
    }

    /// Cancels every wait that there is now, once another one has begun.
    pub async fn cancel(&mut self) {
        self.end_by("pg_cancel_backend").await;
    }

    /// Ends every session that waits now, once another wait has begun.
    pub async fn terminate(&mut self) {
        self.end_by("pg_terminate_backend").await;
    }

    async fn end_by(&mut self, function: &str) {
        self.next().await;
        let end = format!(
            "select pid, xact_start::text, {function}(pid) from pg_stat_activity
              where wait_event = 'SyncRep'"
        );
        let rows = self.sql.query(&end, &[]).await.unwrap();
        self.ended.extend(rows.iter().map(|row| (row.get(0), row.get(1))));
    }

    /// The standby is not waited for any more: who waits is answered.
    pub async fn over(&self) {
        named(&self.sql, "").await;
    }
}

/// Names the standby that commits wait for.
async fn named(sql: &Client, name: &str) {
    let set = format!("alter system set synchronous_standby_names = '{name}'");
    sql.batch_execute(&set).await.unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    let shown = async || {
        let shown = sql.query_one("show synchronous_standby_names", &[]).await.unwrap();
        shown.get::<_, String>(0) == name
    };
    eventually("the setting holds", SOON, shown).await;
}
