//! How migrations wait for locks: briefly, and again.
//!
//! A session that waits for an exclusive lock makes all later ones wait, appends too,
//! though it has nothing itself while a dump or an open transaction holds the table. So each wait
//! is short, and between two tries all others have their turn. The transaction of a try that failed
//! is rolled back.

use std::error::Error as StdError;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use crate::deadline::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{connect, sql};

/// How long a statement of a migration waits for a lock, and others wait behind it.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Between tries. The first is longer than a wait, so that others have more of the time.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1_500), Duration::from_secs(10));
/// How long locks are tried for in all.
const LIMIT: Duration = Duration::from_mins(10);
/// How often it is looked who has the lock, during a wait.
const LOOK: Duration = Duration::from_millis(250);

/// Sessions that have a lock which one waits for, or wait for it before.
const BLOCKERS: &str = "\
    select coalesce('table ' || n.nspname || '.' || c.relname, l.locktype || ' lock'), \
           string_agg(format('pid %s (%s, role %s, %s)', a.pid, \
               coalesce(nullif(a.application_name, ''), 'without a name'), a.usename, \
               coalesce(a.state, 'unknown state')), ', ') \
      from pg_locks l cross join unnest(pg_blocking_pids(l.pid)) b (pid) \
      join pg_stat_activity a on a.pid = b.pid \
      left join pg_class c on c.oid = l.relation left join pg_namespace n on n.oid = c.relnamespace \
     where l.pid = $1 and not l.granted group by 1 limit 1";

/// See the module.
pub(super) struct Patience {
    what: String,
    /// A connection that watches the other one; none where there was none to be had.
    watch: Option<Client>,
    pid: i32,
    until: Instant,
    pause: Duration,
    /// Which lock it is that was waited for, and who has it.
    seen: Option<(String, String)>,
}

impl Patience {
    /// For a session that makes migrations.
    pub(super) async fn new(url: &str, client: &Client, what: &str) -> Result<Self> {
        let row = client.query_one(sql::SERVER, &[]).await;
        let pid = row.map_err(|error| connect::refused(error, what))?.get(1);
        let watch = connect::connect_directly(url, "shardmq migrate").await.ok();
        let (until, pause) = (Instant::now() + LIMIT, PAUSES.0);
        Ok(Self { what: what.to_owned(), watch, pid, until, pause, seen: None })
    }

    /// Runs one try, and looks meanwhile whether it waits for somebody.
    pub(super) async fn watch<T>(&mut self, trying: impl Future<Output = T>) -> T {
        let mut trying = std::pin::pin!(trying);
        self.seen = None;
        loop {
            tokio::select! {
                done = &mut trying => return done,
                () = sleep(LOOK) => self.look().await,
            }
        }
    }

    async fn look(&mut self) {
        let Some(watch) = &self.watch else { return };
        if let Ok(Some(row)) = watch.query_typed_opt(BLOCKERS, &[(&self.pid, Type::INT4)]).await {
            self.seen = Some((row.get(0), row.get(1)));
        }
    }

    /// After a try that did not get its lock: says so, and waits until the next one.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where it was tried for long enough.
    pub(super) async fn wait(
        &mut self,
        error: impl StdError + Send + Sync + 'static,
    ) -> Result<()> {
        let (lock, holders) = self
            .seen
            .clone()
            .unwrap_or_else(|| ("a lock".to_owned(), "a session that is gone by now".to_owned()));
        let what = &self.what;
        if Instant::now() + self.pause >= self.until {
            let limit = LIMIT.as_secs();
            let text = format!(
                "{what}: {lock} was not to be had within {limit} s, held or waited for by {holders}: \
                 end that session, or migrate again later"
            );
            return Err(Error::with_source(ErrorKind::Unavailable, text, error));
        }
        let pause = jitter(self.pause);
        tracing::warn!(
            lock,
            holders,
            again_in_secs = pause.as_secs_f64(),
            "{what}: waits for a lock, and lets others go first"
        );
        sleep(pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        Ok(())
    }
}

/// Whether an attempt failed since a lock was not to be had in time.
pub(super) fn is_locked(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<tokio_postgres::Error>() {
            return matches!(
                error.code(),
                Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED)
            );
        }
        next = error.source();
    }
    false
}
