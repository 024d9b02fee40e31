//! What the first attempt did not store: asked for, appended again, divided, sent elsewhere, or
//! given up with an answer that is true.
//!
//! ```text
//!            ┌─ appended or found ─> its first id
//! again ─────┼─ wrong day ─> roll ─> again
//!            ├─ full, sealed ─> without a key: another partition; with one: an error
//!            ├─ data refused ─> two halves, down to the culprit, which alone fails
//!            ├─ node down ─> without a key: ask; then to another node, with a mark if it did not say
//!            └─ no answer ─> wait, again; after the deadline fence: found, refused for ever or unknown
//! ```
//!
//! Messages with dedup keys come here at once. Whatever became of an attempt, they are sent again:
//! the node knows them by their keys. So nothing is asked for, and what had no answer until the
//! deadline is unknown.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use crate::deadline::{spread, with_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::id::MessageId;
use crate::producer::batch::{Batch, Kind};
use crate::producer::failover::is_of_node;
use crate::producer::health::NodeState;
use crate::producer::lane::{Closed, Lane};
use crate::producer::shared::Shared;
use crate::producer::status::ProducerEvent;
use crate::producer::writer::{find_days, roll};
use crate::store::append::{self, Again, Append, Each, Failure, Rolled};

/// How long a node that is down is asked for a batch that may go elsewhere, beyond the time for its
/// bytes. With the append timeout, after which a node that hangs is down, that is 3 s: the batch is
/// to be stored elsewhere within 4 s, also where its new node is busy.
const ASK: Duration = Duration::from_secs(1);
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Brings a batch that was taken from its lane to its end, and frees the lane.
pub(crate) async fn settle(shared: &Arc<Shared>, lane: &Arc<Lane>, batch: Batch) {
    let mut parts = VecDeque::from([batch]);
    while let Some(mut part) = parts.pop_front() {
        if part.sequence.is_none() {
            part.sequence = Some(lane.draw());
        }
        match settle_part(shared, lane, &mut part).await {
            Settled::At(id) => {
                shared.stored(lane, &part, id);
                shared.cluster.inner.notifier.publish(&[lane.partition]);
            }
            Settled::Each(each) => {
                shared.stored_each(lane, &part, &each);
                shared.cluster.inner.notifier.publish(&[lane.partition]);
            }
            Settled::Failed(error) => shared.answer(&part, Err(error)),
            Settled::Leaves { asked: true } => shared.forward(lane, part.fresh()),
            Settled::Leaves { asked: false } => {
                let (node, messages) = (lane.partition.node(), part.len());
                shared.tell(ProducerEvent::PossibleDuplicates { node, messages });
                shared.forward(lane, part.marked(lane.producer));
            }
            Settled::Elsewhere(error) => send_elsewhere(shared, lane, part, &error),
            Settled::Divide(error) => {
                if part.len() <= 1 {
                    shared.answer(&part, Err(error));
                } else {
                    let half = part.len() / 2;
                    let (first, second) = part.divide(half);
                    parts.push_front(second);
                    parts.push_front(first);
                }
            }
        }
    }
    shared.finish(lane);
}

enum Settled {
    At(MessageId),
    Each(Each),
    Failed(Error),
    /// Certainly not stored, and this partition will not take it.
    Elsewhere(Error),
    /// The server refused the data of some message in it.
    Divide(Error),
    /// Its node is down and another is not. Asked: it is certainly not stored.
    Leaves {
        asked: bool,
    },
}

#[tracing::instrument(level = "debug", name = "settle", skip_all, fields(partition = %lane.partition))]
async fn settle_part(shared: &Shared, lane: &Lane, batch: &mut Batch) -> Settled {
    let what = format!("append to partition {}", lane.partition);
    let mut backoff = BACKOFF.0;
    let mut last: Option<Error> = None;
    while Instant::now() < batch.deadline {
        let changed = shared.changed.notified();
        if let Some(settled) = leave(shared, lane, batch).await {
            return settled;
        }
        // All others had theirs in the transaction of their writer.
        let is_first = batch.kind == Kind::Once && last.is_none();
        let turn = tokio::select! {
            turn = turn(lane, batch.deadline, is_first) => turn,
            // Some node is up or down now.
            () = changed => continue,
        };
        let Some(turn) = turn else { break };
        let trouble = match again(shared, lane, batch, is_first).await {
            Ok(answer) => {
                shared.node_worked(&lane.writer);
                match step(shared, lane, answer, &what).await {
                    Ok(()) => continue,
                    Err(Step::Wait(error)) => error,
                    Err(Step::End(settled)) if may_come_later(lane, batch, &settled) => {
                        return end(shared, lane, batch, of_each(batch, settled)).await;
                    }
                    Err(Step::End(settled)) => return of_each(batch, settled),
                }
            }
            Err(Trouble::Data(error)) => {
                return end(shared, lane, batch, Settled::Divide(error)).await;
            }
            Err(Trouble::Busy(error)) => error,
            Err(Trouble::Refused(error)) => {
                if is_of_node(&error) {
                    shared.node_failed(&lane.writer, &error);
                }
                if is_permanent(&error) && leaves_for(shared, lane, batch).is_none() {
                    return end(shared, lane, batch, Settled::Failed(error)).await;
                }
                error
            }
            Err(Trouble::Unknown(error)) => {
                batch.unknown = true;
                shared.node_failed(&lane.writer, &error);
                error
            }
        };
        drop(turn);
        last = Some(trouble);
        wait(shared, lane, batch, backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
    let error = too_late(shared, &what, last);
    end(shared, lane, batch, Settled::Failed(error)).await
}

/// A partition that takes nothing more has some messages of dedup keys all the same: each is asked
/// for.
fn of_each(batch: &Batch, settled: Settled) -> Settled {
    match settled {
        Settled::Elsewhere(error) if batch.kind == Kind::Once => Settled::Divide(error),
        settled => settled,
    }
}

/// Whether an attempt that had no answer may be stored after a partition has said that it takes the
/// batch no more: the attempt named a later day than the partition's, and what is full or overtaken
/// today is neither on that day.
fn may_come_later(lane: &Lane, batch: &Batch, settled: &Settled) -> bool {
    let is_there = matches!(settled, Settled::At(_) | Settled::Each(_));
    let is_later = batch.named.is_some_and(|(_, latest)| lane.day().is_none_or(|day| latest > day));
    batch.unknown && is_later && !is_there
}

/// Waits before the next attempt: shorter where some node's state changes. Not at all where the
/// batch has somewhere to go.
async fn wait(shared: &Shared, lane: &Lane, batch: &Batch, backoff: Duration) {
    let changed = shared.changed.notified();
    if leaves_for(shared, lane, batch).is_none() {
        // At any time within it: others have met the same trouble in the same instant.
        let _ = tokio::time::timeout(spread(backoff), changed).await;
    }
}

fn too_late(shared: &Shared, what: &str, last: Option<Error>) -> Error {
    let seconds = shared.options.send_timeout.as_secs_f32();
    let why = format!("{what}: not done within {seconds} s");
    let cause = shared
        .no_node_left()
        .map(|nodes| format!("no node is left: {nodes}"))
        .or_else(|| last.map(|error| error.chain()))
        .unwrap_or_else(|| {
            "it had no turn: earlier messages, or other work, had the connections".to_owned()
        });
    Error::with_source(ErrorKind::Timeout, why, cause)
}

/// Where a batch goes whose node is down, if it may and there is a better one.
fn leaves_for<'a>(shared: &'a Shared, lane: &Lane, batch: &Batch) -> Option<&'a Arc<Lane>> {
    let is_down = lane.writer.health.state() == NodeState::Down;
    (is_down && shared.is_free(batch)).then(|| shared.better_lane(lane)).flatten()
}

/// What becomes of a batch that does not wait for a node that is down. One that may have been
/// stored is asked for, for a while; then it goes with a mark.
async fn leave(shared: &Shared, lane: &Lane, batch: &Batch) -> Option<Settled> {
    if lane.writer.health.state() == NodeState::Down && shared.is_impatient(batch) {
        let away = Settled::Failed(Shared::away(&lane.writer));
        return Some(end(shared, lane, batch, away).await);
    }
    leaves_for(shared, lane, batch)?;
    let (true, Some((day, _))) = (batch.unknown, batch.named) else {
        return Some(Settled::Leaves { asked: true });
    };
    let asking = async {
        loop {
            match fence(shared, &lane.append(shared, batch, day)).await {
                Ok(Some(id)) => return Settled::At(id),
                Ok(None) => return Settled::Leaves { asked: true },
                Err(error) => tracing::debug!(error = %error.chain(), "could not ask"),
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    };
    let asked = tokio::time::timeout(with_bytes(ASK, batch.arrays.bytes), asking).await;
    Some(asked.unwrap_or(Settled::Leaves { asked: false }))
}

/// Waits for the batch's turn; none where its deadline comes first.
async fn turn(lane: &Lane, deadline: Instant, is_first: bool) -> Option<SemaphorePermit<'_>> {
    let turn = tokio::time::timeout_at(deadline, lane.writer.turn(is_first));
    turn.await.ok().flatten()
}

/// Errors that time does not cure.
fn is_permanent(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Database | ErrorKind::Incompatible | ErrorKind::Conflict)
}

enum Trouble {
    Data(Error),
    /// The partition's lock was another's, or this process had no free connection.
    Busy(Error),
    Refused(Error),
    Unknown(Error),
}

async fn again(
    shared: &Shared,
    lane: &Lane,
    batch: &mut Batch,
    is_first: bool,
) -> Result<Again, Trouble> {
    let what = format!("append to partition {}", lane.partition);
    let limit = shared.options.append_timeout;
    let connection = shared.cluster.inner.nodes.connect(lane.partition.node(), limit).await;
    let connection = connection.map_err(|error| {
        if error.is_own_pool() { Trouble::Busy(error) } else { Trouble::Refused(error) }
    })?;
    let trouble = |failure: Failure| match failure {
        Failure::Data(_) => Trouble::Data(failure.into_error(&what)),
        Failure::Locked(..) => Trouble::Busy(failure.into_error(&what)),
        Failure::Unknown(_) => Trouble::Unknown(failure.into_error(&what)),
        _ => Trouble::Refused(failure.into_error(&what)),
    };
    let connection = find_days(connection, &[lane], limit).await.map_err(trouble)?;
    let day = match lane.day() {
        Some(day) => day,
        None => shared.today().map_err(Trouble::Refused)?,
    };
    batch.attempted_on(day);
    let answer = if batch.kind == Kind::Once {
        batch.sequence = Some(lane.draw());
        let batch = lane.append(shared, batch, day);
        append::append_once(connection, &batch, limit, is_first).await
    } else {
        append::append_again(connection, &lane.append(shared, batch, day), limit).await
    };
    answer.map_err(trouble)
}

enum Step {
    /// Try again after a while.
    Wait(Error),
    /// That was final.
    End(Settled),
}

/// What an answer asks for. `Ok`: again, at once.
async fn step(shared: &Shared, lane: &Lane, answer: Again, what: &str) -> Result<(), Step> {
    let refuse = |kind, why: &str| Error::new(kind, format!("{what}: {why}"));
    let settled = match answer {
        Again::At(id) => Settled::At(id),
        Again::Each(each) => Settled::Each(each),
        Again::WrongDay { day, today } if Some(day) != lane.day() && today <= day => {
            lane.set_day(day);
            return Ok(());
        }
        Again::WrongDay { .. } => return roll_lane(shared, lane, what).await,
        Again::Full => {
            if let Some(day) = lane.day() {
                lane.close(Closed::Full(day));
                shared.note_change();
            }
            let why = "PartitionFull: it has no room for the batch within 99,999,999 messages of a \
                       day, until midnight UTC";
            Settled::Elsewhere(refuse(ErrorKind::Full, why))
        }
        Again::Sealed | Again::WrongGeneration => {
            lane.close(Closed::Sealed);
            shared.note_change();
            Settled::Elsewhere(refuse(ErrorKind::Unavailable, "it takes no messages any more"))
        }
        Again::WrongTopic => {
            lane.close(Closed::Sealed);
            shared.note_change();
            shared.cluster.inner.topology.doubt(shared.topology.id);
            let why = "it is not this topic's any more: the topic was deleted, or the node has lost it and \
                       `shardmq repair` makes it again";
            Settled::Failed(refuse(ErrorKind::NotFound, why))
        }
        Again::Refused | Again::Overtaken => {
            Settled::Failed(refuse(ErrorKind::Timeout, "the batch was given up"))
        }
    };
    Err(Step::End(settled))
}

async fn roll_lane(shared: &Shared, lane: &Lane, what: &str) -> Result<(), Step> {
    match roll(shared, lane.partition).await {
        Ok(Rolled::To(day)) => {
            lane.set_day(day);
            Ok(())
        }
        Ok(Rolled::Clock) => {
            let why = "the server's clock is more than an hour ahead of this machine's, and would \
                       move the partition to another day: set the clocks right";
            tracing::error!(partition = %lane.partition, alert = "clock", "{why}");
            Err(Step::Wait(Error::new(ErrorKind::Unavailable, format!("{what}: {why}"))))
        }
        Ok(Rolled::Unknown) => {
            let error = Error::new(ErrorKind::NotFound, format!("{what}: it does not exist"));
            Err(Step::End(Settled::Failed(error)))
        }
        Err(error) => Err(Step::Wait(error)),
    }
}

/// Ends a batch that no attempt is known to have stored. Where one may have, it is asked for once
/// more; if it is not there, the answer sees to it that it never will be.
async fn end(shared: &Shared, lane: &Lane, batch: &Batch, verdict: Settled) -> Settled {
    if batch.unknown && batch.kind == Kind::Once {
        return open(verdict, batch);
    }
    let (true, Some((day, _))) = (batch.unknown, batch.named) else {
        return verdict;
    };
    match fence(shared, &lane.append(shared, batch, day)).await {
        Ok(Some(id)) => Settled::At(id),
        Ok(None) => verdict,
        Err(unasked) => {
            let why = match verdict {
                Settled::Failed(error) | Settled::Elsewhere(error) | Settled::Divide(error) => {
                    error
                }
                at_or_away => return at_or_away,
            };
            let open = format!("{why}, and the node could not be asked: it may be stored, or not");
            Settled::Failed(Error::with_source(ErrorKind::Unknown, open, unasked))
        }
    }
}

/// The end of a batch with dedup keys, of which an attempt may have been stored, or may be yet.
fn open(verdict: Settled, batch: &Batch) -> Settled {
    match verdict {
        Settled::Divide(error) if batch.len() > 1 => Settled::Divide(error),
        Settled::Failed(error) | Settled::Elsewhere(error) | Settled::Divide(error) => {
            let open = format!("{error}, and an attempt had no answer: it may be stored, or not");
            Settled::Failed(Error::with_source(ErrorKind::Unknown, open, error.chain()))
        }
        at_or_away => at_or_away,
    }
}

async fn fence(shared: &Shared, batch: &Append<'_>) -> Result<Option<MessageId>> {
    let (node, limit) = (batch.partition.node(), shared.options.append_timeout);
    let connection = shared.cluster.inner.nodes.connect(node, limit).await?;
    // What an abandoned attempt has sent may be before it on the same line.
    append::fence(connection, batch, with_bytes(limit, batch.arrays.bytes))
        .await
        .map_err(|failure| failure.into_error(&format!("ask partition {}", batch.partition)))
}

/// Messages without a key go to another open partition; those with one fail.
fn send_elsewhere(shared: &Arc<Shared>, lane: &Lane, batch: Batch, error: &Error) {
    let is_free = batch.kind == Kind::Free;
    let other = is_free.then(|| shared.open_lane_after(lane.index)).flatten();
    let Some(other) = other else {
        return shared.answer(&batch, Err(error.clone()));
    };
    shared.hand(other, batch.fresh());
}
