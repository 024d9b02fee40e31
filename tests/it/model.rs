//! A group under a random schedule, against a simple model of what a queue must do.
//!
//! ```text
//! append  join  leave  kill  pause  take  ack in any order  flush  seek  restart the node
//!    └──────┴──────┴─────┴─────┴─────┴─────────┴────────────┴──────┴──────────┴─> what must be true
//! ```
//!
//! A run that fails prints its seed and its schedule: `SHARDMQ_SEED=.. SHARDMQ_MODEL_STEPS=..` repeat it
//! as far as timing allows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use shardmq::embedded::{Server, StopMode};
use shardmq::{Cluster, NodeId, PartitionId};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::command::verify::Random;
use crate::support::reading::append_texts;
use crate::support::stored::{number, topic};
use crate::support::{TestCluster, client, database, eventually, own_server, shared_server};

mod member;

use member::{Event, Hands, Member};

const SECOND: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(30);
const LEASE: Duration = SECOND;
const PARTITIONS: usize = 4;
const MOST_MEMBERS: usize = 4;

/// What the model knows of a partition.
#[derive(Default)]
struct Log {
    ids: BTreeSet<i64>,
    /// Accepted since the group's position was moved last, under acquisitions that were not void then.
    acked: BTreeSet<i64>,
    /// Of these, what a flush confirmed.
    confirmed: BTreeSet<i64>,
    /// Tokens of acquisitions from before the last seek.
    void: BTreeSet<u64>,
    tokens: BTreeSet<u64>,
    /// Everything up to here was passed over by a seek.
    sought: i64,
    cursor: i64,
}

struct World {
    test: TestCluster,
    server: Server,
    sql: Client,
    control: Client,
    partitions: Vec<PartitionId>,
    logs: BTreeMap<i32, Log>,
    /// By member and acquisition, the last id.
    last: HashMap<(usize, u64), i64>,
    members: Vec<Member>,
    names: usize,
    schedule: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the schedule:\n{}", self.schedule.join("\n"));
        }
    }
}

fn partition_of(id: i64) -> i32 {
    i32::try_from(id / 100_000_000_000_000).unwrap()
}

/// As `Delivery::fencing_token` has it.
fn token(owner: Uuid, epoch: i64, reset: i64) -> u64 {
    let (high, low) = owner.as_u64_pair();
    high ^ low.rotate_left(1) ^ (epoch.rotate_left(32) ^ reset).cast_unsigned()
}

impl World {
    async fn new() -> Self {
        let server = own_server().await;
        let control_url = database(shared_server().await).await;
        let node_url = database(&server).await;
        let cluster = Cluster::builder(&control_url).upkeep(false).connect().await.unwrap();
        cluster.add_node(NodeId::new(1).unwrap(), &node_url).await.unwrap();
        let (sql, control) = (client(&node_url).await, client(&control_url).await);
        let test = TestCluster { cluster, control_url, node_urls: vec![node_url] };
        let partitions = topic(&test, "orders", PARTITIONS).await;
        let logs = partitions.iter().map(|p| (number(*p), Log::default())).collect();
        Self {
            test,
            server,
            sql,
            control,
            partitions,
            logs,
            last: HashMap::new(),
            members: Vec::new(),
            names: 0,
            schedule: Vec::new(),
        }
    }

    async fn step(&mut self, random: &mut Random) {
        let pick = random.below(100);
        let member = usize::try_from(random.below(self.members.len().max(1) as u64)).unwrap();
        let some = self.members.get(member).map(|member| member.name);
        let seed = random.below(u64::MAX);
        let what = match (pick, some) {
            (0..20, _) => self.append(seed).await,
            (20..32, _) if self.members.len() < MOST_MEMBERS => self.join(),
            (32..36, Some(_)) => self.leave(member).await,
            (36..40, Some(_)) => self.kill(member).await,
            (40..44, Some(name)) => {
                // The others go on meanwhile; past its lease is what is being tested.
                let others = (0..self.members.len()).filter(|at| *at != member);
                for at in others.collect::<Vec<_>>() {
                    self.members[at].run(move |hands| hands.take(5, 4 * LEASE / 3)).await;
                }
                format!("member {name} stood still")
            }
            (44..48, _) => self.seek(seed).await,
            (48..50, _) => self.restart().await,
            (50..62, Some(name)) => {
                let run = move |hands: &mut Hands| hands.take(20, SECOND / 4);
                self.members[member].run(run).await;
                format!("member {name} took some")
            }
            (62..78, Some(name)) => {
                let run = move |hands: &mut Hands| {
                    hands.take(40, SECOND / 4);
                    hands.ack(Random::of(seed), 80);
                    hands.take(0, SECOND / 3);
                };
                self.members[member].run(run).await;
                format!("member {name} worked")
            }
            (78..88, Some(name)) => {
                let run = move |hands: &mut Hands| hands.ack(Random::of(seed), 70);
                self.members[member].run(run).await;
                format!("member {name} acknowledged some")
            }
            (88..95, Some(name)) => {
                self.members[member].run(Hands::flush).await;
                format!("member {name} flushed")
            }
            // Time to renew, take and give for all.
            _ => {
                for member in &self.members {
                    member.run(|hands| hands.take(10, SECOND / 5)).await;
                }
                "all ran".to_owned()
            }
        };
        self.schedule.push(what);
        self.look().await;
    }

    async fn append(&mut self, seed: u64) -> String {
        let at = usize::try_from(seed % PARTITIONS as u64).unwrap();
        let (partition, count) = (self.partitions[at], i64::try_from(seed / 7 % 30 + 1).unwrap());
        let first = append_texts(&self.sql, partition, 0..count).await;
        self.logs.get_mut(&number(partition)).unwrap().ids.extend(first..first + count);
        format!("{count} messages from {first} on")
    }

    fn join(&mut self) -> String {
        self.names += 1;
        self.members.push(Member::join(self.names, &self.test.control_url));
        format!("member {} joined", self.names)
    }

    async fn leave(&mut self, at: usize) -> String {
        let mut member = self.members.swap_remove(at);
        member.run(Hands::leave).await;
        self.hear(&mut member);
        let name = member.name;
        member.end().await;
        format!("member {name} left")
    }

    async fn kill(&mut self, at: usize) -> String {
        let mut member = self.members.swap_remove(at);
        member.run(Hands::die).await;
        self.hear(&mut member);
        let name = member.name;
        member.end().await;
        format!("member {name} was killed")
    }

    /// To any message of a partition, or to its end.
    async fn seek(&mut self, seed: u64) -> String {
        let at = usize::try_from(seed % PARTITIONS as u64).unwrap();
        let partition = number(self.partitions[at]);
        self.hear_all();
        let log = self.logs.get_mut(&partition).unwrap();
        let places = log.ids.len() as u64 + 1;
        let nth = usize::try_from(seed / 11 % places).unwrap();
        let to = nth.checked_sub(1).and_then(|nth| log.ids.iter().nth(nth)).copied().unwrap_or(0);
        let seek = "update shardmq.cursor
                       set acked_id = $2, acked_ahead = '{}', reset_epoch = reset_epoch + 1
                     where group_name = 'g' and partition = $1
                    returning owner, epoch, reset_epoch - 1";
        let Some(row) = self.sql.query_opt(seek, &[&partition, &to]).await.unwrap() else {
            return "nothing to move yet".to_owned();
        };
        self.control.batch_execute("select pg_notify('shardmq_group', 'orders g')").await.unwrap();
        log.void = std::mem::take(&mut log.tokens);
        if let Some(owner) = row.get::<_, Option<Uuid>>(0) {
            log.void.insert(token(owner, row.get(1), row.get(2)));
        }
        (log.acked, log.confirmed) = (BTreeSet::new(), BTreeSet::new());
        (log.sought, log.cursor) = (to, to);
        format!("partition {partition} was moved to {to}")
    }

    async fn restart(&mut self) -> String {
        self.server.stop_server(StopMode::Immediate).await.unwrap();
        self.server.start_server().await.unwrap();
        self.sql = self.test.sql(0).await;
        "the node was restarted".to_owned()
    }

    fn hear_all(&mut self) {
        let mut members = std::mem::take(&mut self.members);
        members.iter_mut().for_each(|member| self.hear(member));
        self.members = members;
    }

    /// What a member has seen and done, in its order.
    fn hear(&mut self, member: &mut Member) {
        while let Ok(event) = member.events.try_recv() {
            match event {
                Event::Delivered { id, token } => {
                    let before = self.last.insert((member.name, token), id);
                    let key =
                        (partition_of(id), before.filter(|b| partition_of(*b) == partition_of(id)));
                    assert!(key.1.is_none_or(|before| before < id), "{id} after {before:?}");
                    let log = self.logs.get_mut(&key.0).unwrap();
                    assert!(log.ids.contains(&id), "{id} was never appended");
                    if !log.void.contains(&token) {
                        log.tokens.insert(token);
                    }
                }
                Event::Acked { id, token } => {
                    let log = self.logs.get_mut(&partition_of(id)).unwrap();
                    if !log.void.contains(&token) {
                        log.acked.insert(id);
                        member.unconfirmed.insert(id);
                    }
                }
                Event::Flushed { good } => {
                    for id in std::mem::take(&mut member.unconfirmed).into_iter().filter(|_| good) {
                        let log = self.logs.get_mut(&partition_of(id)).unwrap();
                        // A seek since then has made it void.
                        if log.acked.contains(&id) {
                            log.confirmed.insert(id);
                        }
                    }
                }
            }
        }
    }

    /// What must be true after each step.
    async fn look(&mut self) {
        self.hear_all();
        let cursors = "select partition, acked_id, lower(r), upper(r)
                         from shardmq.cursor left join lateral unnest(acked_ahead) r on true
                        where group_name = 'g'";
        let rows = self.sql.query(cursors, &[]).await.unwrap();
        // What was committed meanwhile was acknowledged before.
        self.hear_all();
        for row in rows {
            let (partition, acked_id): (i32, i64) = (row.get(0), row.get(1));
            let log = self.logs.get_mut(&partition).unwrap();
            assert!(acked_id >= log.cursor, "the cursor of {partition} went back to {acked_id}");
            log.cursor = acked_id;
            let passed = log.ids.range(log.sought + 1..).take_while(|id| **id <= acked_id);
            let (first, end) = (row.get::<_, Option<i64>>(2), row.get::<_, Option<i64>>(3));
            let ahead = first.zip(end).map_or(0..0, |(first, end)| first..end);
            let skipped = passed.copied().chain(ahead).find(|id| !log.acked.contains(id));
            assert_eq!(skipped, None, "a cursor passed what nobody acknowledged: {row:?}");
        }
    }

    /// A member that nobody disturbs gets all the rest, and nothing that was confirmed.
    async fn finish(&mut self) {
        while !self.members.is_empty() {
            self.leave(0).await;
        }
        self.look().await;
        let must: BTreeSet<i64> = self
            .logs
            .values()
            .flat_map(|log| {
                let left = log.ids.range(log.sought + 1..);
                left.filter(|id| !log.acked.contains(id)).copied().collect::<Vec<_>>()
            })
            .collect();
        let confirmed: BTreeSet<i64> =
            self.logs.values().flat_map(|log| log.confirmed.iter().copied()).collect();
        self.schedule.push("a last member takes the rest".to_owned());
        self.join();
        let mut seen = BTreeSet::new();
        let until = tokio::time::Instant::now() + SOON;
        while !must.is_subset(&seen)
            || self.test.cluster.lag("orders").await.unwrap().iter().any(|l| l.lag > 0)
        {
            assert!(
                tokio::time::Instant::now() < until,
                "never delivered: {:?}",
                must.difference(&seen)
            );
            let member = &self.members[0];
            member.run(|hands| hands.take(500, SECOND / 4)).await;
            member.run(|hands| hands.ack(Random::of(1), 100)).await;
            member.run(Hands::flush).await;
            let mut events = Vec::new();
            while let Ok(event) = member.events.try_recv() {
                if let Event::Delivered { id, .. } = event {
                    seen.insert(id);
                }
                events.push(event);
            }
        }
        let again: Vec<_> = seen.intersection(&confirmed).collect();
        assert!(again.is_empty(), "delivered again after a confirmed flush: {again:?}");
        let member = self.members.remove(0);
        member.run(Hands::leave).await;
        member.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_keeps_its_promises_whatever_comes() {
    let mut random = Random::new();
    let steps = std::env::var("SHARDMQ_MODEL_STEPS").ok().and_then(|steps| steps.parse().ok());
    let mut world = World::new().await;
    world.join();
    let has_cursors = async || {
        let count = "select count(*) from shardmq.cursor where member is not null";
        world.members[0].run(|hands| hands.take(1, SECOND / 10)).await;
        world.sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0)
            == i64::try_from(PARTITIONS).unwrap()
    };
    eventually("the first member has all", SOON, has_cursors).await;
    for _ in 0..steps.unwrap_or(60) {
        world.step(&mut random).await;
    }
    world.finish().await;
    println!("{}", world.schedule.join("\n"));
}
