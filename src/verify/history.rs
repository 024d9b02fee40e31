//! The history: a folder with one file per recorder, append only.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, ErrorKind as IoKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

use crate::error::{Error, ErrorKind, Result};
use crate::verify::event::Event;
use crate::verify::record::{Record, WORDS, nanos};
use crate::verify::{bytes_of, failed, words_of};

/// Begins every file; the digit is the version of the format.
const MAGIC: [u8; 8] = *b"mqhist01";
const RECORD_LEN: usize = WORDS * 8;
/// Events between two writes of a recorder: 48 KiB.
const BUFFER_EVENTS: usize = 1024;

/// Everything that happened in a workload, on disk: 48 bytes an event. Memory is 48 KiB for each open
/// [`Recorder`], whatever the length.
///
/// Its folder is removed with it unless [kept](Self::keep).
#[derive(Debug)]
pub struct History {
    folder: Folder,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
enum Folder {
    Temporary(TempDir),
    Kept(PathBuf),
}

#[derive(Debug, Default)]
struct Shared {
    files: u32,
    open: usize,
    failure: Option<Error>,
}

impl History {
    /// An empty history in a new folder under this one, which must exist (for one in the system's
    /// place, [`std::env::temp_dir`]).
    pub fn new(under: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("history-")
            .tempdir_in(under)
            .map_err(failed("make the folder of a history"))?;
        Ok(Self { folder: Folder::Temporary(folder), shared: Arc::default() })
    }

    /// A history that was kept. It can be checked, and recorded on.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = 0;
        while file_path(folder, files).exists() {
            files += 1;
        }
        if files == 0 {
            let what = format!("{} holds no history", folder.display());
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        let shared = Shared { files, ..Shared::default() };
        Ok(Self { folder: Folder::Kept(folder.to_owned()), shared: Arc::new(Mutex::new(shared)) })
    }

    /// Leaves the folder where it is, for a later [`open`](Self::open), and says where.
    pub fn keep(self) -> PathBuf {
        match self.folder {
            Folder::Temporary(folder) => folder.keep(),
            Folder::Kept(folder) => folder,
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        match &self.folder {
            Folder::Temporary(folder) => folder.path(),
            Folder::Kept(folder) => folder,
        }
    }

    /// A recorder for one worker, with a file of its own.
    pub fn recorder(&self) -> Result<Recorder> {
        let mut shared = lock(&self.shared);
        let path = file_path(self.folder(), shared.files);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(failed("make a file of the history"))?;
        file.write_all(&MAGIC).map_err(failed("begin a file of the history"))?;
        shared.files += 1;
        shared.open += 1;
        Ok(Recorder {
            file: BufWriter::with_capacity(BUFFER_EVENTS * RECORD_LEN, file),
            shared: Arc::clone(&self.shared),
            last: 0,
        })
    }

    /// Calls `visit` with the number of the recorder and each of its records, one recorder after the
    /// other. Refused while a recorder is open, or when one could not write everything.
    pub(super) fn scan(&self, mut visit: impl FnMut(u32, Record) -> Result<()>) -> Result<()> {
        let files = self.complete()?;
        for number in 0..files {
            let mut reader = open_file(&file_path(self.folder(), number))?;
            while let Some(record) = next_record(&mut reader)? {
                visit(number, record)?;
            }
        }
        Ok(())
    }

    /// How many files there are, if they hold everything.
    fn complete(&self) -> Result<u32> {
        let shared = lock(&self.shared);
        if shared.open > 0 {
            let what = format!("read a history: {} recorders are still open", shared.open);
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        shared.failure.clone().map_or(Ok(shared.files), Err)
    }
}

/// Records the events of one worker. `Send`; made by [`History::recorder`].
///
/// Dropping it writes what it holds; a failure to do so is reported by the check.
#[derive(Debug)]
pub struct Recorder {
    file: BufWriter<File>,
    shared: Arc<Mutex<Shared>>,
    last: u64,
}

impl Recorder {
    /// Appends an event, in a few nanoseconds but for one write of 48 KiB every 1,024 events.
    ///
    /// `at` is the time since the history began, by one monotonic clock for all recorders. A time
    /// before that of the event before is taken as the same.
    pub fn record(&mut self, at: Duration, event: &Event) -> Result<()> {
        self.last = self.last.max(nanos(at));
        let record = Record::of(Duration::from_nanos(self.last), event);
        self.file
            .write_all(bytes_of(&record.words()).as_flattened())
            .map_err(failed("write an event of the history"))
    }

    /// Writes what it holds, through to the disk, and ends it.
    pub fn close(mut self) -> Result<()> {
        let flushed = self.file.flush();
        flushed
            .and_then(|()| self.file.get_ref().sync_data())
            .map_err(failed("write the end of a history"))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let flushed = self.file.flush();
        let mut shared = lock(&self.shared);
        shared.open -= 1;
        if let Err(cause) = flushed {
            shared.failure = Some(failed("write the end of a history")(cause));
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn file_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("recorder-{number:05}.bin"))
}

fn open_file(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(failed("open a file of the history"))?;
    let mut reader = BufReader::with_capacity(BUFFER_EVENTS * RECORD_LEN, file);
    let mut magic = [0; 8];
    let read = reader.read_exact(&mut magic);
    if read.is_ok() && magic == MAGIC {
        return Ok(reader);
    }
    let what = format!("{} is not a file of a history", path.display());
    Err(Error::new(ErrorKind::Decode, what))
}

/// The next record; none at the end, and where a process was killed in the middle of one.
fn next_record(reader: &mut impl Read) -> Result<Option<Record>> {
    let mut bytes = [[0; 8]; WORDS];
    match reader.read_exact(bytes.as_flattened_mut()) {
        Ok(()) => {}
        Err(cause) if cause.kind() == IoKind::UnexpectedEof => return Ok(None),
        Err(cause) => return Err(failed("read the history")(cause)),
    }
    match Record::from_words(words_of(&bytes)) {
        Some(record) => Ok(Some(record)),
        None => Err(Error::new(ErrorKind::Decode, "read the history: a record is damaged")),
    }
}
