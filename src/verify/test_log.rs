//! Small histories about what is stored: of each anomaly one that has it, and one that only looks so.

use crate::verify::test_kit::{MILLI, Story, held, id, id_in, partition, uid, value};
use crate::verify::{AnomalyKind, Event, Value};

#[test]
fn a_good_history_is_not_accused() {
    let mut story = Story::consumed(5);
    story.drained();
    let report = story.finds(&[]);
    assert_eq!((report.acknowledged, report.stored), (5, 5));
    assert_eq!((report.delivered, report.holdings), (5, 1));
    assert_eq!(report.work.events, 10 + 10 + 1 + 1 + 5);
}

#[test]
fn what_is_acknowledged_and_not_stored_is_lost() {
    let mut story = Story::sent(6);
    for number in [1, 2, 4, 6] {
        story.log.remove(&id(number));
    }
    let report = story.finds(&[(AnomalyKind::Lost, 4)]);
    let by_place = (report.lost_prefix, report.lost_middle, report.lost_postfix);
    assert_eq!(by_place, (2, 1, 1));
    assert_eq!((report.lost_write, report.lost_tail), (3, 1));
    let anomaly = &report.anomalies[0];
    assert_eq!(anomaly.ids, [id(1)]);
    assert_eq!(anomaly.values, [value(1)]);
    assert_eq!(anomaly.partition, Some(partition(1)));
    assert!(anomaly.text.contains("1-1 was acknowledged"));
}

#[test]
fn losses_are_placed_for_each_writer() {
    let mut story = Story::sent(2);
    let other = Value::new(2, 0).unwrap();
    story.tell(Event::Sending { value: other, lane: None });
    story.tell(Event::Acknowledged { value: other, id: id(3) });
    let report = story.finds(&[(AnomalyKind::Lost, 1)]);
    assert_eq!((report.lost_prefix, report.lost_postfix), (1, 0));
}

#[test]
fn what_ended_in_doubt_may_be_there_or_not() {
    let mut story = Story::sent(1);
    for number in 2..=4 {
        story.send(number, Some(1));
    }
    story.tell(Event::Unknown { value: value(2) });
    story.tell(Event::Unknown { value: value(3) });
    story.store(2, id(2));
    let report = story.finds(&[]);
    assert_eq!(report.unknown, 3, "one has no outcome at all");
    assert_eq!((report.unknown_found, report.unknown_missing), (1, 2));
}

#[test]
fn what_was_refused_or_never_sent_must_not_be_there() {
    let mut story = Story::sent(1);
    story.send(2, None);
    story.tell(Event::Refused { value: value(2) });
    assert_eq!(story.finds(&[]).refused, 1);
    story.store(2, id(2));
    story.finds(&[(AnomalyKind::Phantom, 1)]);
    story.store(9, id(3));
    story.finds(&[(AnomalyKind::Phantom, 2)]);
}

#[test]
fn what_was_never_sent_must_not_be_delivered() {
    let mut story = Story::consumed(1);
    story.deliver(1, 2);
    story.finds(&[(AnomalyKind::Phantom, 1)]);
}

#[test]
fn what_was_delivered_must_be_stored() {
    let mut story = Story::consumed(1);
    story.send(2, None);
    story.deliver(1, 2);
    story.tell(Event::Unknown { value: value(2) });
    story.finds(&[(AnomalyKind::Vanished, 1)]);
    story.store(2, id(2));
    story.finds(&[]);
}

#[test]
fn a_value_is_stored_once_or_marked() {
    let mut story = Story::sent(3);
    story.store(2, id(4));
    story.store(2, id_in(2, 1));
    let report = story.finds(&[(AnomalyKind::Duplicated, 2)]);
    assert_eq!(report.anomalies[0].ids, [id(2), id(4), id_in(2, 1)]);
    for id in [id(4), id_in(2, 1)] {
        story.log.get_mut(&id).unwrap().2 = true;
    }
    assert_eq!(story.finds(&[]).duplicated_marked, 2);
    story.log.remove(&id(2));
    assert_eq!(story.finds(&[]).duplicated_marked, 1);
}

#[test]
fn an_id_has_one_value() {
    let mut story = Story::consumed(3);
    story.finds(&[]);
    story.log.insert(id(2), (Some(value(4)), uid(4), false));
    story.send(4, None);
    story.finds(&[(AnomalyKind::OffsetReused, 1), (AnomalyKind::Lost, 1)]);
}

#[test]
fn receipts_name_the_id_that_the_value_has() {
    let mut story = Story::sent(2);
    story.send(3, None);
    story.acknowledge(3, id(7));
    story.store(3, id(3));
    story.finds(&[(AnomalyKind::WrongId, 1)]);
    // A copy may have been made elsewhere, and its first taken away.
    story.log.get_mut(&id(3)).unwrap().2 = true;
    story.finds(&[]);
}

#[test]
fn a_value_keeps_its_uid() {
    let mut story = Story::sent(2);
    story.tell(Event::Delivered {
        holding: held(1),
        id: id(1),
        uid: uid(99),
        value: Some(value(1)),
    });
    story.finds(&[(AnomalyKind::UidChanged, 1)]);
    // Where it was sent twice by mistake, that is what is wrong.
    story.log.insert(id(3), (Some(value(1)), uid(99), false));
    story.finds(&[(AnomalyKind::Duplicated, 1)]);
}

#[test]
fn damaged_payloads_show() {
    let mut story = Story::consumed(2);
    story.tell(Event::Delivered { holding: held(2), id: id(2), uid: uid(2), value: None });
    let begins_after_the_commit = story.finds(&[(AnomalyKind::Corrupt, 1)]);
    assert_eq!(begins_after_the_commit.redelivered, 1);
    story.log.get_mut(&id(2)).unwrap().0 = None;
    story.finds(&[(AnomalyKind::Corrupt, 2), (AnomalyKind::Lost, 1)]);
}

#[test]
fn one_lane_of_one_writer_is_stored_in_order() {
    let reversed = |first_lane, second_lane| {
        let mut story = Story::default();
        for (number, lane, at) in [(1, first_lane, id(2)), (2, second_lane, id(1))] {
            story.send(number, lane);
            story.acknowledge(number, at);
            story.store(number, at);
        }
        story
    };
    reversed(Some(1), Some(1)).finds(&[(AnomalyKind::SendOrder, 1)]);
    reversed(Some(1), Some(2)).finds(&[]);
    reversed(None, None).finds(&[]);
    let mut marked = reversed(Some(1), Some(1));
    marked.log.get_mut(&id(1)).unwrap().2 = true;
    marked.finds(&[]);
}

#[test]
fn lanes_are_compared_within_a_partition() {
    let mut story = Story::default();
    for (number, at) in [(1, id_in(2, 1)), (2, id_in(1, 1)), (3, id_in(2, 2))] {
        story.send(number, Some(5));
        story.acknowledge(number, at);
        story.store(number, at);
    }
    let report = story.finds(&[]);
    assert_eq!(report.out_of_order, 0);
}

#[test]
fn the_final_read_gets_rising_ids() {
    let mut story = Story::sent(2);
    let log = std::mem::take(&mut story.log);
    for (id, (value, uid, _)) in log.into_iter().rev() {
        story.tell(Event::Stored { id, uid, value, marked_duplicate: false });
    }
    let report = story.finds(&[(AnomalyKind::ReadOrder, 1)]);
    assert_eq!(report.out_of_order, 1);
}

#[test]
fn a_lost_tail_that_was_announced_is_forgiven_and_no_more_than_that() {
    let mut story = Story::consumed(4);
    let after = Some(id(2));
    let partition = partition(1);
    story.tell(Event::TailLost { partition, after });
    // Ids 3 and 4 are gone; 3 is used again.
    story.send(5, None);
    story.acknowledge(5, id(3));
    story.log.remove(&id(4));
    story.store(5, id(3));
    // The cursor went back with the data.
    story.consume(2, 2..=2);
    story.tell(Event::Delivered {
        holding: held(2),
        id: id(3),
        uid: uid(5),
        value: Some(value(5)),
    });
    story.ack(2, 3);
    story.commit(2, 3);
    story.drained();
    let forgiven = [(AnomalyKind::TailLost, 2), (AnomalyKind::TailReused, 1)];
    let report = story.finds(&forgiven);
    assert_eq!((report.lost, report.violations), (0, 0));

    story.log.remove(&id(2));
    let more = [(AnomalyKind::Lost, 1), forgiven[0], forgiven[1]];
    story.finds(&more);
}

#[test]
fn what_took_the_place_of_a_lost_tail_is_not_skipped() {
    let mut story = Story::consumed(4);
    let (partition, after) = (partition(1), Some(id(2)));
    story.tell(Event::TailLost { partition, after });
    for number in 5..=7 {
        story.send(number, None);
        story.acknowledge(number, id(number - 2));
        story.store(number, id(number - 2));
    }
    // It goes on behind the old tail: 3 and 4 hold other messages now.
    story.tell(Event::Delivered {
        holding: held(2),
        id: id(5),
        uid: uid(7),
        value: Some(value(7)),
    });
    story.drained();
    let expected =
        [(AnomalyKind::TailLost, 2), (AnomalyKind::TailReused, 2), (AnomalyKind::Skipped, 2)];
    story.finds(&expected);
}

#[test]
fn who_read_a_lost_tail_has_not_skipped_what_took_its_place() {
    let mut story = Story::sent(3);
    let (partition, after) = (partition(1), Some(id(2)));
    // The old log went from 3 on to 9, as it does at midnight.
    story.send(4, None);
    story.acknowledge(4, id(9));
    story.consume(1, 1..=3);
    story.tell(Event::Delivered {
        holding: held(1),
        id: id(9),
        uid: uid(4),
        value: Some(value(4)),
    });
    story.tell(Event::TailLost { partition, after });
    for number in 5..=7 {
        story.send(number, None);
        story.acknowledge(number, id(number - 2));
        story.store(number, id(number - 2));
    }
    story.finds(&[(AnomalyKind::TailLost, 2), (AnomalyKind::TailReused, 1)]);
}

#[test]
fn holes_in_a_day_are_counted() {
    let mut story = Story::sent(2);
    story.send(3, None);
    story.store(3, id(6));
    assert_eq!(story.finds(&[]).holes, 3);
}

#[test]
fn the_longest_wait_for_an_acknowledgement_is_measured() {
    let mut story = Story::sent(2);
    assert_eq!(story.finds(&[]).longest_stall_ms, 1);
    story.send(3, None);
    story.tell(Event::Refused { value: value(3) });
    story.now += 700 * MILLI;
    story.send(4, None);
    story.acknowledge(4, id(3));
    story.store(4, id(3));
    // Refused all the time is no service. Nothing to send is no stall.
    story.now += 5_000 * MILLI;
    story.send(5, None);
    story.tell(Event::Unknown { value: value(5) });
    assert_eq!(story.finds(&[]).longest_send_stall_ms, 703);
}

#[test]
fn a_send_that_is_under_way_while_others_are_acknowledged_is_waited_for() {
    let mut story = Story::default();
    story.send(1, None);
    story.send(2, None);
    story.acknowledge(1, id(1));
    story.store(1, id(1));
    story.now += 600 * MILLI;
    story.acknowledge(2, id(2));
    story.store(2, id(2));
    // Its own time, whatever was acknowledged meanwhile; until a later one was acknowledged.
    story.send(3, None);
    story.send(4, Some(1));
    story.send(5, None);
    story.acknowledge(5, id(3));
    story.store(5, id(3));
    story.now += 700 * MILLI;
    story.acknowledge(3, id(4));
    story.store(3, id(4));
    let report = story.finds(&[]);
    assert_eq!(report.longest_send_stall_ms, 701);
    assert_eq!((report.longest_keyless_send_ms, report.longest_keyless_stall_ms), (704, 602));
}
