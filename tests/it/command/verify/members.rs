//! What happens to members of a group under load: one leaves, is killed or suspended, all are
//! restarted one by one, the server under them is. Nothing is lost, skipped or repeated, and the
//! others go on.
//!
//! ```text
//! every partition is read ─ something happens ─ every partition is read again ─ read all, and check
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use shardmq::embedded::StopMode;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use uuid::Uuid;

use super::super::{Finished, command, finish_within};
use super::SECOND;
use crate::support::signals::signal;
use crate::support::{TestCluster, eventually, own_server, within};

const PARTITIONS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);

/// A checked workload whose members are processes.
struct Workload {
    pid: u32,
    finished: JoinHandle<Finished>,
    /// What it said so far.
    said: Arc<Mutex<Vec<String>>>,
    /// Ends when it and all its members have: they share their stderr.
    ended: JoinHandle<()>,
    sql: Client,
}

/// A partition of the group: what it is read up to, its owner and the epoch.
type Cursor = (i64, Option<Uuid>, i64);

impl Workload {
    /// Returns when every partition is read.
    async fn start(test: &TestCluster, members: usize) -> Self {
        let arguments = format!(
            "verify --seconds 300 --rate 300 --keys 100 --partitions {PARTITIONS} --consumers {members}
             --member-processes --json"
        );
        let mut child = command(&test.control_url, &arguments).spawn().unwrap();
        let pid = child.id().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let saying = Arc::clone(&said);
        let ended = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                saying.lock().unwrap().push(line);
            }
        });
        let finished = tokio::spawn(finish_within(5 * PATIENCE, child));
        let workload = Self { pid, finished, said, ended, sql: test.sql(0).await };
        workload.is_read().await;
        workload
    }

    /// The pids of all members so far, in order of their numbers.
    fn pids(&self) -> Vec<u32> {
        let said = self.said.lock().unwrap();
        let member = |line: &String| {
            let (number, pid) = line.strip_prefix("- member ")?.split_once(": process ")?;
            Some((number.parse().unwrap(), pid.parse().unwrap()))
        };
        said.iter().filter_map(member).collect::<BTreeMap<u32, u32>>().into_values().collect()
    }

    async fn cursors(&self) -> BTreeMap<i32, Cursor> {
        let cursors = "select partition, acked_id, owner, epoch from shardmq.cursor
                        where group_name = 'verify'";
        let rows = self.sql.query(cursors, &[]).await.unwrap();
        let cursor = |row: &tokio_postgres::Row| (row.get(0), (row.get(1), row.get(2), row.get(3)));
        rows.iter().map(cursor).collect()
    }

    /// Who owns how many partitions.
    async fn shares(&self) -> BTreeMap<Uuid, i64> {
        let shares = "select member, count(*) from shardmq.cursor
                       where group_name = 'verify' and member is not null group by member";
        let rows = self.sql.query(shares, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// Waits until every partition is read further than it is now.
    async fn is_read(&self) {
        let before = self.cursors().await;
        let all = || async {
            let now = self.cursors().await;
            let further = |(partition, cursor): (&i32, &Cursor)| {
                let last = before.get(partition).map_or(0, |cursor| cursor.0);
                // Some that were acknowledged since: more than what was in hand.
                cursor.0 % 100_000_000 > 100 && cursor.0 > last + 100
            };
            now.len() == PARTITIONS && now.iter().all(further)
        };
        eventually("every partition is read", PATIENCE, all).await;
    }

    /// Waits until so many members own all partitions, each as many, and one of these, if there are
    /// any, owns nothing any more. Returns who owns them.
    async fn is_shared_by(&self, members: usize, before: &BTreeSet<Uuid>) -> BTreeSet<Uuid> {
        let share = i64::try_from(PARTITIONS / members).unwrap();
        let shared = || async {
            let shares = self.shares().await;
            let is_even = shares.len() == members && shares.values().all(|count| *count == share);
            let is_new = before.is_empty() || before.iter().any(|m| !shares.contains_key(m));
            is_even && is_new
        };
        eventually("the members have even shares", PATIENCE, shared).await;
        self.shares().await.into_keys().collect()
    }

    /// Ends a member by a signal. Waits for the new one, and until that has its share.
    async fn replaces(&self, pid: u32, name: &str) {
        let (known, owners) = (self.pids().len(), self.is_shared_by(4, &BTreeSet::new()).await);
        signal(pid, name).await;
        let replaced = || async { self.pids().len() > known };
        eventually("another member is started", PATIENCE, replaced).await;
        self.is_shared_by(4, &owners).await;
    }

    /// Ends it when every partition is read again, and checks what must be true whatever happened.
    /// Returns the report.
    async fn end(self) -> Value {
        self.is_read().await;
        signal(self.pid, "INT").await;
        let finished = self.finished.await.unwrap();
        let report: Value = finished.json().into_iter().next().unwrap_or_default();
        println!("{report}");
        within(PATIENCE, "the members' end", self.ended).await.unwrap();
        let said = self.said.lock().unwrap().join("\n");
        assert_eq!(finished.code, Some(0), "{said}");
        for field in ["violations", "lost", "skipped", "out_of_order", "duplicated"] {
            assert_eq!(report[field], 0, "{field}: {report}");
        }
        assert!(report["acknowledged"].as_u64() > Some(1_000), "{report}");
        report
    }
}

/// The longest time in which a partition with messages was not read. Below the lease of 10 s where
/// nobody has to wait for its end.
fn assert_stall(report: &Value, below_ms: u64) {
    let stall = report["longest_delivery_stall_ms"].as_u64().unwrap();
    assert!(stall < below_ms, "{stall} ms: {report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_leaves() {
    let test = TestCluster::new(1).await;
    let workload = Workload::start(&test, 4).await;
    workload.replaces(workload.pids()[1], "TERM").await;
    assert_stall(&workload.end().await, 4_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_killed() {
    let test = TestCluster::new(1).await;
    let workload = Workload::start(&test, 4).await;
    // After a restart of the server all sessions are new, and say nothing of who has died.
    let up = "select pg_postmaster_start_time() < clock_timestamp() - interval '10 s'";
    let up = || async { workload.sql.query_one(up, &[]).await.unwrap().get(0) };
    eventually("the server is up for longer than a lease", PATIENCE, up).await;
    workload.replaces(workload.pids()[1], "KILL").await;
    assert_stall(&workload.end().await, 8_000);
}

/// Longer than its lease of 10 s. What it commits when it wakes is refused, or had been done
/// before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_suspended_and_wakes() {
    let test = TestCluster::new(1).await;
    let workload = Workload::start(&test, 4).await;
    let pids = workload.pids();
    signal(pids[1], "STOP").await;
    // How long it is away is what is being tested: longer than others may wait.
    tokio::time::sleep(18 * SECOND).await;
    signal(pids[1], "CONT").await;
    workload.is_shared_by(4, &BTreeSet::new()).await;
    assert_eq!(workload.pids(), pids);
    assert_stall(&workload.end().await, 16_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_members_are_restarted_one_by_one() {
    let test = TestCluster::new(1).await;
    let workload = Workload::start(&test, 4).await;
    for pid in workload.pids() {
        workload.replaces(pid, "TERM").await;
    }
    assert_eq!(workload.pids().len(), 8);
    assert_stall(&workload.end().await, 6_000);
}

/// They are killed by nobody, and find that nobody reads what they write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_end_with_the_workload_that_is_killed() {
    let test = TestCluster::new(1).await;
    let workload = Workload::start(&test, 4).await;
    signal(workload.pid, "KILL").await;
    within(PATIENCE, "the members' end", workload.ended).await.unwrap();
}

/// All their leases are over in its eyes for a moment, and all of them are well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarts_under_ten_members() {
    let server = own_server().await;
    let test = TestCluster::on(&server, 1).await;
    let mut workload = Workload::start(&test, 10).await;
    let owners = |cursors: BTreeMap<i32, Cursor>| -> BTreeMap<i32, (Option<Uuid>, i64)> {
        let owner = |(partition, (_, owner, epoch))| (partition, (owner, epoch));
        cursors.into_iter().map(owner).collect()
    };
    let before = owners(workload.cursors().await);
    server.stop_server(StopMode::Immediate).await.unwrap();
    server.start_server().await.unwrap();
    workload.sql = test.sql(0).await;
    workload.is_read().await;
    assert_eq!(owners(workload.cursors().await), before);
    assert_eq!(workload.pids().len(), 10);
    workload.end().await;
}
