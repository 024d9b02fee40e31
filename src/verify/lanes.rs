//! Whether messages are stored in the order in which they were sent: by writer, lane and partition.
//!
//! Rows are `[writer, lane, value, id]`, of values with one unmarked copy. (A copy that was sent
//! elsewhere claims no order.)

use std::collections::HashMap;
use std::rc::Rc;

use crate::error::Result;
use crate::verify::event::Value;
use crate::verify::findings::{Example, Findings, shown};
use crate::verify::record::partition_of;
use crate::verify::report::AnomalyKind;
use crate::verify::sort::{Sorter, Workspace};

pub(super) struct Lanes<'a> {
    sorter: Sorter<'a, 4>,
}

impl<'a> Lanes<'a> {
    pub(super) fn new(space: &Rc<Workspace<'a>>) -> Self {
        Self { sorter: Sorter::new(space, 4) }
    }

    pub(super) fn push(&mut self, value: u64, lane: u64, id: i64) -> Result<()> {
        let writer = Value::from_number(value).writer();
        self.sorter.push([writer.into(), lane, value, id.cast_unsigned()])
    }

    pub(super) fn check(self, findings: &mut Findings) -> Result<()> {
        let mut lane = (0, 0);
        // The highest id, with its value, by partition: of one lane at a time.
        let mut highest: HashMap<u32, (i64, u64)> = HashMap::new();
        for row in self.sorter.sorted()? {
            let [writer, of, value, id] = row?;
            let id = id.cast_signed();
            if (writer, of) != lane {
                lane = (writer, of);
                highest.clear();
            }
            let top = highest.entry(partition_of(id)).or_insert((id, value));
            if id >= top.0 {
                *top = (id, value);
            } else {
                findings.add(AnomalyKind::SendOrder, 1, || example(*top, (id, value)));
            }
        }
        Ok(())
    }
}

fn example(before: (i64, u64), after: (i64, u64)) -> Example {
    let (first, second) = (shown(before.1), shown(after.1));
    Example {
        ids: vec![after.0, before.0],
        values: vec![after.1, before.1],
        text: format!(
            "{second} was sent after {first} in the same lane, and stored before it: as {}, below {}",
            after.0, before.0
        ),
        ..Example::default()
    }
}
