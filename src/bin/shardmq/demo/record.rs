//! What was delivered to whom, and what is wrong with it.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shardmq::{MessageId, PartitionId};

use super::workload;

/// Who consumed: a number for each member of the group.
pub(super) type Member = usize;

/// The deliveries to all members of a group.
pub(super) struct Record {
    ids: HashSet<MessageId>,
    /// By message number: where it was first seen.
    places: Vec<Option<MessageId>>,
    distinct: u64,
    redelivered: u64,
    duplicated: u64,
    out_of_order: u64,
    last_ids: HashMap<(Member, PartitionId), MessageId>,
    last_numbers: HashMap<(Member, u32), u32>,
    by_member: HashMap<Member, u64>,
    latencies: Vec<Duration>,
}

pub(super) fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    /// For so many numbered messages.
    pub(super) fn new(messages: u32) -> Self {
        Self {
            ids: HashSet::with_capacity(messages as usize),
            places: vec![None; messages as usize],
            distinct: 0,
            redelivered: 0,
            duplicated: 0,
            out_of_order: 0,
            last_ids: HashMap::new(),
            last_numbers: HashMap::new(),
            by_member: HashMap::new(),
            latencies: Vec::new(),
        }
    }

    /// A message came to a member. One that came before, to whomever, is a redelivery, from which on
    /// things must be in order again.
    pub(super) fn deliver(&mut self, member: Member, id: MessageId, number: u32) {
        *self.by_member.entry(member).or_default() += 1;
        let is_new = self.ids.insert(id);
        if is_new {
            self.place(id, number);
        } else {
            self.redelivered += 1;
        }
        let before = self.last_ids.insert((member, id.partition()), id);
        let mut wrong = before.is_some_and(|before| before >= id);
        if let Some(key) = workload::key(number) {
            let before = self.last_numbers.insert((member, key), number);
            wrong |= before.is_some_and(|before| before >= number);
        }
        self.out_of_order += u64::from(is_new && wrong);
    }

    fn place(&mut self, id: MessageId, number: u32) {
        match self.places.get_mut(number as usize) {
            Some(place @ None) => {
                *place = Some(id);
                self.distinct += 1;
            }
            _ => self.duplicated += 1,
        }
    }

    /// Keeps how long a message took.
    pub(super) fn took(&mut self, latency: Duration) {
        self.latencies.push(latency);
    }

    pub(super) fn has(&self, number: u32) -> bool {
        self.places.get(number as usize).is_some_and(Option::is_some)
    }

    /// How many different messages came.
    pub(super) fn distinct(&self) -> u64 {
        self.distinct
    }

    pub(super) fn of_member(&self, member: Member) -> u64 {
        self.by_member.get(&member).copied().unwrap_or(0)
    }

    pub(super) fn redelivered(&self) -> u64 {
        self.redelivered
    }

    /// Messages that are stored at more than one place.
    pub(super) fn duplicated(&self) -> u64 {
        self.duplicated
    }

    /// Deliveries of something new that came too late: behind a later id of the partition, or behind a
    /// later message of the key.
    pub(super) fn out_of_order(&self) -> u64 {
        self.out_of_order
    }

    /// The latency that this share of the messages stayed below, in milliseconds.
    pub(super) fn latency_ms(&self, share: f64) -> Option<f64> {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let index = (last as f64 * share).round() as usize;
        sorted.get(index).map(|latency| latency.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardmq::Day;

    fn id(table: u8, sequence: u32) -> MessageId {
        let partition = PartitionId::new(1, table).unwrap();
        MessageId::new(partition, Day::from_yymmdd(261_122).unwrap(), sequence).unwrap()
    }

    #[test]
    fn a_takeover_redelivers_and_breaks_no_order() {
        let mut record = Record::new(10);
        for (sequence, number) in [(1, 0), (2, 1), (3, 2)] {
            record.deliver(0, id(1, sequence), number);
        }
        for (sequence, number) in [(2, 1), (3, 2), (4, 3)] {
            record.deliver(1, id(1, sequence), number);
        }
        assert_eq!((record.distinct(), record.redelivered()), (4, 2));
        assert_eq!((record.out_of_order(), record.duplicated()), (0, 0));
        assert_eq!((record.of_member(0), record.of_member(2)), (3, 0));
        assert!(record.has(3) && !record.has(4));
    }

    #[test]
    fn an_earlier_id_or_number_that_is_new_is_out_of_order() {
        let mut record = Record::new(1_000);
        record.deliver(0, id(1, 2), 0);
        record.deliver(0, id(1, 1), 1);
        assert_eq!(record.out_of_order(), 1);
        // Both of customer 200, which has a key.
        record.deliver(0, id(2, 1), 600);
        record.deliver(0, id(3, 1), 200);
        assert_eq!(record.out_of_order(), 2);
    }

    #[test]
    fn a_message_at_two_places_is_a_duplicate() {
        let mut record = Record::new(10);
        record.deliver(0, id(1, 1), 7);
        record.deliver(0, id(2, 1), 7);
        assert_eq!((record.duplicated(), record.redelivered(), record.distinct()), (1, 0, 1));
    }

    #[test]
    fn latencies_have_percentiles() {
        let mut record = Record::new(0);
        assert_eq!(record.latency_ms(0.5), None);
        (1..=101).rev().for_each(|ms| record.took(Duration::from_millis(ms)));
        assert_eq!(record.latency_ms(0.5), Some(51.0));
        assert_eq!(record.latency_ms(0.99), Some(100.0));
    }
}
