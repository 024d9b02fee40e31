//! Who is in the group, and which partitions each has: heartbeats in the control database, and the
//! assignment that is agreed upon there.
//!
//! ```text
//! heartbeat ─> who is there? ─> as the assignment has it? ─ yes ─> take it over, where it is new
//!     ^          │                         │ no
//!     │          └ silent or dead:         └─> compute the next one, record it in the place of the last
//!     │            leave it out
//!     └── every three tenths of a lease, and at once when the group has news
//! ```
//!
//! Everybody computes the same from what is recorded, so it does not matter who is first.
//!
//! A member is left out that was [silent](Silence) for two thirds of its lease, so that another one
//! is ready on its nodes when the lease ends. Whoever was out of touch itself knows nothing of the
//! silence of others. Sooner, where the process has died: its listening session is missing in two
//! looks, and no heartbeat came in between. Who was left out and lives is back with its next
//! heartbeat.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crc::{CRC_64_XZ, Crc};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use crate::cluster::Place;
use crate::consumer::Shared;
use crate::consumer::assignment::{Owners, Peer, assign};
use crate::consumer::journal::Journal;
use crate::consumer::pace::NewsPace;
use crate::consumer::silence::Silence;
use crate::consumer::wanted::Wanted;
use crate::deadline::{in_time, jitter, spread};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::metrics as names;
use crate::store::connect::refused;
use crate::store::membership::{self, Assignment, Heard, Seen, Sign, Standing};

/// How long a statement may take: a database that hangs must hold nobody up.
const STATEMENT: Duration = Duration::from_secs(2);
/// After how many leases without a word from the control database partitions that are free are
/// taken whoever's they should be.
const PATIENCE: u32 = 2;
/// Between the two looks at a session that is missing: its process hears at once if it was cut off.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// How long a member must have been in touch before it knows that another one is silent. After a
/// restart of the database everybody seems silent: each has sent a heartbeat by then.
const GRACE: Duration = Duration::from_secs(3);
/// How soon a heartbeat that failed is tried again, give or take a half: that of others failed in
/// the same instant.
const AGAIN: Duration = Duration::from_millis(500);
/// How often to try to agree: each failure means that somebody else was first, and may know more.
const ATTEMPTS: u32 = 5;
/// How often a member looks for members and groups that are gone for good, give or take a fifth:
/// one of all members does it.
const SWEEP_EVERY: Duration = Duration::from_mins(1);

const CRC: Crc<u64> = Crc::<u64>::new(&CRC_64_XZ);

/// What a member knows of its group.
pub(crate) struct Roster {
    shared: Arc<Shared>,
    /// Version and basis of the assignment that was taken over.
    known: Option<(i64, String)>,
    /// Members whose session was missing, and since when without a heartbeat.
    suspects: HashMap<Uuid, (SystemTime, Instant)>,
    silence: Silence,
    news: NewsPace,
    /// When it looks next for members and groups that are gone for good.
    sweep_at: Instant,
    /// When the control database last answered, and since when it does without a break.
    heard: Instant,
    in_touch_since: Option<Instant>,
    away: bool,
    /// Whether the last heartbeat told this process' session.
    told_session: bool,
}

impl Roster {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            known: None,
            suspects: HashMap::new(),
            silence: Silence::default(),
            news: NewsPace::new(Instant::now()),
            sweep_at: Instant::now() + jitter(SWEEP_EVERY),
            heard: Instant::now(),
            in_touch_since: None,
            away: false,
            told_session: false,
        }
    }

    /// Beats until the consumer stops. With the control database away, everybody keeps what they
    /// have, and after a while also takes what nobody does.
    pub(crate) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let presence = shared.cluster.inner.nodes.presence();
        let (mut news, mut places) = (presence.group_news(), presence.changes());
        let ours = format!("{} {}", shared.topology.topic, shared.group);
        let mut due = self.next();
        // When the news that has come is answered.
        let mut answer_at = None;
        // It may have come since the first heartbeat.
        places.mark_changed();
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                heard = news.recv() => match heard {
                    Ok(Some(group)) if group != ours => continue,
                    Ok(_) | Err(RecvError::Lagged(_)) => {
                        // Cursors may have been moved.
                        shared.renew_all();
                        let turn = *answer_at.get_or_insert_with(|| self.news.turn(Instant::now()));
                        due = due.min(turn);
                        continue;
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = places.changed() => {
                    if presence.is_at(Place::Control) == self.told_session {
                        continue;
                    }
                }
                // At once: the others find out what will be theirs while this one finishes.
                () = shared.stopping.cancelled() => return leave(&shared).await,
            }
            // What came meanwhile is answered by this heartbeat too.
            while news.try_recv().is_ok() {}
            answer_at = None;
            let outcome = self.beat().await;
            due = self.note(outcome);
            self.sweep().await;
        }
    }

    /// When the next heartbeat is due.
    fn next(&self) -> Instant {
        let regular = Instant::now() + jitter(self.shared.options.lease * 27 / 100);
        // Not before this one may judge.
        let first = self.in_touch_since.map_or(regular, |since| since + GRACE);
        let missing = self.suspects.values().map(|(_, since)| *since + SECOND_LOOK);
        let look = missing.chain(self.silence.look_at()).min();
        look.map_or(regular, |look| look.max(first).min(regular))
    }

    /// Says once that the control database is away, and once that it is back.
    fn note(&mut self, outcome: Result<()>) -> Instant {
        let Err(error) = outcome else {
            if std::mem::take(&mut self.away) {
                tracing::info!(group = %self.shared.group, "the control database is back");
            }
            return self.next();
        };
        if !std::mem::replace(&mut self.away, true) {
            tracing::warn!(
                group = %self.shared.group, error = %error.chain(),
                "no heartbeat: the consumer keeps the partitions that it has"
            );
        }
        if self.heard.elapsed() > self.shared.options.lease * PATIENCE {
            self.known = None;
            self.shared.want(Wanted::Anything);
        }
        let again = AGAIN.min(self.shared.options.lease * 3 / 10);
        Instant::now() + again / 2 + spread(again)
    }

    /// A heartbeat, and what follows from the answer; again, where somebody else was first to draw
    /// conclusions.
    pub(crate) async fn beat(&mut self) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let Some((heard, told)) = self.send().await? else { return Ok(()) };
            let Some(mut heard) = heard else { return Err(self.topic_is_gone()) };
            let now = Instant::now();
            let lapsed = now - self.heard > self.shared.options.lease / 2;
            let after_break = lapsed || self.in_touch_since.is_none();
            if after_break {
                self.in_touch_since = Some(now);
            }
            self.shared.reach.told(&told, after_break);
            self.heard = now;
            self.silence.look(&mut heard.members, after_break, now);
            self.leave_out(&mut heard.members).await?;
            let died = heard.members.iter().filter(|seen| seen.standing == Standing::Died);
            self.shared.note_dead(died.map(|seen| seen.member).collect());
            let unreachable = heard.members.iter().flat_map(|seen| &seen.unreachable);
            self.shared.probe(unreachable.filter_map(|number| node(*number)).collect());
            if self.agree(&peers(&heard.members), heard.assignment).await? {
                return Ok(());
            }
        }
        let what = format!("agree with group {} on who has what", self.shared.group);
        Err(Error::new(ErrorKind::Conflict, what))
    }

    /// The answer, none where the topic is gone, with the nodes that it told to be unreachable.
    /// Nothing where the consumer has left meanwhile.
    async fn send(&mut self) -> Result<Option<(Option<Heard>, Vec<i32>)>> {
        let shared = &self.shared;
        let _turn = shared.registering.lock().await;
        if shared.stopping.is_cancelled() {
            return Ok(None);
        }
        let what = "send a heartbeat to the control database";
        let (unreachable, avoid) = shared.out_of_reach();
        let host = host();
        let sign = Sign {
            member: shared.member,
            host: &host,
            lease_secs: shared.options.lease.as_secs_f64(),
            only: shared.options.only.as_ref().map(numbers),
            unreachable: unreachable.clone(),
            avoid,
            session: shared.cluster.inner.nodes.presence().session(Place::Control),
        };
        let names = (shared.topology.identity(), &shared.group);
        let sent = async {
            let connection = shared.cluster.inner.control.get().await?;
            let heard = membership::heartbeat(connection, names, &sign).await;
            heard.map_err(|error| refused(error, what))
        };
        self.told_session = sign.session.is_some();
        let heard = in_time(STATEMENT, what, sent).await?;
        Ok(Some((heard, unreachable)))
    }

    /// Leaves those out who are silent for too long, or whose process has died.
    async fn leave_out(&mut self, members: &mut [Seen]) -> Result<()> {
        let suspect = |seen: &&Seen| seen.missing && seen.standing != Standing::Died;
        let missing: Vec<Uuid> = members.iter().filter(suspect).map(|seen| seen.member).collect();
        self.suspects.retain(|member, _| missing.contains(member));
        let in_touch = self.in_touch_since.is_some_and(|since| since.elapsed() >= GRACE);
        for seen in members.iter_mut().filter(|seen| seen.standing != Standing::Died) {
            let missed_again = seen.missing && self.is_missed_again(seen);
            let silent = self.silence.is_silent(seen.member, Instant::now());
            let died = seen.missing && in_touch && (silent || missed_again);
            let silent = silent && in_touch && seen.standing == Standing::Listed;
            if !(died || silent) {
                continue;
            }
            let what = format!("leave member {} out", seen.member);
            let connection = self.shared.cluster.inner.control.get().await?;
            let left_out = membership::bury(connection, seen.member, seen.heartbeat_at, died);
            let left_out = in_time(STATEMENT, &what, async {
                left_out.await.map_err(|error| refused(error, &what))
            });
            if left_out.await? {
                seen.standing = if died { Standing::Died } else { Standing::LeftOut };
                tracing::info!(group = %self.shared.group, member = %seen.member, died, "member left out");
                self.suspects.remove(&seen.member);
            }
        }
        Ok(())
    }

    /// The control database has no such topic, or another one of its name. If the nodes say so too,
    /// the consumer ends.
    fn topic_is_gone(&self) -> Error {
        let Shared { topology, cluster, .. } = &*self.shared;
        cluster.inner.topology.doubt(topology.id);
        let what = format!("the control database does not have this topic {}", topology.topic);
        Error::new(ErrorKind::NotFound, what)
    }

    /// Forgets what is gone for good, where that is due. What this fails at is left for the next
    /// time.
    async fn sweep(&mut self) {
        if Instant::now() < self.sweep_at || self.away {
            return;
        }
        self.sweep_at = Instant::now() + jitter(SWEEP_EVERY);
        let what = "look for members that are gone for good";
        let swept = in_time(STATEMENT, what, async {
            let connection = self.shared.cluster.inner.control.get().await?;
            membership::sweep(connection).await.map_err(|error| refused(error, what))
        });
        if let Err(error) = swept.await {
            tracing::debug!(error = %error.chain(), "what is gone for good stays for now");
        }
    }

    /// Whether a session that is missing was so a while ago too, with no heartbeat since.
    fn is_missed_again(&mut self, seen: &Seen) -> bool {
        let now = (seen.heartbeat_at, Instant::now());
        let (heartbeat, since) = self.suspects.entry(seen.member).or_insert(now);
        if *heartbeat != seen.heartbeat_at {
            (*heartbeat, *since) = now;
        }
        since.elapsed() >= SECOND_LOOK
    }

    /// Takes the assignment over that is of these members, or makes it. False where there is
    /// another one by now than when these members were seen.
    async fn agree(&mut self, peers: &[Peer], recorded: Option<(i64, String)>) -> Result<bool> {
        let basis = basis(peers, &self.shared.topology.partitions);
        if recorded == self.known && recorded.as_ref().is_some_and(|(_, known)| *known == basis) {
            return Ok(true);
        }
        let before = self.read().await?.unwrap_or_default();
        let next = if before.basis == basis {
            before
        } else {
            if before.version != recorded.map_or(0, |(version, _)| version) {
                return Ok(false);
            }
            if before.version == 0 {
                let Shared { start, cluster, topology, group, .. } = &*self.shared;
                start.record(cluster, topology, group).await?;
            }
            let next = self.compute(&before, peers, &basis);
            if !self.record(&next).await? {
                return Ok(false);
            }
            next
        };
        let mine = owners(&next).into_iter().filter(|(_, m)| *m == self.shared.member);
        let mine = mine.map(|(partition, _)| partition).collect();
        tracing::debug!(
            group = %self.shared.group, version = next.version, members = next.members.len(),
            "assignment taken over"
        );
        self.known = Some((next.version, next.basis));
        ::metrics::counter!(names::ASSIGNED).increment(1);
        self.shared.want(Wanted::These(mine));
        Ok(true)
    }

    fn compute(&self, before: &Assignment, peers: &[Peer], basis: &str) -> Assignment {
        let partitions = &self.shared.topology.partitions;
        let owners = assign(partitions, peers, &owners(before));
        let members: Vec<Uuid> = peers.iter().map(|peer| peer.member).collect();
        let place = |partition| {
            let owner = owners.get(partition)?;
            let place = members.iter().position(|member| member == owner)?;
            i32::try_from(place + 1).ok()
        };
        Assignment {
            version: before.version + 1,
            basis: basis.to_owned(),
            owners: partitions.iter().map(|partition| place(partition).unwrap_or(0)).collect(),
            partitions: numbers(partitions),
            members,
        }
    }

    async fn read(&self) -> Result<Option<Assignment>> {
        let shared = &self.shared;
        let what = format!("read the assignment of group {}", shared.group);
        in_time(STATEMENT, &what, async {
            let connection = shared.cluster.inner.control.get().await?;
            let found =
                membership::assignment(&connection, &shared.topology.topic, &shared.group).await;
            found.map_err(|error| refused(error, &what))
        })
        .await
    }

    /// False where somebody else was first.
    async fn record(&self, next: &Assignment) -> Result<bool> {
        let shared = &self.shared;
        let what = format!("record the assignment of group {}", shared.group);
        in_time(STATEMENT, &what, async {
            let connection = shared.cluster.inner.control.get().await?;
            let names = (shared.topology.identity(), &shared.group);
            let recorded = membership::assign(connection, names, next).await;
            recorded.map_err(|error| refused(error, &what))
        })
        .await
    }
}

/// Former processes whose journal this one has are dead: the others need not wait to find that out.
pub(crate) async fn bury_former(shared: &Shared) {
    for member in shared.journal.iter().flat_map(Journal::former) {
        let left = async {
            let connection = shared.cluster.inner.control.get().await?;
            let names = (shared.topology.identity(), &shared.group);
            let left = membership::leave(connection, names, *member).await;
            left.map_err(|error| refused(error, "take a former process off the list"))
        };
        if let Ok(Err(error)) = timeout(STATEMENT, left).await {
            tracing::debug!(error = %error.chain(), "a former process stays on the list");
        }
    }
}

/// Takes the member off the list, so that the others know what will be theirs.
pub(crate) async fn leave(shared: &Shared) {
    shared.stopping.cancel();
    let left = async {
        let _turn = shared.registering.lock().await;
        let connection = shared.cluster.inner.control.get().await?;
        let names = (shared.topology.identity(), &shared.group);
        membership::leave(connection, names, shared.member)
            .await
            .map_err(|error| refused(error, "leave the group"))
    };
    // Where that fails, the heartbeat ends all the same.
    if let Ok(Err(error)) = timeout(STATEMENT, left).await {
        tracing::debug!(error = %error.chain(), "leaving the group");
    }
}

/// The members among which partitions are divided. A node is avoided by one only if another may
/// reach it.
fn peers(members: &[Seen]) -> Vec<Peer> {
    let listed = || members.iter().filter(|seen| seen.standing == Standing::Listed);
    let dark = |node: &i32| listed().all(|seen| seen.unreachable.contains(node));
    let partition = |number: &i32| PartitionId::from_i32(*number).ok();
    let peer = |seen: &Seen| Peer {
        member: seen.member,
        only: seen.only.as_ref().map(|only| only.iter().filter_map(partition).collect()),
        avoid: seen.avoid.iter().filter(|n| !dark(n)).filter_map(|n| node(*n)).collect(),
    };
    listed().map(peer).collect()
}

fn node(number: i32) -> Option<NodeId> {
    NodeId::new(u8::try_from(number).ok()?).ok()
}

fn numbers<'a>(partitions: impl IntoIterator<Item = &'a PartitionId>) -> Vec<i32> {
    partitions.into_iter().map(|partition| partition.as_i32()).collect()
}

fn owners(assignment: &Assignment) -> Owners {
    let pairs = assignment.partitions.iter().zip(&assignment.owners);
    let owner = |(partition, place): (&i32, &i32)| {
        let place = usize::try_from(*place).ok()?.checked_sub(1)?;
        Some((PartitionId::from_i32(*partition).ok()?, *assignment.members.get(place)?))
    };
    pairs.filter_map(owner).collect()
}

/// What an assignment is computed from, in short.
fn basis(peers: &[Peer], partitions: &[PartitionId]) -> String {
    let mut digest = CRC.digest();
    for partition in partitions {
        digest.update(&partition.as_i32().to_le_bytes());
    }
    for peer in peers {
        digest.update(peer.member.as_bytes());
        let only: BTreeSet<i32> = peer.only.iter().flatten().map(|p| p.as_i32()).collect();
        digest.update(format!("{}{only:?}{:?}", peer.only.is_some(), peer.avoid).as_bytes());
    }
    format!("{}-{}-{:016x}", peers.len(), partitions.len(), digest.finalize())
}

/// This machine's name.
fn host() -> String {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let name = std::env::var("HOSTNAME").ok().or_else(|| read("/proc/sys/kernel/hostname"));
    name.map_or_else(|| "unknown".to_owned(), |name| name.trim().to_owned())
}
