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
