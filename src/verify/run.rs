//! Reading one sorted run of a file that holds many.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use crate::error::Result;
use crate::verify::{failed, words_of};

/// Where a run is in its file, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Reads a run by parts, so that many can be read side by side through one file.
#[derive(Debug)]
pub(super) struct RunReader<const N: usize> {
    rest: Run,
    room: usize,
    bytes: Vec<u8>,
    at: usize,
}

impl<const N: usize> RunReader<N> {
    /// A reader that takes up to `room` rows at a time.
    pub(super) fn new(run: Run, room: usize) -> Self {
        Self { rest: run, room, bytes: Vec::new(), at: 0 }
    }

    /// The next row; none at the end of the run.
    pub(super) fn next(&mut self, file: &mut File) -> Result<Option<[u64; N]>> {
        if self.at == self.bytes.len() {
            self.refill(file)?;
        }
        let row = self.bytes[self.at..].as_chunks().0.first_chunk();
        self.at += row.map_or(0, |_| N * 8);
        Ok(row.map(words_of))
    }

    fn refill(&mut self, file: &mut File) -> Result<()> {
        let left = usize::try_from(self.rest.end - self.rest.start).unwrap_or(usize::MAX);
        let len = left.min(self.room * N * 8);
        self.bytes.resize(len, 0);
        self.at = 0;
        file.seek(SeekFrom::Start(self.rest.start))
            .and_then(|_| file.read_exact(&mut self.bytes))
            .map_err(failed("read rows to be sorted"))?;
        self.rest.start += len as u64;
        Ok(())
    }
}
