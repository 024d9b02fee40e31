//! Small histories about groups whose position is moved.

use crate::verify::test_kit::{Story, id, partition};
use crate::verify::{AnomalyKind, Event};

#[test]
fn a_group_that_begins_late_need_not_see_what_was_before() {
    let mut story = Story::sent(3);
    let (group, partition) = (1, partition(1));
    story.tell(Event::SeekStarted { group, partition, to: None });
    story.tell(Event::SeekDone { group, partition });
    story.drained();
    story.finds(&[]);
}

#[test]
fn a_seek_without_an_end_is_never_settled() {
    let mut story = Story::consumed(4);
    let (group, partition) = (1, partition(1));
    story.tell(Event::SeekStarted { group, partition, to: Some(id(2)) });
    // Before or after the seek?
    story.commit(1, 4);
    story.consume(2, 2..=4);
    story.commit(2, 3);
    story.finds(&[]);
}

#[test]
fn a_seek_back_repeats() {
    let mut story = Story::consumed(4);
    let (group, partition) = (1, partition(1));
    let asked = story.now;
    story.tell(Event::SeekStarted { group, partition, to: Some(id(2)) });
    // An older commit, confirmed late.
    story.commit_asked(1, 4, asked);
    story.tell(Event::SeekDone { group, partition });
    story.commit_asked(1, 4, asked);
    story.consume(2, 2..=3);
    story.commit(2, 3);
    let report = story.finds(&[]);
    assert_eq!(report.redelivered, 2);
    // Not without the seek.
    story.events.retain(|stamped| {
        let seek = matches!(stamped.event, Event::SeekStarted { .. } | Event::SeekDone { .. });
        !seek
    });
    let expected = [(AnomalyKind::RedeliveredAfterCommit, 2), (AnomalyKind::CursorRegressed, 1)];
    story.finds(&expected);
}

#[test]
fn a_seek_ahead_leaves_out() {
    let seeking = |to: Option<u32>, first: u32| {
        let mut story = Story::sent(6);
        let (group, partition) = (1, partition(1));
        story.consume(1, 1..=1);
        story.tell(Event::SeekStarted { group, partition, to: to.map(id) });
        story.tell(Event::SeekDone { group, partition });
        story.consume(2, first..=6);
        story.commit(2, 6);
        story.drained();
        story
    };
    seeking(Some(4), 4).finds(&[]);
    seeking(None, 5).finds(&[]);
    let expected = [(AnomalyKind::Skipped, 1), (AnomalyKind::CursorOverrun, 1)];
    seeking(Some(4), 5).finds(&expected);
}
