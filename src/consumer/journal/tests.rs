use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;

use super::record::LEN;
use super::*;
use crate::error::ErrorKind;
use crate::id::PartitionId;

mod model;
mod takeover;

const MEMBER: Uuid = Uuid::from_u128(1);

fn names() -> (TopicName, GroupName) {
    (TopicName::new("orders").unwrap(), GroupName::new("billing").unwrap())
}

fn try_open(folder: &TempDir, member: u128) -> Result<Journal> {
    let (topic, group) = names();
    Journal::open(folder.path(), Uuid::nil(), (&topic, &group), Uuid::from_u128(member))
}

fn open(folder: &TempDir, member: u128) -> Journal {
    try_open(folder, member).unwrap()
}

fn server(number: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001 + number)
}

fn partition(node: u8, table: u8) -> PartitionId {
    PartitionId::new(node, table).unwrap()
}

fn uid(id: i64) -> Uid {
    Uid { producer: Uuid::from_u128(id.unsigned_abs().into()), sequence: id, index: 7 }
}

/// The acquisition of the table 1 on node 1 at this epoch, the first position of all committed.
fn acquired(epoch: i64) -> Acquired {
    Acquired {
        partition: partition(1, 1),
        fence: Fence { owner: Uuid::from_u128(epoch.unsigned_abs().into()), epoch, reset_epoch: 3 },
        incarnation: server(0),
        acked_id: 0,
        acked_ahead: Vec::new(),
        owner_before: None,
        member_before: None,
    }
}

/// What the row says before that, where the one before has it still.
fn before(epoch: i64, member: Uuid) -> Before {
    let fence = acquired(epoch - 1).fence;
    let Fence { owner, epoch, reset_epoch } = fence;
    Before { member: Some(member), owner: Some(owner), epoch, reset_epoch }
}

fn ids(acks: &Acks) -> Vec<i64> {
    assert!(acks.iter().all(|(id, of)| *of == uid(*id)));
    acks.keys().copied().collect()
}

/// The next process takes the partition over at this epoch.
fn next(folder: &TempDir, epoch: i64) -> Vec<i64> {
    let journal = open(folder, 99);
    ids(&journal.holding(&acquired(epoch), &before(epoch, MEMBER)).1)
}

fn ack_all(writer: &HoldingJournal, ids: impl IntoIterator<Item = i64>) {
    ids.into_iter().for_each(|id| writer.ack(id, uid(id)));
}

fn segments(journal: &Journal) -> Vec<PathBuf> {
    let folder = &journal.common.folder.path;
    let listed = segment::list(folder).unwrap();
    listed.into_iter().map(|(node, number)| segment::path(folder, node, number)).collect()
}

/// One process that has acknowledged these at epoch 1, and was killed; its only segment.
fn killed(folder: &TempDir, ids: impl IntoIterator<Item = i64>) -> PathBuf {
    let journal = open(folder, 1);
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    ack_all(&writer, ids);
    segments(&journal).remove(0)
}

#[test]
fn what_was_acknowledged_is_there_for_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [5, 3, 3, 9]);
    let journal = open(&folder, 2);
    assert_eq!(journal.former(), [MEMBER]);
    let (_writer, acks) = journal.holding(&acquired(2), &before(2, MEMBER));
    assert_eq!(ids(&acks), [3, 5, 9]);
}

#[test]
fn what_was_committed_since_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, 1..=9);
    let journal = open(&folder, 2);
    let now = Acquired { acked_id: 2, acked_ahead: vec![(4, 5), (8, 8)], ..acquired(2) };
    assert_eq!(ids(&journal.holding(&now, &before(2, MEMBER)).1), [3, 6, 7, 9]);
}

#[test]
fn a_torn_end_is_ignored_at_whatever_byte() {
    for cut in 1..LEN as u64 {
        let folder = tempfile::tempdir().unwrap();
        let path = killed(&folder, [1, 2, 3]);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - cut).unwrap();
        assert_eq!(next(&folder, 2), [1, 2], "{cut} bytes less");
    }
}

#[test]
fn a_segment_whose_head_is_torn_says_nothing() {
    for len in 0..LEN as u64 {
        let folder = tempfile::tempdir().unwrap();
        let path = killed(&folder, [1]);
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert!(next(&folder, 2).is_empty(), "{len} bytes");
    }
}

#[test]
fn a_damaged_record_ends_its_segment_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = {
        let journal = open(&folder, 1);
        let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
        ack_all(&writer, [1, 2, 3]);
        let _ = journal.node(partition(1, 1).node()).mark(0);
        ack_all(&writer, [4]);
        segments(&journal).remove(0)
    };
    let mut bytes = fs::read(&path).unwrap();
    bytes[3 * LEN + 20] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(next(&folder, 2), [1, 4]);
}

#[test]
fn what_is_committed_is_deleted_by_segments() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder, 1);
    let node = partition(1, 1).node();
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    ack_all(&writer, [1]);
    let small = journal.mark(node);
    journal.committed(node, small);
    assert_eq!(segments(&journal).len(), 1);
    let mark = journal.node(node).mark(0);
    ack_all(&writer, [2]);
    assert_eq!(segments(&journal).len(), 2);
    journal.committed(node, mark);
    assert_eq!(segments(&journal).len(), 1);
    ack_all(&writer, [3]);
    drop(journal);
    assert_eq!(next(&folder, 2), [2, 3]);
}

#[test]
fn a_segment_is_followed_by_another_when_it_is_large() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder, 1);
    let node = partition(1, 1).node();
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    let full = i64::try_from(SEGMENT_BYTES).unwrap() / 48;
    ack_all(&writer, 1..=full - 2);
    let first = journal.mark(node);
    ack_all(&writer, [full]);
    assert_ne!(journal.mark(node), first);
    assert_eq!(segments(&journal).len(), 2);
}

#[test]
fn a_living_consumer_has_its_journal_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(&folder, 1);
    assert_eq!(try_open(&folder, 2).unwrap_err().kind(), ErrorKind::Conflict);
    let (topic, _) = names();
    let other = GroupName::new("audit").unwrap();
    Journal::open(folder.path(), Uuid::nil(), (&topic, &other), MEMBER).unwrap();
    let (writer, _) = first.holding(&acquired(1), &before(1, MEMBER));
    first.close();
    let second = open(&folder, 2);
    // A delivery that outlives its consumer.
    ack_all(&writer, [1]);
    first.begin(partition(2, 1).node());
    assert_eq!(segments(&second).len(), 1);
    let (_writer, acks) = second.holding(&acquired(2), &before(2, MEMBER));
    assert!(acks.is_empty());
}

#[test]
fn a_directory_that_is_none_is_invalid() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let (topic, group) = names();
    let error = Journal::open(&file, Uuid::nil(), (&topic, &group), MEMBER).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_node_that_is_finished_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder, 1);
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    ack_all(&writer, [1]);
    journal.finish(partition(1, 1).node());
    ack_all(&writer, [2]);
    assert!(segments(&journal).is_empty());
    assert_eq!(journal.unwritten(), 0);
    drop(journal);
    assert!(open(&folder, 2).former().is_empty());
}

#[test]
fn a_node_that_was_finished_can_be_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1]);
    let node = partition(1, 1).node();
    {
        let journal = open(&folder, 2);
        journal.begin(node);
        journal.finish(node);
        journal.begin(node);
        let (writer, acks) = journal.holding(&acquired(2), &before(2, MEMBER));
        assert_eq!(ids(&acks), [1]);
        journal.retire_old(node);
        ack_all(&writer, [1, 2]);
        writer.settled();
    }
    assert_eq!(next(&folder, 3), [1, 2]);
    let journal = open(&folder, 3);
    let written = segments(&journal);
    journal.close();
    journal.begin(node);
    assert_eq!(segments(&journal), written, "what is closed stays so");
}

#[test]
fn a_write_that_fails_stops_the_journal_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder, 1);
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    ack_all(&writer, [1]);
    let read_only = File::open(&segments(&journal)[0]).unwrap();
    journal.node(partition(1, 1).node()).lock().file = Some(read_only);
    ack_all(&writer, [2, 3]);
    assert_eq!(journal.unwritten(), 2);
    let other = Acquired { partition: partition(2, 1), ..acquired(1) };
    let (elsewhere, _) = journal.holding(&other, &before(1, MEMBER));
    ack_all(&elsewhere, [4]);
    assert_eq!((journal.unwritten(), segments(&journal).len()), (3, 1));
    drop(journal);
    assert_eq!(next(&folder, 2), [1]);
}

#[test]
fn a_directory_that_was_removed_stops_the_journal_at_the_next_segment() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder, 1);
    let node = partition(1, 1).node();
    let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
    fs::remove_dir_all(folder.path()).unwrap();
    ack_all(&writer, [1]);
    assert_eq!(journal.unwritten(), 0);
    let mark = journal.node(node).mark(0);
    ack_all(&writer, [2]);
    assert_eq!(journal.unwritten(), 1);
    journal.committed(node, mark);
    journal.retire_old(node);
    journal.finish(node);
}

#[test]
fn what_was_taken_over_stays_where_the_journal_stops() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1]);
    {
        let journal = open(&folder, 2);
        let node = partition(1, 1).node();
        let (_writer, acks) = journal.holding(&acquired(2), &before(2, MEMBER));
        assert_eq!(ids(&acks), [1]);
        // Another has its name already.
        File::create(segment::path(&journal.common.folder.path, node, 3)).unwrap();
        let mark = journal.node(node).mark(0);
        journal.committed(node, mark);
        journal.retire_old(node);
    }
    assert_eq!(next(&folder, 3), [1]);
}
