//! Good histories that are damaged in one way each: the check names what was done, and little else.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::id::{MessageId, PartitionId};
use crate::verify::AnomalyKind::{
    Corrupt, CursorOverrun, CursorRegressed, DeliveryOrder, Duplicated, Lost, OffsetReused,
    Phantom, ReadOrder, RedeliveredAfterCommit, SendOrder, Skipped, TwoOwners, UidChanged, Unseen,
    Vanished, WrongId,
};
use crate::verify::test_kit::{Stamped, check_events, id_in, kinds, uid};
use crate::verify::test_victim::{Commit, Victim, same_place};
use crate::verify::{AnomalyKind, CheckOptions, Event, Holding, Value};

/// Does the damage; none where there is nothing to do it to.
type Damage = fn(&mut Victim) -> Option<()>;

/// What is done, what must be found (one of these), and what may be found as well.
const DAMAGES: [(&str, Damage, &[AnomalyKind], &[AnomalyKind]); 20] = [
    ("lose", lose, &[Lost], &[]),
    ("refuse", refuse, &[Phantom], &[]),
    ("forget the sending", forget, &[Phantom], &[]),
    ("store twice", store_twice, &[Duplicated], &[]),
    ("reuse an id", reuse, &[OffsetReused], &[WrongId]),
    ("deliver another", deliver_another, &[OffsetReused], &[WrongId, UidChanged]),
    ("skip", skip, &[Skipped, CursorOverrun], &[]),
    ("swap deliveries", swap_deliveries, &[DeliveryOrder], &[]),
    ("overrun", overrun, &[CursorOverrun], &[]),
    ("regress", regress, &[CursorRegressed], &[TwoOwners, RedeliveredAfterCommit]),
    ("share a token", share_token, &[TwoOwners], &[]),
    ("commit when followed", commit_stale, &[TwoOwners], &[RedeliveredAfterCommit]),
    ("deliver the committed", deliver_committed, &[RedeliveredAfterCommit], &[]),
    ("damage", damage, &[Corrupt], &[]),
    ("withhold", withhold, &[Unseen], &[]),
    ("vanish", vanish, &[Vanished], &[]),
    ("store out of order", store_swapped, &[SendOrder], &[]),
    ("change a uid", change_uid, &[UidChanged], &[]),
    ("misdirect a receipt", misdirect, &[WrongId], &[]),
    ("swap reads", swap_reads, &[ReadOrder], &[]),
];

fn beyond(partition: PartitionId) -> MessageId {
    id_in(partition.table(), 5_000)
}

fn lose(victim: &mut Victim) -> Option<()> {
    let (.., at) = victim.any_receipt()?;
    victim.events.remove(at);
    Some(())
}

fn refuse(victim: &mut Victim) -> Option<()> {
    let (at, _, value, _) = victim.any_receipt()?;
    victim.events[at].event = Event::Refused { value };
    Some(())
}

fn forget(victim: &mut Victim) -> Option<()> {
    let (.., gone, _) = victim.any_receipt()?;
    victim.remove(|event| match event {
        Event::Sending { value, .. } | Event::Acknowledged { value, .. } => value == gone,
        _ => false,
    });
    Some(())
}

fn store_twice(victim: &mut Victim) -> Option<()> {
    let (at, id, _) = victim.choose(&victim.stored())?;
    if let Event::Stored { uid, value, .. } = victim.events[at].event {
        victim.append(Event::Stored {
            id: beyond(id.partition()),
            uid,
            value,
            marked_duplicate: false,
        });
    }
    Some(())
}

fn reuse(victim: &mut Victim) -> Option<()> {
    let (at, id, value, _) = victim.any_receipt()?;
    let stored = victim.stored().into_iter().map(|(_, id, _)| id);
    let others: Vec<_> = stored.filter(|other| *other != id).collect();
    let id = victim.choose(&others)?;
    victim.events[at].event = Event::Acknowledged { value, id };
    Some(())
}

fn deliver_another(victim: &mut Victim) -> Option<()> {
    let chosen = victim.choose(&victim.deliveries())?.0;
    let stored = victim.stored();
    if let Event::Delivered { id, value, .. } = &mut victim.events[chosen].event {
        let other = stored.iter().find(|(_, other, _)| other != id)?;
        *value = Some(other.2);
    }
    Some(())
}

fn skip(victim: &mut Victim) -> Option<()> {
    let deliveries = victim.deliveries();
    let has_later = |chosen: &&(usize, Holding, MessageId)| {
        deliveries.iter().any(|later| later.1 == chosen.1 && later.0 > chosen.0)
    };
    let skippable: Vec<_> = deliveries.iter().filter(has_later).copied().collect();
    let (_, Holding { group, .. }, gone) = victim.choose(&skippable)?;
    victim.remove(|event| match event {
        Event::Delivered { holding, id, .. } | Event::Acked { holding, id } => {
            holding.group == group && id == gone
        }
        _ => false,
    });
    Some(())
}

fn swap_deliveries(victim: &mut Victim) -> Option<()> {
    let deliveries = victim.deliveries();
    let follow: Vec<_> = deliveries
        .iter()
        .filter_map(|first| {
            let next = deliveries.iter().find(|next| next.0 > first.0 && next.1 == first.1)?;
            Some((first.0, next.0))
        })
        .collect();
    let (first, second) = victim.choose(&follow)?;
    swap_times(&mut victim.events, first, second);
    Some(())
}

fn swap_times(events: &mut [Stamped], first: usize, second: usize) {
    let (early, late) = (events[first].at, events[second].at);
    events[first].at = late;
    events[second].at = early;
}

fn overrun(victim: &mut Victim) -> Option<()> {
    let commits = victim.commits();
    let chosen = victim.choose(&commits)?;
    let same = commits.iter().filter(|commit| same_place(commit, &chosen));
    let last = same.max_by_key(|commit| commit.at)?;
    if let Event::CursorCommitted { upto, .. } = &mut victim.events[last.index].event {
        *upto = beyond(upto.partition());
    }
    Some(())
}

fn regress(victim: &mut Victim) -> Option<()> {
    let last = victim.last_commit()?;
    let sequence = last.upto.sequence().checked_sub(1).filter(|s| *s > 0)?;
    victim.append_commit(last.holding, id_in(last.upto.partition().table(), sequence));
    Some(())
}

fn share_token(victim: &mut Victim) -> Option<()> {
    let deliveries = victim.deliveries();
    let again = |chosen: &&(usize, Holding, MessageId)| {
        let same = deliveries.iter().filter(|other| other.1 == chosen.1);
        same.count() > 1
    };
    let shared: Vec<_> = deliveries.iter().filter(again).copied().collect();
    let (at, ..) = victim.choose(&shared)?;
    if let Event::Delivered { holding, .. } = &mut victim.events[at].event {
        holding.member = 77;
    }
    Some(())
}

fn commit_stale(victim: &mut Victim) -> Option<()> {
    let commits = victim.commits();
    let follows = |after: &Commit, before: &Commit| {
        same_place(after, before)
            && after.holding.token > before.holding.token
            && after.asked > before.at
    };
    let followed: Vec<_> = commits
        .iter()
        .filter(|before| commits.iter().any(|after| follows(after, before)))
        .copied()
        .collect();
    let stale = victim.choose(&followed)?;
    let same = commits.iter().filter(|commit| same_place(commit, &stale));
    let upto = same.map(|commit| commit.upto).max()?;
    victim.append_commit(stale.holding, upto);
    Some(())
}

fn deliver_committed(victim: &mut Victim) -> Option<()> {
    let last = victim.last_commit()?;
    let holding = Holding { token: 9_999, ..last.holding };
    let first = id_in(last.upto.partition().table(), 1);
    let stored = victim.find(|_, event| match event {
        Event::Stored { id, uid, value, .. } => (id == first).then_some((uid, value)),
        _ => None,
    });
    let (uid, value) = stored.first().copied()?;
    victim.append(Event::Delivered { holding, id: first, uid, value });
    victim.append(Event::Acked { holding, id: first });
    victim.append_commit(holding, last.upto);
    Some(())
}

fn damage(victim: &mut Victim) -> Option<()> {
    let (at, ..) = victim.choose(&victim.deliveries())?;
    if let Event::Delivered { value, .. } = &mut victim.events[at].event {
        *value = None;
    }
    Some(())
}

fn withhold(victim: &mut Victim) -> Option<()> {
    let (_, id, _) = victim.choose(&victim.stored())?;
    let (id, value) = (beyond(id.partition()), Value::new(8, 1).unwrap());
    victim.append(Event::Sending { value, lane: None });
    victim.append(Event::Acknowledged { value, id });
    victim.append(Event::Stored {
        id,
        uid: uid(77_777),
        value: Some(value),
        marked_duplicate: false,
    });
    Some(())
}

fn vanish(victim: &mut Victim) -> Option<()> {
    let delivered: BTreeSet<_> = victim.deliveries().iter().map(|(.., id)| *id).collect();
    let mut candidates = victim.stored();
    candidates.retain(|(_, id, value)| victim.receipt(*value).is_none() && delivered.contains(id));
    let (at, ..) = victim.choose(&candidates)?;
    victim.events.remove(at);
    Some(())
}

/// Two values of a lane change places, everywhere.
fn store_swapped(victim: &mut Victim) -> Option<()> {
    let lanes = victim.find(|_, event| match event {
        Event::Sending { value, lane } => Some((value, lane?)),
        _ => None,
    });
    let lane_of = |value| {
        let sending = lanes.iter().find(|(of, _)| *of == value);
        sending.map(|(_, lane)| (value.writer(), *lane))
    };
    let stored = victim.stored();
    let mut pairs = Vec::new();
    for (_, id, value) in &stored {
        let partner = stored.iter().find(|(_, other, of)| {
            other.partition() == id.partition() && other > id && lane_of(*of) == lane_of(*value)
        });
        if let Some(partner) = partner.filter(|_| lane_of(*value).is_some()) {
            pairs.push(((*id, *value), (partner.1, partner.2)));
        }
    }
    let ((id, value), (other_id, other_value)) = victim.choose(&pairs)?;
    let swapped = |at: MessageId, held: Value| {
        if at == id {
            other_value
        } else if at == other_id {
            value
        } else {
            held
        }
    };
    for stamped in &mut victim.events {
        match &mut stamped.event {
            Event::Acknowledged { value, id } => *value = swapped(*id, *value),
            Event::Delivered { value, id, .. } | Event::Stored { value, id, .. } => {
                *value = value.map(|held| swapped(*id, held));
            }
            _ => {}
        }
    }
    Some(())
}

fn change_uid(victim: &mut Victim) -> Option<()> {
    let (at, ..) = victim.choose(&victim.deliveries())?;
    if let Event::Delivered { uid, .. } = &mut victim.events[at].event {
        uid.index += 1;
    }
    Some(())
}

fn misdirect(victim: &mut Victim) -> Option<()> {
    let (at, id, value, _) = victim.any_receipt()?;
    let id = beyond(id.partition());
    victim.events[at].event = Event::Acknowledged { value, id };
    Some(())
}

fn swap_reads(victim: &mut Victim) -> Option<()> {
    let stored = victim.stored();
    let next: Vec<_> = stored
        .windows(2)
        .filter(|pair| pair[0].1.partition() == pair[1].1.partition())
        .map(|pair| (pair[0].0, pair[1].0))
        .collect();
    let (first, second) = victim.choose(&next)?;
    swap_times(&mut victim.events, first, second);
    Some(())
}

/// Does one kind of damage; whether there was anything to do it to.
fn is_named(damage: usize, mut victim: Victim) -> Result<bool, TestCaseError> {
    let (name, act, named, tolerated) = DAMAGES[damage];
    if act(&mut victim).is_none() {
        return Ok(false);
    }
    let report = check_events(&victim.events, &CheckOptions::default());
    let found: BTreeSet<_> = kinds(&report).into_keys().collect();
    let is_named = found.iter().any(|kind| named.contains(kind));
    prop_assert!(is_named, "{}: found {:?}", name, found);
    let is_known = |kind: &AnomalyKind| named.contains(kind) || tolerated.contains(kind);
    let strange = !found.iter().all(is_known);
    prop_assert!(!strange, "{}: {:#?}", name, report.anomalies);
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 100 } else { 1_000 }))]

    #[test]
    fn each_damage_is_named(
        damage in 0..DAMAGES.len(), seed: u64, steps in 0_usize..400, pick: usize,
    ) {
        is_named(damage, Victim::new(seed, steps, pick))?;
    }
}

#[test]
fn each_damage_can_be_done() {
    for (index, (name, ..)) in DAMAGES.iter().enumerate() {
        let try_one = |seed: u64| {
            is_named(index, Victim::new(seed, 300, usize::try_from(seed).unwrap())).unwrap()
        };
        let done = (0..6).filter(|seed| try_one(*seed)).count();
        assert!(done >= 4, "{name}: {done} of 6");
    }
}
