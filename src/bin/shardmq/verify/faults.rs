//! Does the faults of a plan to private servers and to the group's processes, and counts them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use shardmq::verify::{Fault, FaultKind, FaultPlan};
use shardmq::{Cluster, Error, ErrorKind, Message, TopicOptions};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Run;
use super::processes::Pids;
use crate::failure::{Failure, UNFINISHED};
use crate::output::note;
use crate::servers::{DATABASE, Node};

/// Between two attempts at something that a broken cluster refuses.
const AGAIN: Duration = Duration::from_millis(200);
/// How often the end of a fault is tried: the server is well, but for a moment perhaps.
const TRIES: u32 = 50;
/// Messages for the other topic each time.
const OTHERS: u32 = 100;
/// How long these may take.
const SENT_WITHIN: Duration = Duration::from_secs(5);

/// What was done.
#[derive(Debug, Serialize)]
pub(super) struct FaultReport {
    seed: u64,
    /// How many of each kind.
    pub(super) faults: BTreeMap<String, u64>,
    /// The fewest messages that the group was delivered between the beginnings of two faults.
    least_delivered_between: u64,
    /// Between how many of them it was delivered none.
    nothing_delivered_between: u64,
    /// Each fault, in order.
    done: Vec<Done>,
}

#[derive(Debug, Serialize)]
struct Done {
    kind: FaultKind,
    target: usize,
    #[serde(skip_serializing_if = "is_zero")]
    amount: i64,
    at_ms: u64,
    lasted_ms: u64,
    /// What the group was delivered since the fault before it began, repeated ones included.
    delivered: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(amount: &i64) -> bool {
    *amount == 0
}

impl FaultReport {
    fn new(seed: u64, kinds: &[FaultKind], mut done: Vec<Done>) -> Self {
        done.sort_by_key(|fault| fault.at_ms);
        let mut before = 0;
        for fault in &mut done {
            let delivered = fault.delivered;
            fault.delivered = delivered.saturating_sub(before);
            before = delivered;
        }
        let mut faults: BTreeMap<_, _> = kinds.iter().map(|kind| (kind.to_string(), 0)).collect();
        for fault in &done {
            *faults.entry(fault.kind.to_string()).or_default() += 1;
        }
        let between = || done.iter().skip(1).map(|fault| fault.delivered);
        Self {
            seed,
            faults,
            least_delivered_between: between().min().unwrap_or(0),
            nothing_delivered_between: between().filter(|count| *count == 0).count() as u64,
            done,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let counts: Vec<_> = self.faults.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        format!(
            "faults (seed {}): {}\nmessages delivered between two of them: {} at least; none between {}",
            self.seed,
            counts.join(", "),
            self.least_delivered_between,
            self.nothing_delivered_between
        )
    }
}

/// Where faults are done.
pub(super) struct Stage<'a> {
    pub(super) run: &'a Run,
    pub(super) nodes: &'a [Node],
    pub(super) members: Pids,
    /// No fault begins after it, and those under way end.
    pub(super) stop: CancellationToken,
    pub(super) began: Instant,
}

impl Stage<'_> {
    /// Does a whole plan. Everything is mended when it returns.
    pub(super) async fn perform(
        &self,
        plan: &FaultPlan,
        seed: u64,
        kinds: &[FaultKind],
    ) -> Result<FaultReport, Failure> {
        let (nodes, members, topic) =
            tokio::join!(self.row(&plan.nodes), self.row(&plan.members), self.row(&plan.topic));
        let done = nodes?.into_iter().chain(members?).chain(topic?).collect();
        Ok(FaultReport::new(seed, kinds, done))
    }

    async fn row(&self, faults: &[Fault]) -> Result<Vec<Done>, Failure> {
        let (mut done, mut late) = (Vec::new(), Duration::ZERO);
        for fault in faults {
            // Those after one that took longer are as far apart as planned.
            tokio::select! {
                () = sleep_until(self.began + fault.at + late) => {}
                () = self.stop.cancelled() => break,
            }
            let (at, delivered) = (self.run.now(), self.run.delivered());
            tracing::info!(kind = %fault.kind, target = fault.target, "a fault begins");
            match self.perform_one(fault).await {
                Ok(()) => done.push(Done {
                    kind: fault.kind,
                    target: fault.target,
                    amount: fault.amount,
                    at_ms: millis(at),
                    lasted_ms: millis(self.run.now().saturating_sub(at)),
                    delivered,
                }),
                Err(NotDone::Refused(error)) => {
                    note(&format!("- {} was not done: {}", fault.kind, error.chain()));
                }
                Err(NotDone::Broken(error)) => {
                    let text = format!("{} of {}: {}", fault.kind, fault.target, error.chain());
                    return Err(Failure::new(UNFINISHED, text));
                }
            }
            let planned = self.began + fault.at + fault.lasts;
            late = late.max(Instant::now().saturating_duration_since(planned));
        }
        Ok(done)
    }

    async fn perform_one(&self, fault: &Fault) -> Result<(), NotDone> {
        match fault.kind {
            FaultKind::KillMember => self.member(fault.target, "KILL").await,
            FaultKind::PauseMember => {
                self.member(fault.target, "STOP").await?;
                self.hold(fault.lasts).await;
                self.member(fault.target, "CONT").await
            }
            FaultKind::RemakeTopic => self.remake_topic().await,
            _ => self.of_node(fault).await,
        }
    }

    async fn of_node(&self, fault: &Fault) -> Result<(), NotDone> {
        let Some(Node { server, .. }) = self.nodes.get(fault.target) else {
            return Ok(());
        };
        match fault.kind {
            FaultKind::KillNode => {
                server.kill().await.map_err(NotDone::Refused)?;
                self.hold(fault.lasts).await;
                server.start_server().await.map_err(NotDone::Broken)
            }
            FaultKind::PauseNode => {
                let suspended = server.suspend().await;
                self.hold(fault.lasts).await;
                server.resume().await.map_err(NotDone::Broken)?;
                suspended.map_err(NotDone::Refused)
            }
            FaultKind::LockTable => {
                let partition = usize::try_from(fault.amount).unwrap_or(0);
                let locked = tokio::select! {
                    locked = server.lock_day_table(DATABASE, partition, fault.lasts) => locked.map(drop),
                    () = self.stop.cancelled() => Ok(()),
                };
                locked.map_err(NotDone::Refused)
            }
            FaultKind::RollDay => server.roll_days(DATABASE).await.map_err(NotDone::Refused),
            FaultKind::MoveClock => {
                let moved = server.move_clock(DATABASE, fault.amount).await;
                self.hold(fault.lasts).await;
                at_last(async || server.move_clock(DATABASE, 0).await)
                    .await
                    .map_err(NotDone::Broken)?;
                moved.map_err(NotDone::Refused)
            }
            _ => Ok(()),
        }
    }

    /// Lets a fault last.
    async fn hold(&self, lasts: Duration) {
        tokio::select! {
            () = sleep(lasts) => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// A member that was killed is followed by another soon.
    async fn member(&self, place: usize, signal: &str) -> Result<(), NotDone> {
        let sent = at_last(async || self.members.signal(place, signal).await).await;
        sent.map_err(NotDone::Refused)
    }

    /// Deletes the other topic and makes it anew, as often as it takes while nodes are broken.
    async fn remake_topic(&self) -> Result<(), NotDone> {
        let remade = async {
            while let Err(error) = self.try_to_remake().await {
                if !error.is_transient() {
                    return Err(NotDone::Broken(error));
                }
                sleep(AGAIN).await;
            }
            Ok(())
        };
        tokio::select! {
            remade = remade => remade,
            () = self.stop.cancelled() => {
                let text = "the time was over before the other topic was made anew";
                Err(NotDone::Refused(Error::new(ErrorKind::Timeout, text)))
            }
        }
    }

    async fn try_to_remake(&self) -> shardmq::Result<()> {
        let (cluster, name) = (Cluster::connect(&self.run.url).await?, "verify-other");
        match cluster.delete_topic(name, true).await {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let options = TopicOptions::partitions(2 * self.nodes.len()).if_missing();
        cluster.create_topic(name, options).await?;
        let producer = cluster.producer(name).send_timeout(SENT_WITHIN).build().await?;
        let messages = (0..OTHERS).map(|number| Message::new(format!("other {number}")));
        for sent in producer.send_all(messages).await {
            if let Err(error) = sent {
                tracing::debug!(error = %error.chain(), "a message of the other topic");
            }
        }
        cluster.shutdown().await;
        Ok(())
    }
}

/// Why a fault was not done.
enum NotDone {
    /// The cluster, broken by another fault as it is, did not let us: nothing is broken by this one.
    Refused(Error),
    /// The end of a fault failed: what is measured from here on means nothing.
    Broken(Error),
}

/// Tries for some seconds.
async fn at_last(act: impl AsyncFn() -> shardmq::Result<()>) -> shardmq::Result<()> {
    let mut tries = 1;
    loop {
        match act().await {
            Err(_) if tries < TRIES => tries += 1,
            outcome => return outcome,
        }
        sleep(AGAIN).await;
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_counted_in_order_with_what_was_delivered_since_the_one_before() {
        let done = |kind, at_ms, delivered| Done {
            kind,
            target: 0,
            amount: 0,
            at_ms,
            lasted_ms: 5,
            delivered,
        };
        let kinds = [FaultKind::KillNode, FaultKind::LockTable, FaultKind::RollDay];
        let rows = vec![
            done(FaultKind::KillNode, 900, 70),
            done(FaultKind::LockTable, 100, 10),
            done(FaultKind::KillNode, 500, 70),
        ];
        let report = FaultReport::new(7, &kinds, rows);
        let delivered: Vec<_> = report.done.iter().map(|fault| fault.delivered).collect();
        assert_eq!(delivered, [10, 60, 0]);
        assert_eq!((report.least_delivered_between, report.nothing_delivered_between), (0, 1));
        let counts: Vec<_> = report.faults.values().copied().collect();
        assert_eq!(counts, [2, 1, 0]);
        assert!(report.text().contains("2 kill_node, 1 lock_table, 0 roll_day"));
    }
}
