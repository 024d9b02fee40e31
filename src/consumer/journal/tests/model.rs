//! Any sequence of steps, against cursors and sets in memory.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    /// Acquires a partition; killed before that is written down where it is not `recorded`.
    Acquire {
        at: usize,
        recorded: bool,
    },
    Ack {
        at: usize,
    },
    /// Commits a node; one more is acknowledged after it was composed.
    Commit {
        node: u8,
        late: usize,
    },
    Settle {
        at: usize,
    },
    GiveBack {
        at: usize,
    },
    /// Another consumer takes it.
    Other {
        at: usize,
    },
    Seek {
        at: usize,
    },
    /// The server is started again; what is held is seen there.
    Restart,
    Retire {
        node: u8,
    },
    Kill,
}

fn any_step() -> impl Strategy<Value = Step> {
    let at = 0..PARTITIONS.len();
    prop_oneof![
        6 => (at.clone(), proptest::bool::weighted(0.8))
            .prop_map(|(at, recorded)| Step::Acquire { at, recorded }),
        10 => at.clone().prop_map(|at| Step::Ack { at }),
        3 => (1_u8..=2, at.clone()).prop_map(|(node, late)| Step::Commit { node, late }),
        2 => at.clone().prop_map(|at| Step::Settle { at }),
        1 => at.clone().prop_map(|at| Step::GiveBack { at }),
        1 => at.clone().prop_map(|at| Step::Other { at }),
        1 => at.prop_map(|at| Step::Seek { at }),
        1 => Just(Step::Restart),
        2 => (1_u8..=2).prop_map(|node| Step::Retire { node }),
        3 => Just(Step::Kill),
    ]
}

const PARTITIONS: [(u8, u8); 3] = [(1, 1), (1, 2), (2, 1)];

/// A cursor, and what is known of it.
#[derive(Default)]
struct Row {
    member: Option<Uuid>,
    owner: Option<Uuid>,
    epoch: i64,
    reset_epoch: i64,
    committed: BTreeSet<i64>,
    next_id: i64,
    /// Acknowledged, not committed, and nobody else owned the partition since.
    must: BTreeSet<i64>,
    /// The same, but retired: it may still be on disk.
    may: BTreeSet<i64>,
    /// The last acquisition was not written down.
    unrecorded: bool,
    /// Taken by the process that lives.
    taken: bool,
    held: Option<Held>,
}

struct Held {
    writer: HoldingJournal,
    acked: BTreeSet<i64>,
    taken_over: Arc<Acks>,
}

impl Row {
    /// The chain of holdings is broken.
    fn lose(&mut self) {
        self.held = None;
        self.must.clear();
        self.may.clear();
    }

    fn ack(&mut self) {
        self.next_id += 1;
        let id = self.next_id;
        if let Some(held) = &mut self.held {
            held.acked.insert(id);
            held.writer.ack(id, uid(id));
            self.must.insert(id);
            self.may.insert(id);
        }
    }

    fn commit(&mut self, acked: &BTreeSet<i64>) {
        self.committed.extend(acked);
        self.must.retain(|id| !acked.contains(id));
        self.may.retain(|id| !acked.contains(id));
    }

    fn acked(&self) -> BTreeSet<i64> {
        self.held.as_ref().map(|held| held.acked.clone()).unwrap_or_default()
    }
}

struct World {
    folder: TempDir,
    journal: Journal,
    member: u128,
    drawn: u128,
    server: u64,
    rows: [Row; PARTITIONS.len()],
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = open(&folder, 1);
        Self { folder, journal, member: 1, drawn: 1 << 64, server: 0, rows: Default::default() }
    }

    fn draw(&mut self) -> Uuid {
        self.drawn += 1;
        Uuid::from_u128(self.drawn)
    }

    fn kill(&mut self) {
        for row in &mut self.rows {
            row.held = None;
            row.taken = false;
        }
        self.journal.close();
        self.member += 1;
        self.journal = open(&self.folder, self.member);
    }

    fn acquire(&mut self, at: usize, recorded: bool) -> Result<(), TestCaseError> {
        let owner = self.draw();
        let (node, table) = PARTITIONS[at];
        let partition = partition(node, table);
        self.journal.begin(partition.node());
        let row = &mut self.rows[at];
        if row.held.is_some() {
            return Ok(());
        }
        let Row { member, owner: owned_by, epoch, reset_epoch, .. } = *row;
        let before = Before { member, owner: owned_by, epoch, reset_epoch };
        row.member = Some(Uuid::from_u128(self.member));
        (row.owner, row.epoch) = (Some(owner), epoch + 1);
        if !recorded {
            if std::mem::replace(&mut row.unrecorded, true) {
                row.lose();
            }
            self.kill();
            return Ok(());
        }
        let acquired = Acquired {
            partition,
            fence: Fence { owner, epoch: row.epoch, reset_epoch },
            incarnation: server(self.server),
            acked_id: 0,
            acked_ahead: row.committed.iter().map(|id| (*id, *id)).collect(),
            owner_before: None,
            member_before: None,
        };
        let (writer, taken_over) = self.journal.holding(&acquired, &before);
        let found: BTreeSet<i64> = ids(&taken_over).into_iter().collect();
        prop_assert!(row.must.is_subset(&found), "{:?} of {:?}", found, row.must);
        prop_assert!(found.is_subset(&row.may), "{:?} beyond {:?}", found, row.may);
        (row.must, row.may) = (found.clone(), found);
        (row.unrecorded, row.taken) = (false, true);
        row.held = Some(Held { writer, acked: BTreeSet::new(), taken_over });
        Ok(())
    }

    fn commit(&mut self, node: u8, late: usize) {
        let id = partition(node, 1).node();
        // So small that it is always another segment.
        let mark = self.journal.node(id).mark(0);
        let acked: BTreeMap<usize, _> =
            self.rows.iter().enumerate().map(|(at, row)| (at, row.acked())).collect();
        self.rows[late].ack();
        for (at, acked) in acked.into_iter().filter(|(at, _)| PARTITIONS[*at].0 == node) {
            self.rows[at].commit(&acked);
        }
        self.journal.committed(id, mark);
    }

    fn settle(&mut self, at: usize) {
        if let Some(held) = &mut self.rows[at].held {
            ack_all(&held.writer, ids(&held.taken_over));
            held.acked.extend(held.taken_over.keys());
            held.writer.settled();
        }
    }

    fn give_back(&mut self, at: usize) {
        let row = &mut self.rows[at];
        if row.held.is_some() {
            row.commit(&row.acked());
            (row.member, row.owner, row.held) = (None, None, None);
        }
    }

    fn restart(&mut self) {
        self.server += 1;
        for row in &mut self.rows {
            match &row.held {
                Some(held) => held.writer.seen_on(server(self.server)),
                None => row.lose(),
            }
        }
    }

    fn retire(&mut self, node: u8) {
        self.journal.retire_old(partition(node, 1).node());
        let rows = self.rows.iter_mut().zip(PARTITIONS);
        rows.filter(|(row, of)| of.0 == node && !row.taken).for_each(|(row, _)| row.must.clear());
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Acquire { at, recorded } => self.acquire(at, recorded)?,
            Step::Ack { at } => self.rows[at].ack(),
            Step::Commit { node, late } => self.commit(node, late),
            Step::Settle { at } => self.settle(at),
            Step::GiveBack { at } => self.give_back(at),
            Step::Other { at } => {
                let (owner, row) = (self.draw(), &mut self.rows[at]);
                (row.member, row.owner) = (Some(Uuid::max()), Some(owner));
                row.epoch += 1;
                row.lose();
            }
            Step::Seek { at } => {
                self.rows[at].reset_epoch += 1;
                self.rows[at].lose();
            }
            Step::Restart => self.restart(),
            Step::Retire { node } => self.retire(node),
            Step::Kill => self.kill(),
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What was acknowledged and not committed is there for whoever takes the partition next from this
    /// journal, and nothing else is.
    #[test]
    fn nothing_is_lost_and_nothing_else_comes(
        steps in proptest::collection::vec(any_step(), 1..60),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.step(step)?;
        }
        world.kill();
        for at in 0..PARTITIONS.len() {
            world.acquire(at, true)?;
        }
    }
}
