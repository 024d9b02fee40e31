//! Sorting more than fits in memory: rows of `N` words, smallest first, compared word by word.
//!
//! Rows fill a buffer; a full buffer is sorted and appended to a file as one run; the runs are merged,
//! in several rounds where there are more than can be read at once.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::rc::Rc;

use crate::error::Result;
use crate::verify::run::{Run, RunReader};
use crate::verify::{bytes_of, failed};

/// The least that is read of a run at once.
const LEAST_READ: usize = 16 << 10;
/// The most runs that are merged at once.
const MOST_RUNS: usize = 256;
/// What is written of a run at once, at most.
const MOST_WRITE: usize = 64 << 10;

/// How much memory sorters may use, where they spill to, and what they did.
#[derive(Debug)]
pub(super) struct Workspace<'a> {
    folder: &'a Path,
    memory: usize,
    gauge: Gauge,
}

/// What the sorters of a workspace hold and did, in bytes.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    held: Cell<usize>,
    pub(super) peak: Cell<usize>,
    pub(super) spilled: Cell<u64>,
    pub(super) runs: Cell<u64>,
}

impl<'a> Workspace<'a> {
    pub(super) fn new(folder: &'a Path, memory: usize) -> Rc<Self> {
        Rc::new(Self { folder, memory, gauge: Gauge::default() })
    }

    pub(super) fn gauge(&self) -> &Gauge {
        &self.gauge
    }

    /// What merging may use: a quarter.
    fn merge_memory(&self) -> usize {
        self.memory / 4
    }

    fn fan_in(&self) -> usize {
        (self.merge_memory() / LEAST_READ).clamp(2, MOST_RUNS)
    }

    fn file(&self) -> Result<File> {
        tempfile::tempfile_in(self.folder).map_err(failed("make a file to sort in"))
    }
}

/// Counts memory as held for as long as it lives.
#[derive(Debug)]
pub(super) struct Held<'a> {
    space: Rc<Workspace<'a>>,
    bytes: usize,
}

impl<'a> Held<'a> {
    pub(super) fn new(space: &Rc<Workspace<'a>>, bytes: usize) -> Self {
        let gauge = &space.gauge;
        gauge.held.set(gauge.held.get() + bytes);
        gauge.peak.set(gauge.peak.get().max(gauge.held.get()));
        let space = Rc::clone(space);
        Self { space, bytes }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let held = &self.space.gauge.held;
        held.set(held.get() - self.bytes);
    }
}

/// Takes rows in any order.
#[derive(Debug)]
pub(super) struct Sorter<'a, const N: usize> {
    space: Rc<Workspace<'a>>,
    rows: Vec<[u64; N]>,
    room: usize,
    held: Held<'a>,
    spill: Option<Spill>,
}

impl<'a, const N: usize> Sorter<'a, N> {
    /// A sorter whose buffer is this part (a half, a quarter) of the workspace's memory.
    pub(super) fn new(space: &Rc<Workspace<'a>>, part: usize) -> Self {
        let room = (space.memory / part / (N * 8)).max(1);
        Self {
            space: Rc::clone(space),
            rows: Vec::new(),
            room,
            held: Held::new(space, room * N * 8),
            spill: None,
        }
    }

    pub(super) fn push(&mut self, row: [u64; N]) -> Result<()> {
        if self.rows.len() == self.room {
            self.spill()?;
        }
        if self.rows.capacity() == self.rows.len() {
            // Doubled, as a vector would, but never beyond the room.
            let more = self.rows.len().max(1024).min(self.room - self.rows.len());
            self.rows.reserve_exact(more);
        }
        self.rows.push(row);
        Ok(())
    }

    /// All rows, in order.
    pub(super) fn sorted(mut self) -> Result<Sorted<'a, N>> {
        if self.spill.is_none() {
            self.rows.sort_unstable();
            let rows = std::mem::take(&mut self.rows).into_iter();
            return Ok(Sorted::Memory(rows, self.held));
        }
        self.spill()?;
        let Self { space, rows, held, spill, .. } = self;
        drop((rows, held));
        let Some(mut spill) = spill else {
            return Ok(Sorted::empty(&space));
        };
        while spill.runs.len() > space.fan_in() {
            spill = merge_round::<N>(&space, &spill)?;
        }
        Merge::new(&space, &spill.runs, spill.file).map(Sorted::Merge)
    }

    fn spill(&mut self) -> Result<()> {
        self.rows.sort_unstable();
        let spill = match &mut self.spill {
            Some(spill) => spill,
            none => none.insert(Spill::new(&self.space)?),
        };
        spill.append(&self.space, self.rows.drain(..).map(Ok))
    }
}

/// A file of runs.
#[derive(Debug)]
struct Spill {
    file: File,
    runs: Vec<Run>,
    len: u64,
}

impl Spill {
    fn new(space: &Workspace<'_>) -> Result<Self> {
        Ok(Self { file: space.file()?, runs: Vec::new(), len: 0 })
    }

    /// Appends rows that are in order, as one run.
    fn append<const N: usize>(
        &mut self,
        space: &Rc<Workspace<'_>>,
        rows: impl Iterator<Item = Result<[u64; N]>>,
    ) -> Result<()> {
        let room = (space.memory / 16).min(MOST_WRITE);
        let _held = Held::new(space, room);
        let mut writer = BufWriter::with_capacity(room, &self.file);
        let start = self.len;
        for row in rows {
            let written = writer.write_all(bytes_of(&row?).as_flattened());
            written.map_err(failed("spill rows to be sorted"))?;
            self.len += N as u64 * 8;
        }
        let flushed = writer.flush();
        flushed.map_err(failed("spill rows to be sorted"))?;
        let end = self.len;
        self.runs.push(Run { start, end });
        let gauge = &space.gauge;
        gauge.runs.set(gauge.runs.get() + 1);
        gauge.spilled.set(gauge.spilled.get() + end - start);
        Ok(())
    }
}

/// Merges as many runs at a time as can be read at once, into a new file.
fn merge_round<const N: usize>(space: &Rc<Workspace<'_>>, old: &Spill) -> Result<Spill> {
    let mut new = Spill::new(space)?;
    for runs in old.runs.chunks(space.fan_in()) {
        let again = failed("read rows to be sorted");
        let file = old.file.try_clone().map_err(again)?;
        new.append(space, Merge::<N>::new(space, runs, file)?)?;
    }
    Ok(new)
}

/// Rows in order.
#[derive(Debug)]
pub(super) enum Sorted<'a, const N: usize> {
    Memory(
        std::vec::IntoIter<[u64; N]>,
        #[expect(dead_code, reason = "gives its memory back when it is dropped")] Held<'a>,
    ),
    Merge(Merge<'a, N>),
}

impl<'a, const N: usize> Sorted<'a, N> {
    fn empty(space: &Rc<Workspace<'a>>) -> Self {
        Self::Memory(Vec::new().into_iter(), Held::new(space, 0))
    }
}

impl<const N: usize> Iterator for Sorted<'_, N> {
    type Item = Result<[u64; N]>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Memory(rows, _) => rows.next().map(Ok),
            Self::Merge(merge) => merge.next(),
        }
    }
}

/// Reads runs of one file side by side.
#[derive(Debug)]
pub(super) struct Merge<'a, const N: usize> {
    file: File,
    readers: Vec<RunReader<N>>,
    /// The next row of each run that has one.
    heads: BinaryHeap<Reverse<([u64; N], usize)>>,
    _held: Held<'a>,
}

impl<'a, const N: usize> Merge<'a, N> {
    fn new(space: &Rc<Workspace<'a>>, runs: &[Run], file: File) -> Result<Self> {
        let each = space.merge_memory() / runs.len().max(1);
        let room = (each / (N * 8)).max(1);
        let mut merge = Self {
            file,
            readers: runs.iter().map(|run| RunReader::new(*run, room)).collect(),
            heads: BinaryHeap::with_capacity(runs.len()),
            _held: Held::new(space, room * N * 8 * runs.len()),
        };
        for (index, reader) in merge.readers.iter_mut().enumerate() {
            if let Some(row) = reader.next(&mut merge.file)? {
                merge.heads.push(Reverse((row, index)));
            }
        }
        Ok(merge)
    }
}

impl<const N: usize> Iterator for Merge<'_, N> {
    type Item = Result<[u64; N]>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut head = self.heads.peek_mut()?;
        let Reverse((row, index)) = *head;
        match self.readers[index].next(&mut self.file) {
            Ok(Some(next)) => head.0.0 = next,
            Ok(None) => {
                PeekMut::pop(head);
            }
            Err(error) => return Some(Err(error)),
        }
        Some(Ok(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sort(rows: &[[u64; 2]], memory: usize) -> (Vec<[u64; 2]>, u64, usize) {
        let folder = tempfile::tempdir().unwrap();
        let space = Workspace::new(folder.path(), memory);
        let mut sorter = Sorter::new(&space, 2);
        for row in rows {
            sorter.push(*row).unwrap();
        }
        let rows = sorter.sorted().unwrap().map(Result::unwrap).collect();
        assert_eq!(space.gauge().held.get(), 0, "memory is still counted");
        (rows, space.gauge().runs.get(), space.gauge().peak.get())
    }

    proptest! {
        #[test]
        fn rows_come_out_in_order_whatever_the_memory(
            rows in prop::collection::vec(prop::array::uniform2(0_u64..50), 0..400),
            memory in 32_usize..4096,
        ) {
            let mut expected = rows.clone();
            expected.sort_unstable();
            let (sorted, ..) = sort(&rows, memory);
            prop_assert_eq!(sorted, expected);
        }
    }

    #[test]
    fn many_runs_are_merged_in_rounds_within_the_memory() {
        let rows: Vec<_> = (0..200_000_u64).rev().map(|row| [row % 977, row]).collect();
        let mut expected = rows.clone();
        expected.sort_unstable();
        let (sorted, runs, peak) = sort(&rows, 64 << 10);
        assert_eq!(sorted, expected);
        assert!(runs > 100, "{runs} runs");
        assert!(peak <= 64 << 10, "{peak} bytes");
    }
}
