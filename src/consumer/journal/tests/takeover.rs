//! What a process takes over from those before it, and until when it is kept.

use super::*;

/// Whether anything is taken over when this was acquired.
fn takes(before: &Before, acquired: &Acquired) -> bool {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1]);
    let journal = open(&folder, 2);
    !journal.holding(acquired, before).1.is_empty()
}

#[test]
fn nothing_is_taken_over_where_one_thing_is_different() {
    let (same, now) = (before(2, Uuid::max()), acquired(2));
    assert!(takes(&same, &now));
    let other = Uuid::from_u128(77);
    for different in [
        Before { owner: Some(other), ..same },
        Before { epoch: same.epoch - 1, ..same },
        Before { epoch: same.epoch + 1, ..same },
        Before { epoch: same.epoch + 1, owner: None, ..same },
        Before { reset_epoch: same.reset_epoch + 1, ..same },
    ] {
        assert!(!takes(&different, &now), "{different:?}");
    }
    assert!(!takes(&same, &Acquired { incarnation: server(1), ..now.clone() }));
    let fence = Fence { reset_epoch: 4, ..now.fence };
    assert!(!takes(&same, &Acquired { fence, ..now.clone() }));
    assert!(!takes(&same, &Acquired { partition: partition(1, 2), ..now.clone() }));
    assert!(!takes(&same, &Acquired { partition: partition(2, 1), ..now }));
}

#[test]
fn a_row_that_was_given_back_or_taken_without_a_record_was_nobody_elses() {
    let same = before(2, Uuid::max());
    assert!(takes(&Before { owner: None, member: None, ..same }, &acquired(2)));
    let owner = Some(Uuid::from_u128(77));
    let unrecorded = Before { member: Some(MEMBER), owner, epoch: 2, ..same };
    assert!(takes(&unrecorded, &acquired(3)));
    assert!(!takes(&Before { epoch: 3, ..unrecorded }, &acquired(4)));
}

#[test]
fn a_holding_that_was_seen_on_another_server_goes_on_there() {
    let folder = tempfile::tempdir().unwrap();
    {
        let journal = open(&folder, 1);
        let (writer, _) = journal.holding(&acquired(1), &before(1, MEMBER));
        ack_all(&writer, [1]);
        writer.seen_on(server(1));
        writer.seen_on(server(1));
        ack_all(&writer, [2]);
        let records = 5 * LEN as u64;
        assert_eq!(segments(&journal)[0].metadata().unwrap().len(), records);
    }
    let journal = open(&folder, 2);
    let now = Acquired { incarnation: server(1), ..acquired(2) };
    assert_eq!(ids(&journal.holding(&now, &before(2, MEMBER)).1), [1, 2]);
}

#[test]
fn an_older_holding_writes_nothing_when_a_newer_one_has_begun() {
    let folder = tempfile::tempdir().unwrap();
    {
        let journal = open(&folder, 1);
        let (older, _) = journal.holding(&acquired(1), &before(1, MEMBER));
        ack_all(&older, [1]);
        let (newer, _) = journal.holding(&acquired(5), &before(5, MEMBER));
        ack_all(&older, [2]);
        drop(older);
        let _ = journal.node(partition(1, 1).node()).mark(0);
        ack_all(&newer, [3]);
    }
    assert_eq!(next(&folder, 6), [3]);
}

#[test]
fn killed_again_before_anything_was_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1, 2]);
    drop(open(&folder, 2));
    open(&folder, 3).begin(partition(1, 1).node());
    let journal = open(&folder, 4);
    assert_eq!(journal.former(), [MEMBER, Uuid::from_u128(3)]);
    drop(journal);
    assert_eq!(next(&folder, 2), [1, 2]);
}

#[test]
fn killed_again_before_what_was_taken_over_is_settled() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1, 2]);
    let node = partition(1, 1).node();
    for member in 2..5 {
        let epoch = i64::try_from(member).unwrap();
        let journal = open(&folder, member);
        let (writer, acks) = journal.holding(&acquired(epoch), &before(epoch, MEMBER));
        assert_eq!(ids(&acks).len(), 1 + usize::try_from(member - 1).unwrap());
        journal.retire_old(node);
        ack_all(&writer, [epoch + 1]);
        let mark = journal.node(node).mark(0);
        // Whatever is deleted of its own, it says again what it follows.
        if member == 3 {
            journal.committed(node, mark);
            ack_all(&writer, [epoch + 1]);
        }
        drop(writer);
        journal.finish(node);
    }
    assert_eq!(next(&folder, 5), [1, 2, 3, 4, 5]);
}

#[test]
fn a_partition_that_is_taken_twice_by_one_process_takes_it_over_twice() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1]);
    let node = partition(1, 1).node();
    {
        let journal = open(&folder, 2);
        journal.retire_old(partition(2, 1).node());
        drop(journal.holding(&acquired(2), &before(2, MEMBER)));
        let (_writer, acks) = journal.holding(&acquired(3), &before(3, MEMBER));
        assert_eq!(ids(&acks), [1]);
        let mark = journal.node(node).mark(0);
        journal.committed(node, mark);
        assert_eq!(segments(&journal).len(), 2);
    }
    assert_eq!(next(&folder, 4), [1]);
}

#[test]
fn a_holding_that_ends_passes_on_what_it_took_over() {
    let folder = tempfile::tempdir().unwrap();
    killed(&folder, [1]);
    {
        let journal = open(&folder, 2);
        let node = partition(1, 1).node();
        drop(journal.holding(&acquired(2), &before(2, MEMBER)));
        let mark = journal.node(node).mark(0);
        journal.committed(node, mark);
    }
    let journal = open(&folder, 3);
    let released = Before { member: None, owner: None, ..before(3, MEMBER) };
    assert_eq!(ids(&journal.holding(&acquired(3), &released).1), [1]);
}

#[test]
fn old_segments_go_when_they_are_retired_and_settled() {
    for settled_first in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let old = killed(&folder, [1]);
        let journal = open(&folder, 2);
        let (writer, acks) = journal.holding(&acquired(2), &before(2, MEMBER));
        assert_eq!(ids(&acks), [1]);
        let retire = || journal.retire_old(partition(1, 1).node());
        let (first, second): (&dyn Fn(), &dyn Fn()) = if settled_first {
            (&|| writer.settled(), &retire)
        } else {
            (&retire, &|| writer.settled())
        };
        first();
        assert!(old.exists());
        second();
        assert!(!old.exists());
        ack_all(&writer, [2]);
        drop(journal);
        assert_eq!(next(&folder, 3), [2]);
    }
}

#[test]
fn old_segments_of_which_nothing_is_taken_over_go_when_they_are_retired() {
    let folder = tempfile::tempdir().unwrap();
    let old = killed(&folder, [1]);
    let journal = open(&folder, 2);
    journal.retire_old(partition(1, 1).node());
    assert!(!old.exists());
    let (_writer, acks) = journal.holding(&acquired(2), &before(2, MEMBER));
    assert!(acks.is_empty());
}
