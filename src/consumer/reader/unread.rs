//! Rows that can't be read: found one by one, told, and passed over by a dead letter for each message.

use crate::consumer::holding::Holding;
use crate::consumer::member::Command;
use crate::consumer::reader::{Reader, Stop};
use crate::consumer::{Event, Unreadable};
use crate::error::{Error, ErrorKind};
use crate::failure::FailedAttempt;
use crate::id::Day;
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::dead::{self, Unread};
use crate::store::fetch::Batch;
use crate::store::group::Moved;
use crate::store::node::Connection;
use crate::store::unread::{self, Unreadable as Why};

/// How often the server must fail at a row before it counts as one that can't be read.
const ATTEMPTS: u32 = 3;

/// Takes the first row that can't be read, and all behind it, from what was read. Returns that row.
pub(super) fn split_off(rows: &mut Vec<Batch>) -> Option<Batch> {
    let first = rows.iter().position(|row| row.unreadable.is_some())?;
    rows.drain(first..).next()
}

impl Reader {
    /// The server can't read some row: what is before that one is read, and it is found.
    pub(super) async fn around_damage(
        &mut self,
        connection: &Connection,
        day: Day,
        bound: usize,
    ) -> Result<Option<Vec<Batch>>, Stop> {
        let partition = self.holding.partition;
        let what = || format!("read partition {partition} row by row");
        let rows = unread::fetch_singly(connection, partition, day, self.position, bound).await;
        let mut rows = rows.map_err(|error| refused(error, &what()))?;
        let Some(damaged) = rows.iter_mut().flatten().find(|row| row.unreadable.is_some()) else {
            return Ok(rows);
        };
        let times = if self.damaged.0 == damaged.base_id { self.damaged.1 + 1 } else { 1 };
        self.damaged = (damaged.base_id, times);
        let id = damaged.base_id;
        if times < ATTEMPTS {
            let new = rows
                .iter()
                .flatten()
                .any(|row| row.unreadable.is_none() && row.last_id() > self.position);
            if !new {
                let what = format!("{}: the server can't read row {id}", what());
                return Err(Error::new(ErrorKind::Unavailable, what).into());
            }
            if let Some(rows) = &mut rows {
                split_off(rows);
            }
        }
        Ok(rows)
    }

    /// A row can't be read: it becomes dead letters, or stops the partition.
    pub(super) async fn pass_unread(&mut self, row: Batch, day: Day) -> Result<(), Stop> {
        let from = self.position.max(row.base_id - 1) + 1;
        let (why, stops) = match &row.unreadable {
            Some(Why::Ids(why)) => (why.clone(), true),
            Some(Why::Messages(why)) => {
                (why.clone(), self.shared.options.unreadable == Unreadable::Stop)
            }
            None => return Ok(()),
        };
        let (partition, last) = (self.holding.partition, row.last_id());
        let what = format!("read messages {from} to {last} of partition {partition}: {why}");
        if stops {
            return Err(Error::new(ErrorKind::Database, what).into());
        }
        let is_new = self.bury(&row, from, &what).await?;
        if is_new {
            self.tell_of_dead_letters(from, last, &what);
        }
        let rewound = self.holding.unless_rewound(|_| self.holding.skip_unread(&row, from));
        if let Some(place) = rewound {
            self.go_back(place);
            return Ok(());
        }
        (self.position, self.last) = (last, Some((day, row.identity())));
        self.holding.set_position(self.day, self.position);
        Ok(())
    }

    /// Records dead letters in the transaction that acknowledges the messages. False: that was done before.
    async fn bury(&self, row: &Batch, from: i64, what: &str) -> Result<bool, Stop> {
        let (shared, holding) = (&self.shared, &self.holding);
        let node = holding.partition.node();
        let connection = shared.connection(node).await?;
        let why = FailedAttempt::new(0, what);
        let unread = Unread { under: holding.under(), row, from, why: &why };
        let names = (&shared.topology.topic, &shared.group);
        let buried = dead::put_unread(connection, names, &unread).await;
        let said = || format!("record dead letters of partition {}", holding.partition);
        let again = |why: &str| {
            Stop::Error(Error::new(ErrorKind::Unavailable, format!("{}: {why}", said())))
        };
        match buried.map_err(|error| refused(error, &said()))? {
            Moved::Yes => Ok(true),
            Moved::Already => Ok(false),
            Moved::Locked => Err(again("a transaction has the group's position locked")),
            Moved::OtherServer => {
                holding.compare();
                self.compare_if_asked().await?;
                Err(again("another server has answered"))
            }
            Moved::LeaseLost | Moved::Reset => {
                shared.tell(node, Command::Renew);
                Err(again("the partition is another consumer's by now"))
            }
        }
    }

    fn tell_of_dead_letters(&self, first: i64, last: i64, what: &str) {
        let count = (last - first + 1).unsigned_abs();
        ::metrics::counter!(names::UNREADABLE).increment(count);
        ::metrics::counter!(names::DEAD_LETTERS).increment(count);
        let group = &self.shared.group;
        tracing::error!(
            alert = "unreadable", partition = %self.holding.partition, %group,
            "{what}: they are dead letters without payload now"
        );
        let news = format!("{what}: they are dead letters of group {group} without payload now");
        self.shared.send(Event::Error(Error::new(ErrorKind::Database, news)));
    }
}

impl Holding {
    /// The node has dead letters instead of these messages of a row, from an id on.
    fn skip_unread(&self, row: &Batch, from: i64) {
        self.read(row, from);
        for id in from..=row.last_id() {
            self.entrust(id);
            self.skip(id);
        }
    }
}
