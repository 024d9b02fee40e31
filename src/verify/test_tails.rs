//! Tails that a client noticed to be lost, and messages that moved: forgiven, and no more than that.

use crate::verify::AnomalyKind::{Lost, OffsetReused, TailLost, TailReused, WrongId};
use crate::verify::test_kit::{Story, check_events, held, id, partition, uid, value};
use crate::verify::test_model::{Liberties, Model};
use crate::verify::{CheckOptions, Event, LostTail};

/// Values 3 and 4 are gone, and 5 has taken the place of 3.
fn put_back() -> Story {
    let mut story = Story::consumed(4);
    story.tell(Event::TailNoticed { partition: partition(1) });
    story.send(5, None);
    story.acknowledge(5, id(3));
    story.log.remove(&id(4));
    story.store(5, id(3));
    story.consume(2, 1..=2);
    deliver_at(&mut story, 2, 5, 3);
    story.commit(2, 3);
    story.drained();
    story
}

/// Value `number` is delivered under the id `at`, and acknowledged.
fn deliver_at(story: &mut Story, by: u32, number: u32, at: u32) {
    let (holding, id, uid, value) = (held(by), id(at), uid(number.into()), Some(value(number)));
    story.tell(Event::Delivered { holding, id, uid, value });
    story.ack(by, at);
}

#[test]
fn a_noticed_tail_is_said_by_its_first_id_and_count() {
    let report = put_back().finds(&[(TailLost, 2), (TailReused, 1)]);
    let expected = LostTail { partition: partition(1), from: id(3), acknowledged: 2 };
    assert_eq!(report.lost_tails, [expected]);
    assert_eq!((report.violations, report.lost), (0, 0));
}

#[test]
fn what_nobody_noticed_is_no_lost_tail() {
    let mut story = put_back();
    story.events.retain(|stamped| !matches!(stamped.event, Event::TailNoticed { .. }));
    let report = story.report();
    assert_eq!((report.lost, report.tail_lost), (2, 0));
    assert!(report.lost_tails.is_empty());
}

#[test]
fn a_notice_of_one_partition_counts_for_all_of_its_node() {
    let mut story = put_back();
    for stamped in &mut story.events {
        if let Event::TailNoticed { partition: noticed } = &mut stamped.event {
            *noticed = partition(2);
        }
    }
    story.finds(&[(TailLost, 2), (TailReused, 1)]);
    for stamped in &mut story.events {
        if let Event::TailNoticed { partition } = &mut stamped.event {
            *partition = crate::PartitionId::new(2, 1).unwrap();
        }
    }
    assert_eq!(story.report().tail_lost, 0);
}

#[test]
fn a_hole_with_messages_above_it_is_lost_and_not_with_a_tail() {
    let mut story = put_back();
    story.log.remove(&id(2));
    let report = story.finds(&[(Lost, 1), (TailLost, 2), (TailReused, 1)]);
    assert_eq!((report.lost_tails[0].from, report.lost_tails[0].acknowledged), (id(3), 2));
}

#[test]
fn what_was_sent_after_the_last_notice_did_not_go_with_that_tail() {
    let mut story = put_back();
    story.send(6, None);
    story.acknowledge(6, id(4));
    story.finds(&[(Lost, 1), (TailLost, 2), (TailReused, 2)]);
    story.tell(Event::TailNoticed { partition: partition(1) });
    let report = story.finds(&[(TailLost, 3), (TailReused, 2)]);
    assert_eq!(report.lost_tails[0].acknowledged, 3);
}

/// Delivered while its commit waited for a standby; that was promoted without it.
fn moved() -> Story {
    let mut story = Story::sent(2);
    story.consume(1, 1..=2);
    story.send(3, None);
    story.send(4, None);
    deliver_at(&mut story, 1, 3, 3);
    story.acknowledge(4, id(3));
    story.store(4, id(3));
    story.acknowledge(3, id(4));
    story.store(3, id(4));
    deliver_at(&mut story, 2, 4, 3);
    deliver_at(&mut story, 2, 3, 4);
    story.commit(2, 4);
    story.drained();
    story
}

#[test]
fn a_message_that_moved_before_anybody_was_promised_its_id_is_counted_and_no_violation() {
    assert_eq!(moved().finds(&[]).moved, 1);
}

#[test]
fn a_message_that_moved_with_another_uid_or_after_its_receipt_is_a_violation() {
    let mut changed = moved();
    let (_, uid_of, _) = changed.log.get_mut(&id(4)).unwrap();
    *uid_of = uid(77);
    let report = changed.report();
    assert_eq!((report.moved, report.uid_changed, report.offset_reused), (0, 1, 1));

    let mut promised = moved();
    promised.acknowledge(3, id(3));
    let report = promised.finds(&[(OffsetReused, 1), (WrongId, 1)]);
    assert_eq!(report.moved, 0);

    // Nobody gets it where it is stored.
    let mut misplaced = moved();
    misplaced.events.retain(|stamped| match stamped.event {
        Event::Delivered { id: at, .. } | Event::Acked { id: at, .. } => at != id(4),
        _ => true,
    });
    let report = misplaced.report();
    assert!(report.violations > 0 && report.moved == 0, "{report:?}");
}

/// Good histories of a model that loses tails, which are noticed and not announced.
#[test]
fn noticed_tails_of_random_histories_are_not_accused() {
    let mut lost = 0;
    for seed in 0..if cfg!(debug_assertions) { 60 } else { 500 } {
        let liberties = Liberties { seeks: false, lost_tails: true };
        let mut events = Model::run(seed * 7_919 + 1, 400, liberties).events;
        for stamped in &mut events {
            if let Event::TailLost { partition, .. } = stamped.event {
                stamped.event = Event::TailNoticed { partition };
            }
        }
        let report = check_events(&events, &CheckOptions::default());
        assert_eq!(report.violations, 0, "seed {seed}: {:#?}", report.anomalies);
        assert_eq!(
            report.lost_tails.iter().map(|tail| tail.acknowledged).sum::<u64>(),
            report.tail_lost
        );
        lost += report.tail_lost;
    }
    assert!(lost > 100, "{lost}");
}
