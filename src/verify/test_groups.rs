//! Small histories about groups: of each anomaly one that has it, and one that only looks so.

use crate::verify::test_kit::{MILLI, Story, held, id, partition, uid, value};
use crate::verify::{AnomalyKind, Event, Holding};

#[test]
fn a_takeover_repeats_what_was_not_committed() {
    let mut story = Story::sent(6);
    story.consume(1, 1..=4);
    story.commit(1, 2);
    story.consume(2, 3..=6);
    story.commit(2, 6);
    story.drained();
    let report = story.finds(&[]);
    assert_eq!((report.redelivered, report.holdings), (2, 2));
}

#[test]
fn within_a_holding_nothing_is_jumped_over() {
    let mut story = Story::sent(6);
    story.consume(1, [1, 2, 5, 6]);
    let report = story.finds(&[(AnomalyKind::Skipped, 2)]);
    assert_eq!(report.anomalies[0].ids, [id(5), id(2)]);
    assert_eq!(report.anomalies[0].group, Some(1));
}

#[test]
fn what_others_acknowledged_may_be_jumped_over() {
    let mut story = Story::sent(6);
    for number in 1..=4 {
        story.deliver(1, number);
    }
    story.ack(1, 1);
    story.ack(1, 3);
    story.consume(2, [2, 4, 5, 6]);
    story.finds(&[]);
    // But not before they did.
    let mut story = Story::sent(3);
    story.consume(2, [1, 3]);
    story.consume(1, 1..=2);
    story.finds(&[(AnomalyKind::Skipped, 1)]);
}

#[test]
fn what_is_not_stored_is_not_skipped() {
    let mut story = Story::sent(3);
    story.send(4, None);
    story.acknowledge(4, id(9));
    story.store(4, id(9));
    story.consume(1, 1..=3);
    story.tell(Event::Delivered {
        holding: held(1),
        id: id(9),
        uid: uid(4),
        value: Some(value(4)),
    });
    story.finds(&[]);
}

#[test]
fn a_holding_begins_where_the_group_has_finished() {
    let mut story = Story::sent(6);
    story.consume(1, 1..=3);
    // The commit that allows it was never seen, but may have been.
    story.consume(2, 4..=5);
    story.finds(&[]);
    story.consume(3, 6..=6);
    story.finds(&[]);
    let mut story = Story::sent(6);
    story.consume(1, 1..=2);
    story.deliver(1, 3);
    story.consume(2, 4..=6);
    story.finds(&[(AnomalyKind::Skipped, 1)]);
    let mut story = Story::sent(3);
    story.consume(1, 3..=3);
    story.finds(&[(AnomalyKind::Skipped, 2)]);
}

#[test]
fn ids_rise_within_a_holding() {
    let mut story = Story::sent(4);
    story.consume(1, [1, 3, 2, 4]);
    let report = story.finds(&[(AnomalyKind::DeliveryOrder, 1)]);
    assert_eq!(report.out_of_order, 1);
    let mut story = Story::sent(2);
    story.consume(1, [1, 1, 2]);
    story.finds(&[(AnomalyKind::DeliveryOrder, 1)]);
    let mut story = Story::sent(2);
    story.consume(1, [1]);
    story.consume(2, [1, 2]);
    story.finds(&[]);
}

#[test]
fn what_a_group_never_got_is_unseen_once_it_is_drained() {
    let mut story = Story::sent(5);
    story.consume(1, 1..=3);
    story.finds(&[]);
    story.drained();
    let report = story.finds(&[(AnomalyKind::Unseen, 2)]);
    assert_eq!(report.anomalies[0].ids, [id(4)]);
    // What ended in doubt may have come after.
    story.send(6, None);
    story.store(6, id(6));
    story.finds(&[(AnomalyKind::Unseen, 2)]);
}

#[test]
fn a_group_that_never_read_a_partition_has_seen_nothing() {
    let mut story = Story::sent(2);
    story.drained();
    story.finds(&[(AnomalyKind::Unseen, 2)]);
}

#[test]
fn groups_are_apart() {
    let mut story = Story::consumed(3);
    let holding = Holding { group: 2, ..held(1) };
    for number in 1..=3 {
        story.tell(Event::Delivered {
            holding,
            id: id(number),
            uid: uid(number.into()),
            value: Some(value(number)),
        });
    }
    let report = story.finds(&[]);
    assert_eq!((report.delivered, report.redelivered), (6, 0));
}

#[test]
fn committed_messages_are_not_delivered_to_a_holding_in_force() {
    let mut story = Story::consumed(4);
    story.consume(2, 3..=4);
    // As far as is known, an old holding may deliver what it fetched long ago.
    story.finds(&[]);
    story.commit(2, 4);
    let report = story.finds(&[(AnomalyKind::RedeliveredAfterCommit, 2)]);
    assert_eq!(report.redelivered, 2);
    let mut story = Story::sent(4);
    story.consume(1, 1..=4);
    let asked = story.now;
    story.consume(2, 3..=4);
    // This commit overlaps with the other's: which came first?
    story.commit_asked(1, 4, asked);
    story.commit_asked(2, 4, asked);
    story.finds(&[]);
    let mut story = Story::sent(4);
    story.consume(1, 1..=4);
    let asked = story.now;
    story.commit(1, 4);
    story.consume(2, 3..=4);
    story.commit_asked(2, 4, asked);
    story.finds(&[]);
}

#[test]
fn a_cursor_stays_behind_what_was_delivered() {
    let mut story = Story::sent(5);
    for number in 1..=3 {
        story.deliver(1, number);
    }
    story.commit(1, 3);
    story.finds(&[]);
    story.commit(1, 4);
    story.finds(&[(AnomalyKind::CursorOverrun, 1)]);
}

#[test]
fn a_cursor_stays_behind_what_was_acknowledged_where_that_is_recorded() {
    let mut story = Story::sent(5);
    story.consume(1, 1..=2);
    story.deliver(1, 3);
    story.consume(1, 4..=4);
    story.commit(1, 2);
    story.finds(&[]);
    story.commit(1, 4);
    story.finds(&[(AnomalyKind::CursorOverrun, 1)]);
}

#[test]
fn a_cursor_does_not_go_back() {
    let mut story = Story::consumed(4);
    let asked = story.now - 2 * MILLI;
    // Asked for before the other was confirmed.
    story.commit_asked(1, 2, asked);
    story.finds(&[]);
    story.commit(1, 3);
    story.finds(&[(AnomalyKind::CursorRegressed, 1)]);
}

#[test]
fn a_fencing_token_is_one_members() {
    let mut story = Story::consumed(3);
    let holding = Holding { member: 9, ..held(1) };
    let partition = partition(1);
    story.tell(Event::Owned { holding, partition });
    story.tell(Event::Lost { holding, partition });
    story.finds(&[(AnomalyKind::TwoOwners, 1)]);
}

#[test]
fn a_member_may_take_a_partition_again() {
    let mut story = Story::sent(4);
    story.consume(1, 1..=2);
    let again = Holding { token: 77, ..held(1) };
    let partition = partition(1);
    story.tell(Event::Owned { holding: again, partition });
    story.consume(2, 3..=4);
    let report = story.finds(&[]);
    assert_eq!(report.holdings, 3);
}

#[test]
fn who_was_followed_commits_no_more() {
    let mut story = Story::sent(6);
    story.consume(1, 1..=2);
    story.commit(1, 2);
    let asked = story.now;
    story.consume(2, 3..=4);
    story.commit(2, 4);
    // Asked for while it was the owner, and confirmed late.
    story.commit_asked(1, 4, asked);
    story.finds(&[]);
    story.consume(1, 5..=5);
    story.commit(1, 5);
    story.finds(&[(AnomalyKind::TwoOwners, 1)]);
}

#[test]
fn commits_that_overlap_say_nothing_of_who_came_first() {
    let mut story = Story::sent(6);
    story.consume(2, 1..=2);
    story.consume(1, 1..=2);
    let asked = story.now;
    story.commit(1, 2);
    story.commit_asked(2, 2, asked);
    story.consume(1, 3..=4);
    story.commit(1, 4);
    story.finds(&[]);
    // Now it is known: the second has been followed.
    story.now += MILLI;
    story.commit(2, 4);
    story.finds(&[(AnomalyKind::TwoOwners, 1)]);
}

#[test]
fn where_acknowledgements_are_not_recorded_commits_say_what_is_finished() {
    let mut story = Story::sent(5);
    for number in 1..=3 {
        story.deliver(1, number);
    }
    story.commit(1, 3);
    story.deliver(2, 4);
    story.finds(&[]);
    story.deliver(3, 5);
    story.finds(&[(AnomalyKind::Skipped, 1)]);
}

#[test]
fn the_longest_wait_for_a_delivery_is_measured() {
    let mut story = Story::sent(1);
    story.consume(1, 1..=1);
    story.now += 9_000 * MILLI;
    story.send(2, None);
    story.acknowledge(2, id(2));
    story.store(2, id(2));
    story.now += 400 * MILLI;
    story.consume(2, 2..=2);
    let report = story.finds(&[]);
    assert_eq!(report.longest_delivery_stall_ms, 401);
    assert_eq!(report.longest_stall_ms, 401);
    story.send(3, None);
    story.acknowledge(3, id(3));
    story.store(3, id(3));
    story.now += 2_000 * MILLI;
    story.drained();
    let report = story.finds(&[(AnomalyKind::Unseen, 1)]);
    assert_eq!(report.longest_delivery_stall_ms, 2_001);
}

#[test]
fn nobody_waits_for_what_is_lost() {
    let mut story = Story::consumed(2);
    story.send(3, None);
    story.acknowledge(3, id(3));
    story.now += 500 * MILLI;
    story.consume(1, [2]);
    let report = story.finds(&[(AnomalyKind::Lost, 1), (AnomalyKind::DeliveryOrder, 1)]);
    assert!(report.longest_delivery_stall_ms < 10);
}

#[test]
fn too_many_gaps_are_given_up_and_said() {
    let mut story = Story::sent(1);
    let count = 20_100;
    for number in 2..=count {
        story.send(number, None);
        story.acknowledge(number, id(number));
        story.store(number, id(number));
    }
    for number in 1..=count {
        story.deliver(1, number);
    }
    for number in (1..=count).step_by(2) {
        story.ack(1, number);
    }
    assert_eq!(story.finds(&[]).weakened, 50);
}
