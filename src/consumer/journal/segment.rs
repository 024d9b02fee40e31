//! Segments: the files of a journal, `n01-000001.acks` and on, by node.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, ErrorKind as IoKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::consumer::journal::record::{LEN, Record};
use crate::id::NodeId;

/// Records that are read at a time: 48 KiB.
const BUFFER_RECORDS: usize = 1024;

pub(super) fn path(folder: &Path, node: NodeId, number: u32) -> PathBuf {
    folder.join(format!("n{node}-{number:06}.acks"))
}

/// The segments of a folder, in the order in which those of a node were written. Other files are
/// nobody's business here.
pub(super) fn list(folder: &Path) -> io::Result<Vec<(NodeId, u32)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(parse));
    }
    found.sort_unstable();
    Ok(found)
}

fn parse(name: &str) -> Option<(NodeId, u32)> {
    let (node, number) = name.strip_prefix('n')?.strip_suffix(".acks")?.split_once('-')?;
    Some((node.parse().ok()?, number.parse().ok()?))
}

/// Makes a segment. What is acknowledged is nobody else's business.
pub(super) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

/// Calls `visit` with the records up to the end, or to one that is torn or damaged: what follows that
/// can't be told from chance. True where the end was reached.
pub(super) fn scan(path: &Path, mut visit: impl FnMut(Record)) -> io::Result<bool> {
    let mut reader = BufReader::with_capacity(BUFFER_RECORDS * LEN, File::open(path)?);
    loop {
        if io::BufRead::fill_buf(&mut reader)?.is_empty() {
            return Ok(true);
        }
        let mut bytes = [0; LEN];
        match reader.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == IoKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
        let Some(record) = Record::decode(bytes) else {
            return Ok(false);
        };
        visit(record);
    }
}

/// Deletes a segment; says whether it is gone. One that stays is harmless: what it says was committed.
pub(super) fn delete(path: &Path) -> bool {
    match fs::remove_file(path) {
        Err(error) if error.kind() != IoKind::NotFound => {
            let path = path.display();
            tracing::warn!(%path, %error, "a segment of the journal can't be deleted");
            false
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_listed_by_number_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let node = NodeId::new(7).unwrap();
        for number in [1_000_000, 2, 999_999] {
            create(&path(folder.path(), node, number)).unwrap();
        }
        for other in ["lock", "n00-000001.acks", "n01-x.acks", "n01-000001.acks.old"] {
            File::create(folder.path().join(other)).unwrap();
        }
        let numbers = [2, 999_999, 1_000_000].map(|number| (node, number));
        assert_eq!(list(folder.path()).unwrap(), numbers);
    }

    #[test]
    fn a_segment_that_is_there_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path(), NodeId::new(1).unwrap(), 1);
        create(&path).unwrap();
        assert!(create(&path).is_err());
        assert!(delete(&path) && delete(&path));
    }
}
