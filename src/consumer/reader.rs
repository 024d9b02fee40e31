//! Reads one partition, day by day, into the stream.
//!
//! ```text
//!          ┌───────────────── rows ──────────────┐
//!          v                                     │
//! wake ─> fetch ── empty ─> is the day closed? ─ yes ─> fetch again ── empty ─> next day
//!  ^                               │ no
//!  └───────────────────────────────┘
//! ```
//!
//! To leave a day the reader first sees that it is closed and *then*, in a later snapshot, reads it
//! until a read comes back empty: in the other order a batch appended in between would stay behind.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::consumer::budget::Room;
use crate::consumer::holding::Holding;
use crate::consumer::{Event, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Day;
use crate::store::connect::refused;
use crate::store::fetch::{self, Batch};
use crate::store::node::{Connection, Unfinished};

/// The most rows of one fetch.
const MAX_ROWS: i32 = 512;
/// How long room is held for a connection.
const BUSY: Duration = Duration::from_millis(50);
/// How long one fetch may take: the largest message over a slow line.
const FETCH: Duration = Duration::from_mins(1);
/// Between attempts after an error.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Where a reader is.
struct Reader {
    shared: Arc<Shared>,
    holding: Arc<Holding>,
    position: i64,
    day: Option<Day>,
    /// The day was seen to be closed, and this one comes next.
    next: Option<Day>,
}

/// Reads until the holding has ended, through every passing fault.
pub(crate) async fn read(shared: Arc<Shared>, holding: Arc<Holding>) {
    let ended = holding.ended.clone();
    let (_, position) = holding.position();
    let day = fetch::day_of(position);
    let reader = Reader { shared, holding, position, day, next: None };
    tokio::select! {
        () = ended.cancelled() => {}
        () = reader.run() => {}
    }
}

impl Reader {
    async fn run(mut self) {
        let mut backoff = BACKOFF.0;
        loop {
            match self.drain().await {
                Ok(()) => {
                    backoff = BACKOFF.0;
                    self.holding.wake.notified().await;
                }
                Err(error) => {
                    let partition = self.holding.partition;
                    if backoff == BACKOFF.0 {
                        tracing::warn!(%partition, error = %error.chain(), "reading failed, going on");
                    }
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// Reads until there is nothing more for now.
    async fn drain(&mut self) -> Result<()> {
        loop {
            let Some(day) = self.day else {
                if self.find_day().await? {
                    continue;
                }
                return Ok(());
            };
            if self.fetch(day).await? {
                continue;
            }
            // Empty. Was the day seen to be closed before this read?
            if let Some(next) = self.next.take() {
                self.day = Some(next);
                self.holding.set_position(self.day, self.position);
                continue;
            }
            self.shared.failpoint("empty").await;
            self.next = self.day_after(Some(day)).await?;
            if self.next.is_none() {
                return Ok(());
            }
            self.shared.failpoint("closed").await;
        }
    }

    /// The first day that has messages, or may have.
    async fn find_day(&mut self) -> Result<bool> {
        self.day = self.day_after(None).await?;
        self.holding.set_position(self.day, self.position);
        Ok(self.day.is_some())
    }

    async fn day_after(&self, day: Option<Day>) -> Result<Option<Day>> {
        let partition = self.holding.partition;
        let connection = self.shared.connection(partition.node()).await?;
        let state = fetch::partition_state(&connection, partition, day)
            .await
            .map_err(|error| refused(error, &format!("look at partition {partition}")))?;
        let Some(state) = state else {
            let what = format!("read partition {partition}: the node does not know it");
            return Err(Error::new(ErrorKind::NotFound, what));
        };
        Ok(state.day_after(day))
    }

    /// Reads on in a day. False: there was nothing.
    async fn fetch(&mut self, day: Day) -> Result<bool> {
        let partition = self.holding.partition;
        let (reserved, connection) = self.room_and_connection().await?;
        let bounds = (i64::try_from(reserved.size()).unwrap_or(i64::MAX), MAX_ROWS);
        let what = || format!("read partition {partition}");
        // Closed where it falls silent: the next one would hang in it too.
        let connection = Unfinished::new(connection);
        let fetch = fetch::fetch(connection.connection(), partition, day, self.position, bounds);
        let rows = timeout(FETCH, fetch)
            .await
            .map_err(|_| Error::new(ErrorKind::Unavailable, format!("{}: no answer", what())))?;
        connection.finished();
        let rows = rows.map_err(|error| refused(error, &what()))?;
        // A table that is gone has nothing more to say.
        let rows = rows.unwrap_or_default();
        let new: Vec<Batch> =
            rows.into_iter().filter(|row| row.last_id() > self.position).collect();
        let any = !new.is_empty();
        self.deliver(new, reserved);
        Ok(any)
    }

    /// Room for a fetch, and a connection to fetch with. Where that takes its time the room goes back
    /// meanwhile: readers of a node that hangs would sit on what those of others need.
    async fn room_and_connection(&self) -> Result<(Room, Connection)> {
        let node = self.holding.partition.node();
        loop {
            let room = self.shared.budget.reserve().await;
            if let Ok(connection) = timeout(BUSY, self.shared.connection(node)).await {
                return Ok((room, connection?));
            }
            drop(room);
            drop(self.shared.connection(node).await?);
        }
    }

    /// Hands rows to the stream, each with its part of the room that was reserved; the rest goes back.
    fn deliver(&mut self, rows: Vec<Batch>, mut reserved: Room) {
        for row in rows {
            let from = self.position.max(row.base_id - 1) + 1;
            self.position = row.last_id();
            let patchy = self.holding.tracker().read(from, self.position);
            let room = reserved.split(self.shared.weight(&row));
            let holding = Arc::clone(&self.holding);
            self.shared.send(Event::Batch { holding, row: Arc::new(row), from, patchy, room });
        }
        self.holding.set_position(self.day, self.position);
    }
}
