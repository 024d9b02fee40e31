//! What a reader has left behind: days that nothing may be appended to any more.

use std::time::SystemTime;

use crate::consumer::reader::{Reader, Stop};
use crate::error::{Error, ErrorKind};
use crate::id::Day;
use crate::store::connect::refused;
use crate::store::fetch;
use crate::store::node::Connection;

impl Reader {
    /// Whether this reader went on to a later day than the partition stands on. A day is entered only
    /// after it was seen, or since the position is in it, so this server lacks the roll to that day.
    pub(super) fn has_left(&self, current: Day) -> bool {
        let entered = self.last.is_some() || fetch::day_of(self.position) != self.day;
        entered && self.day.is_some_and(|day| current < day)
    }

    /// The first rows of a day were read. The log of the server that has them must end before that day
    /// where this reader has left it: a server that lost the roll, and perhaps nothing else, takes
    /// appends to the day before, and rolls again.
    pub(super) async fn expect_none_between(
        &self,
        connection: &Connection,
        day: Day,
        incarnation: SystemTime,
    ) -> Result<(), Stop> {
        let (partition, of) = (self.holding.partition, fetch::day_of(self.position));
        if of == Some(day) {
            return Ok(());
        }
        let what = || format!("look for messages before day {day} in partition {partition}");
        let Some(state) = self.state(connection, of).await? else {
            let why = format!("{}: the node does not know the partition", what());
            return Err(Error::new(ErrorKind::NotFound, why).into());
        };
        if state.incarnation != incarnation {
            let why = format!("{}: another server answered meanwhile", what());
            return Err(Error::new(ErrorKind::Unavailable, why).into());
        }
        let behind = match of {
            Some(of) => fetch::fetch(connection, partition, of, self.position, (1, 2))
                .await
                .map_err(|error| refused(error, &what()))?,
            None => None,
        };
        let some_behind = behind.iter().flatten().any(|row| row.last_id() > self.position);
        let next = state.day_after(of);
        if some_behind || next.is_none_or(|next| next < day) { Err(Stop::Lost) } else { Ok(()) }
    }
}
