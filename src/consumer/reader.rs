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
//!
//! Every fetch starts with the row that was read last and compares it. If it is gone or another, a
//! server was put in the place of the one that was read, and lacks the end of its log: what was read
//! and not committed is void. A look "after reconnecting" would not do: behind a pooler the connection
//! survives.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::timeout;

mod days;
mod trouble;
mod unread;

use crate::cluster::Stuck;
use crate::consumer::budget::Room;
use crate::consumer::holding::{Holding, Place};
use crate::consumer::member::Command;
use crate::consumer::{Event, Read, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Day;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::fetch::{self, Batch, Identity, Overlap, PartitionState};
use crate::store::group;
use crate::store::node::{Connection, Unfinished};
use crate::store::unread::is_damage;
use crate::store::upkeep;
use crate::supervise::caught;
use trouble::Lasting;

/// The most rows of one fetch.
const MAX_ROWS: i32 = 512;
/// How long a reader waits for room before it says so, and before it says so again.
const PRESSURE: Duration = Duration::from_millis(500);
/// How long room is held for a connection.
const BUSY: Duration = Duration::from_millis(50);
/// How long one fetch may take: the largest message over a slow line.
const FETCH: Duration = Duration::from_mins(1);

/// Where a reader is.
struct Reader {
    shared: Arc<Shared>,
    holding: Arc<Holding>,
    position: i64,
    day: Option<Day>,
    /// The day was seen to be closed, and this one comes next.
    next: Option<Day>,
    /// The day that took appends when the partition was looked at last.
    open: Option<Day>,
    /// The row read last, and the day that it is of.
    last: Option<(Day, Identity)>,
    /// A row that the server could not read, and how often.
    damaged: (i64, u32),
}

/// What a fetch brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fetched {
    Nothing,
    /// All there was.
    Rows,
    /// As much as one fetch may bring.
    Full,
    /// The reader is on another day now.
    Moved,
}

/// Reads until the holding has ended. A reader that panics is told, and its partition is taken anew from the
/// committed cursor after a pause: by this member, or by whichever should have it then.
pub(crate) async fn keep_reading(shared: Arc<Shared>, holding: Arc<Holding>) {
    let reading = read(Arc::clone(&shared), Arc::clone(&holding));
    let Err(error) = Box::pin(caught("reader", reading)).await else { return };
    let (partition, owner) = (holding.partition, holding.owner());
    let what = format!("read partition {partition}: {error}; it is read anew");
    shared.send(Event::Error(Error::new(ErrorKind::Unavailable, what)));
    tokio::select! {
        () = tokio::time::sleep(shared.reader_failed(partition)) => {}
        () = holding.ended.cancelled() => {}
    }
    shared.tell(partition.node(), Command::Anew { partition, owner });
}

/// Reads until the holding has ended, through every passing fault.
async fn read(shared: Arc<Shared>, holding: Arc<Holding>) {
    let ended = holding.ended.clone();
    let (_, position) = holding.position();
    let day = fetch::day_of(position);
    let damaged = (0, 0);
    let reader =
        Reader { shared, holding, position, day, next: None, open: None, last: None, damaged };
    tokio::select! {
        () = ended.cancelled() => {}
        () = reader.run() => {}
    }
}

impl Reader {
    async fn run(mut self) {
        let mut lasting = Lasting::new();
        loop {
            match self.drain().await {
                Ok(()) => {
                    lasting.end();
                    self.holding.wake.notified().await;
                }
                Err(Stop::Lost) => {
                    let (partition, owner) = (self.holding.partition, self.holding.fence.owner);
                    self.holding.void();
                    let told = Command::TailLost { partition, owner };
                    self.shared.tell(partition.node(), told);
                    std::future::pending::<()>().await;
                }
                Err(Stop::Error(error)) => {
                    self.tell_of(&mut lasting, &error);
                    tokio::time::sleep(lasting.pause()).await;
                }
            }
        }
    }

    /// Reads until there is nothing more for now. What is appended to the open day after a fetch that
    /// brought all there was comes with a hint, or a look, which wakes this reader again.
    async fn drain(&mut self) -> Result<(), Stop> {
        loop {
            self.turn().await?;
            let Some(day) = self.day else {
                self.day = self.look().await?;
                self.holding.set_position(self.day, self.position);
                if self.day.is_none() {
                    return Ok(());
                }
                continue;
            };
            match self.fetch(day).await? {
                Fetched::Nothing => {}
                Fetched::Rows if self.open == self.day => return Ok(()),
                Fetched::Full | Fetched::Moved | Fetched::Rows => continue,
            }
            // Was the day seen to be closed before this read?
            if let Some(next) = self.next.take() {
                self.day = Some(next);
                self.holding.set_position(self.day, self.position);
                continue;
            }
            self.shared.failpoint("empty").await;
            self.next = self.look().await?;
            if self.next.is_none() {
                return Ok(());
            }
            self.shared.failpoint("closed").await;
        }
    }

    /// Waits while nothing is to be read, and goes back where what was read was dropped.
    async fn turn(&mut self) -> Result<(), Stop> {
        while self.holding.is_paused() || self.holding.is_far_ahead() {
            self.compare_if_asked().await?;
            self.holding.wake.notified().await;
        }
        if let Some(place) = self.holding.unless_rewound(|_| {}) {
            self.go_back(place);
        }
        Ok(())
    }

    /// Where another server has answered: the lease of all partitions there waits for the comparison.
    async fn compare_if_asked(&self) -> Result<(), Stop> {
        if !self.holding.is_to_be_compared() {
            return Ok(());
        }
        let connection = self.shared.connection(self.holding.partition.node()).await?;
        let compared = if let Some((day, last)) = &self.last {
            Some(self.compare_last(&connection, *day, last).await?)
        } else {
            self.state(&connection, self.day).await?.map(|state| state.incarnation)
        };
        self.accept(&connection, compared.unwrap_or(self.holding.incarnation())).await
    }

    /// Which server has the row that was read last, or says that retention has dropped it: a paused
    /// reader may stand in that day for long.
    async fn compare_last(
        &self,
        connection: &Connection,
        day: Day,
        last: &Identity,
    ) -> Result<SystemTime, Stop> {
        let partition = self.holding.partition;
        let found = fetch::overlap(connection, partition, day, last).await;
        match self.noted(found)? {
            Overlap::Same(incarnation) => Ok(incarnation),
            Overlap::NoTable => self.dropped_on(connection, day).await?.ok_or(Stop::Lost),
            Overlap::Changed => Err(Stop::Lost),
        }
    }

    fn stuck(&self) -> &Stuck {
        self.shared.cluster.inner.nodes.stuck()
    }

    /// What reading a day table has brought. One that can't be read is left out of looks.
    fn noted<T>(&self, read: Result<T, Failed>) -> Result<T> {
        let partition = self.holding.partition;
        read.map_err(|error| {
            if fetch::is_of_a_table(&error) {
                self.stuck().add(partition);
            }
            refused(error, &format!("read partition {partition}"))
        })
    }

    fn go_back(&mut self, place: Place) {
        self.position = place.position;
        self.day = fetch::day_of(place.position);
        self.next = None;
        self.last = place.last;
        self.holding.set_position(self.day, self.position);
    }

    /// Where the partition stands: the day to be read after this one, if there is one. A position that
    /// retention has passed moves on to the low watermark.
    async fn look(&mut self) -> Result<Option<Day>, Stop> {
        let partition = self.holding.partition;
        let connection = self.shared.connection(partition.node()).await?;
        let what = || format!("look at partition {partition}");
        let Some(state) = self.state(&connection, self.day).await? else {
            let what = format!("read partition {partition}: the node does not know it");
            return Err(Error::new(ErrorKind::NotFound, what).into());
        };
        if self.last.is_none() {
            // Nothing was read that another server could lack.
            self.accept(&connection, state.incarnation).await?;
        }
        if state.low_watermark > self.position + 1 {
            let missed = upkeep::missed(&connection, partition, self.position)
                .await
                .map_err(|error| refused(error, &what()))?;
            self.pass(state.low_watermark, missed);
        }
        if self.has_left(state.day) {
            return Err(Stop::Lost);
        }
        self.open = Some(state.day);
        Ok(state.day_after(self.day))
    }

    /// Goes on behind the days that retention has dropped, and says what was missed.
    fn pass(&mut self, low_watermark: i64, missed: u64) {
        self.position = low_watermark - 1;
        self.last = None;
        if missed > 0 {
            ::metrics::counter!(names::MISSED).increment(missed);
            let what = format!(
                "partition {}: retention dropped {missed} messages before group {} had read them",
                self.holding.partition, self.shared.group
            );
            tracing::error!(alert = "retention", "{what}");
            self.shared.send(Event::Error(Error::new(ErrorKind::Missed, what)));
        }
    }

    /// Reads on in a day.
    async fn fetch(&mut self, day: Day) -> Result<Fetched, Stop> {
        let partition = self.holding.partition;
        let _turn = self.stuck().turn(partition).await;
        let (reserved, connection) = self.room_and_connection().await?;
        let bound = reserved.size();
        // Closed where it falls silent: the next one would hang in it too.
        let connection = Unfinished::new(connection);
        let read = timeout(FETCH, self.compared(connection.connection(), day, bound)).await;
        let read = read.map_err(|_| {
            Error::new(ErrorKind::Unavailable, format!("read partition {partition}: no answer"))
        })?;
        connection.finished();
        let Some(rows) = read? else { return self.table_gone(day).await };
        // A position beyond the end of the log has nothing yet to be compared with.
        if let Some(row) = rows.first().filter(|row| row.last_id() == self.position) {
            self.last = Some((day, row.identity()));
        }
        let full = rows.len() >= usize::try_from(MAX_ROWS).unwrap_or(usize::MAX);
        let mut new: Vec<Batch> =
            rows.into_iter().filter(|row| row.last_id() > self.position).collect();
        let unread = unread::split_off(&mut new);
        let bytes: usize = new.iter().map(|row| row.bytes).sum();
        let (any, full) = (!new.is_empty(), full || bytes >= bound);
        if !self.deliver(new, day, reserved) {
            return Ok(Fetched::Full);
        }
        if let Some(row) = unread {
            self.pass_unread(row, day).await?;
            return Ok(Fetched::Full);
        }
        Ok(match (any, full) {
            (false, _) => Fetched::Nothing,
            (true, false) => Fetched::Rows,
            (true, true) => Fetched::Full,
        })
    }

    /// The rows from the last one on, which was compared; none where the table does not exist.
    async fn compared(
        &mut self,
        connection: &Connection,
        day: Day,
        bound: usize,
    ) -> Result<Option<Vec<Batch>>, Stop> {
        let partition = self.holding.partition;
        let bounds = (i64::try_from(bound).unwrap_or(i64::MAX), MAX_ROWS);
        let rows = match fetch::fetch(connection, partition, day, self.position, bounds).await {
            Err(error) if is_damage(&error) => self.around_damage(connection, day, bound).await?,
            rows => self.noted(rows)?,
        };
        self.stuck().remove(partition);
        if let Some(rows) = &rows {
            self.compare(connection, day, rows.first()).await?;
            if let Some(first) = rows.first() {
                self.expect_none_between(connection, day, first.incarnation).await?;
            }
        }
        Ok(rows)
    }

    /// Compares the row that was read last with what is there now.
    async fn compare(
        &self,
        connection: &Connection,
        day: Day,
        first: Option<&Batch>,
    ) -> Result<(), Stop> {
        let partition = self.holding.partition;
        let read_on = first.map(|row| row.incarnation);
        let seen_on = match &self.last {
            Some((of, last)) if *of == day => {
                let same = first.filter(|row| row.identity() == *last);
                same.ok_or(Stop::Lost)?.incarnation
            }
            // No row of this day was read yet: the last one of the day before is compared.
            Some((of, last)) => self.compare_last(connection, *of, last).await?,
            // Nothing was read that another server could lack: the position is of the cursor itself,
            // which is in the same log, and the fence says whether it still is this holding's.
            None => read_on.unwrap_or(self.holding.incarnation()),
        };
        if read_on.is_some_and(|read_on| read_on != seen_on) {
            let what = format!("read partition {partition}: another server answered meanwhile");
            return Err(Error::new(ErrorKind::Unavailable, what).into());
        }
        self.accept(connection, seen_on).await
    }

    /// The server has the row that was read last. Another one than before must also have what the node was
    /// given instead of acknowledgements: copies that were put aside, and users' transactions.
    async fn accept(&self, connection: &Connection, incarnation: SystemTime) -> Result<(), Stop> {
        let holding = &self.holding;
        if incarnation != holding.incarnation() && holding.has_entrusted() {
            let partition = holding.partition;
            let what = || format!("look what partition {partition} has acknowledged");
            let asked =
                group::entrusted(connection, &holding.group, partition, holding.fence).await;
            // Another owner's: the next renewal finds that.
            if let Some((acked_id, ahead, server)) =
                asked.map_err(|error| refused(error, &what()))?
            {
                if server != incarnation {
                    let what = format!("{}: another server answered meanwhile", what());
                    return Err(Error::new(ErrorKind::Unavailable, what).into());
                }
                if !holding.is_kept_by(acked_id, &ahead) {
                    return Err(Stop::Lost);
                }
            }
        }
        holding.seen_on(incarnation);
        Ok(())
    }

    /// Which server says that retention has passed a day, if it has.
    async fn dropped_on(
        &self,
        connection: &Connection,
        day: Day,
    ) -> Result<Option<SystemTime>, Stop> {
        let state = self.state(connection, Some(day)).await?;
        let end = fetch::end_of(self.holding.partition, day);
        let dropped = state.filter(|state| state.low_watermark > end);
        Ok(dropped.map(|state| state.incarnation))
    }

    async fn state(
        &self,
        connection: &Connection,
        day: Option<Day>,
    ) -> Result<Option<PartitionState>> {
        let partition = self.holding.partition;
        let state = fetch::partition_state(connection, partition, day).await;
        state.map_err(|error| refused(error, &format!("look at partition {partition}")))
    }

    /// The table of the day is gone: dropped by retention, or never there on this server.
    async fn table_gone(&mut self, day: Day) -> Result<Fetched, Stop> {
        let partition = self.holding.partition;
        let before = self.position;
        let next = self.look().await?;
        if self.position > before || self.position >= fetch::end_of(partition, day) {
            self.day = next;
            self.next = None;
            self.holding.set_position(self.day, self.position);
            return Ok(Fetched::Moved);
        }
        if next.is_none() && self.last.is_some() {
            return Err(Stop::Lost);
        }
        let what = format!("read partition {partition}: it has no table of day {day}");
        Err(Error::new(ErrorKind::Database, what).into())
    }

    /// Room for a fetch, and a connection to fetch with. Where that takes its time the room goes back
    /// meanwhile: readers of a node that hangs would sit on what those of others need.
    async fn room_and_connection(&self) -> Result<(Room, Connection), Stop> {
        let node = self.holding.partition.node();
        loop {
            let room = self.room().await?;
            if let Ok(connection) = timeout(BUSY, self.shared.connection(node)).await {
                return Ok((room, connection?));
            }
            drop(room);
            drop(self.shared.connection(node).await?);
        }
    }

    /// Room for a fetch. While there is none, what nobody takes of others may be dropped for it.
    async fn room(&self) -> Result<Room, Stop> {
        // One wait: who came first goes first.
        let mut reserved = std::pin::pin!(self.shared.budget.reserve());
        loop {
            if let Ok(room) = timeout(PRESSURE, &mut reserved).await {
                return Ok(room);
            }
            self.shared.press();
            self.compare_if_asked().await?;
        }
    }

    /// Hands rows to the stream, each with its part of the room that was reserved; the rest goes back.
    /// False where not all were: too much lies above the cursor, or there is a place to go back to.
    fn deliver(&mut self, rows: Vec<Batch>, day: Day, mut reserved: Room) -> bool {
        let holding = Arc::clone(&self.holding);
        for row in rows {
            if holding.is_far_ahead() {
                return false;
            }
            let from = self.position.max(row.base_id - 1) + 1;
            let (last_id, identity) = (row.last_id(), row.identity());
            let rewound = holding.unless_rewound(|round| {
                let patchy = holding.read(&row, from);
                let room = reserved.split(self.shared.weight(&row));
                let row = Arc::new(row);
                let batch = Read { holding: Arc::clone(&holding), row, from, patchy, round, room };
                self.shared.send(Event::Batch(batch));
            });
            if let Some(place) = rewound {
                self.go_back(place);
                return false;
            }
            (self.position, self.last) = (last_id, Some((day, identity)));
            holding.set_position(self.day, self.position);
        }
        true
    }
}

/// Why a reader stops for now.
enum Stop {
    /// The server lacks what was read: the holding is void.
    Lost,
    /// To be tried again.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}
