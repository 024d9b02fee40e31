use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::id::Day;
use crate::name::TopicName;
use crate::store::append::Arrays;
use crate::store::outbox::State;

fn batch(id: i64, partition: u32) -> Frozen {
    let day = Day::from_yymmdd(260_701).unwrap();
    Frozen {
        id,
        partition: PartitionId::try_from(partition).unwrap(),
        topic: TopicName::new("orders").unwrap(),
        topic_id: Uuid::nil(),
        generation: 1,
        producer: Uuid::nil(),
        first_day: day,
        day,
        named: day,
        state: State::Frozen,
        ids: vec![id],
        arrays: Arrays { count: 1, ..Arrays::default() },
    }
}

#[test]
fn partitions_of_a_node_have_their_turn_one_after_the_other() {
    let mut lanes = Lanes::new(2);
    let partitions = [10_101, 10_102, 10_103, 10_104];
    for id in 0..3 {
        for partition in partitions {
            lanes.push(batch(id, partition));
        }
    }
    let now = Instant::now();
    let (mut sent, mut under_way) = (Vec::new(), Vec::new());
    for id in 3..23 {
        while let Some(Next::Send(frozen)) = lanes.next(now) {
            sent.push(frozen.partition.as_i32());
            under_way.push(frozen);
        }
        // Whoever was served has more at once.
        let done = under_way.remove(0);
        lanes.push(batch(id, u32::try_from(done.partition.as_i32()).unwrap()));
        lanes.done(done.partition, done.size(), true);
    }
    let expected: Vec<i32> = (10_101..10_105).cycle().take(sent.len()).collect();
    assert_eq!(sent, expected);
}

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// A batch is frozen: one that comes with the answer, or one that is left in the table.
    Freeze { inline: bool },
    /// What was read of the table arrives.
    Load,
    /// What is under way arrives.
    Arrive,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        any::<bool>().prop_map(|inline| Step::Freeze { inline }),
        Just(Step::Load),
        Just(Step::Arrive),
    ];
    prop::collection::vec(step, 0..60)
}

/// The table that a relay freezes to, with what is under way from there.
struct Table {
    lanes: Lanes,
    /// The batches that are not forgotten.
    ids: Vec<i64>,
    /// The batches that a read has seen, if one is under way.
    read: Option<(PartitionId, Vec<i64>)>,
    under_way: Vec<Frozen>,
    sent: Vec<i64>,
}

impl Table {
    const PARTITION: u32 = 10_101;

    fn freeze(&mut self, id: i64, inline: bool) {
        self.ids.push(id);
        let frozen = batch(id, Self::PARTITION);
        if inline {
            self.lanes.push(frozen);
        } else {
            self.lanes.has_more(frozen.partition);
        }
    }

    /// Begins all that can be begun.
    fn go_on(&mut self) {
        while let Some(next) = self.lanes.next(Instant::now()) {
            match next {
                Next::Load(partition, after) => {
                    let behind = self.ids.iter().copied().filter(|id| *id > after).take(2);
                    self.read = Some((partition, behind.collect()));
                }
                Next::Send(frozen) => {
                    self.sent.push(frozen.id);
                    self.under_way.push(*frozen);
                }
            }
        }
    }

    fn load(&mut self) {
        if let Some((partition, ids)) = self.read.take() {
            let batches = ids.into_iter().map(|id| batch(id, Self::PARTITION)).collect();
            self.lanes.loaded(partition, batches);
        }
    }

    fn arrive(&mut self) {
        if let Some(frozen) = self.under_way.pop() {
            self.ids.retain(|id| *id != frozen.id);
            self.lanes.done(frozen.partition, frozen.size(), true);
        }
    }
}

proptest! {
    /// A batch that is frozen while the table is read is not in what was read.
    #[test]
    fn every_batch_of_a_partition_is_sent_once_and_in_order(steps in steps()) {
        let (lanes, sent) = (Lanes::new(2), Vec::new());
        let mut table = Table { lanes, ids: Vec::new(), read: None, under_way: Vec::new(), sent };
        let mut frozen = 0;
        for step in steps {
            match step {
                Step::Freeze { inline } => {
                    frozen += 1;
                    table.freeze(frozen, inline);
                }
                Step::Load => table.load(),
                Step::Arrive => table.arrive(),
            }
            table.go_on();
        }
        while table.read.is_some() || !table.under_way.is_empty() {
            table.load();
            table.arrive();
            table.go_on();
        }
        prop_assert_eq!(table.sent, (1..=frozen).collect::<Vec<i64>>());
    }
}
