//! What the first attempt did not store: asked for, appended again, divided, sent elsewhere, or given
//! up with an answer that is true.
//!
//! ```text
//!            ┌─ appended or found ─> its first id
//! again ─────┼─ wrong day ─> roll ─> again
//!            ├─ full, sealed ─> without a key: another partition; with one: an error
//!            ├─ data refused ─> two halves, down to the culprit, which alone fails
//!            └─ no answer ─> wait, again; after the deadline fence: found, refused for ever or unknown
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::id::MessageId;
use crate::producer::Shared;
use crate::producer::batch::Batch;
use crate::producer::lane::{Closed, Lane};
use crate::producer::writer::roll;
use crate::store::append::{self, Again, Append, Failure, Rolled};

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
                shared.answer(&part, Ok(id));
                shared.cluster.inner.notifier.publish(&[lane.partition]);
            }
            Settled::Failed(error) => shared.answer(&part, Err(error)),
            Settled::Elsewhere(error) => send_elsewhere(shared, lane, part, &error),
            Settled::Divide(error) => {
                if part.len() <= 1 {
                    shared.answer(&part, Err(error));
                } else {
                    let half = part.len() / 2;
                    let (first, second) = part.divide(|index, _| index < half);
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
    Failed(Error),
    /// Certainly not stored, and this partition will not take it.
    Elsewhere(Error),
    /// The server refused the data of some message in it.
    Divide(Error),
}

async fn settle_part(shared: &Shared, lane: &Lane, batch: &mut Batch) -> Settled {
    let what = format!("append to partition {}", lane.partition);
    let mut backoff = BACKOFF.0;
    let mut last: Option<Error> = None;
    while let Some(turn) = turn(lane, batch.deadline).await {
        let trouble = match again(shared, lane, batch).await {
            Ok(Again::At(id)) => return Settled::At(id),
            Ok(answer) => match step(shared, lane, answer, &what).await {
                Ok(()) => continue,
                Err(Step::Wait(error)) => error,
                Err(Step::End(settled)) => return settled,
            },
            Err(Trouble::Data(error)) => {
                return end(shared, lane, batch, Settled::Divide(error)).await;
            }
            Err(Trouble::Refused(error)) if is_permanent(&error) => {
                return end(shared, lane, batch, Settled::Failed(error)).await;
            }
            Err(Trouble::Refused(error)) => error,
            Err(Trouble::Unknown(error)) => {
                batch.unknown = true;
                error
            }
        };
        drop(turn);
        last = Some(trouble);
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
    }
    let seconds = shared.options.send_timeout.as_secs_f32();
    let cause = last.map_or_else(|| "no answer".to_owned(), |error| error.chain());
    let why = format!("{what}: not done within {seconds} s");
    let error = Error::with_source(ErrorKind::Timeout, why, cause);
    end(shared, lane, batch, Settled::Failed(error)).await
}

/// Waits for the batch's turn; none where its deadline comes first.
async fn turn(lane: &Lane, deadline: Instant) -> Option<SemaphorePermit<'_>> {
    if Instant::now() >= deadline {
        return None;
    }
    let turn = tokio::time::timeout_at(deadline, lane.writer.patience());
    turn.await.ok().flatten()
}

/// Errors that time does not cure.
fn is_permanent(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Database | ErrorKind::Incompatible | ErrorKind::Conflict)
}

enum Trouble {
    Data(Error),
    Refused(Error),
    Unknown(Error),
}

async fn again(shared: &Shared, lane: &Lane, batch: &mut Batch) -> Result<Again, Trouble> {
    let what = format!("append to partition {}", lane.partition);
    let connection =
        async { shared.cluster.inner.nodes.node(lane.partition.node()).await?.get().await };
    let connection = connection.await.map_err(Trouble::Refused)?;
    let day = match lane.day() {
        Some(day) => day,
        None => shared.today().map_err(Trouble::Refused)?,
    };
    batch.attempted_on(day);
    let append = lane.append(shared, batch, day);
    append::append_again(connection, &append, shared.options.append_timeout).await.map_err(
        |failure| match failure {
            Failure::Data(_) => Trouble::Data(failure.into_error(&what)),
            Failure::Unknown(_) => Trouble::Unknown(failure.into_error(&what)),
            _ => Trouble::Refused(failure.into_error(&what)),
        },
    )
}

enum Step {
    /// Try again after a while.
    Wait(Error),
    /// That was final.
    End(Settled),
}

/// What an answer other than an id asks for. `Ok`: again, at once.
async fn step(shared: &Shared, lane: &Lane, answer: Again, what: &str) -> Result<(), Step> {
    let refuse = |kind, why: &str| Error::new(kind, format!("{what}: {why}"));
    let settled = match answer {
        Again::At(_) => return Ok(()),
        Again::WrongDay { day, today } if Some(day) != lane.day() && today <= day => {
            lane.set_day(day);
            return Ok(());
        }
        Again::WrongDay { .. } => return roll_lane(shared, lane, what).await,
        Again::Full => {
            if let Some(day) = lane.day() {
                lane.close(Closed::Full(day));
            }
            let why = "PartitionFull: it has no room for the batch within 99,999,999 messages of a \
                       day, until midnight UTC";
            Settled::Elsewhere(refuse(ErrorKind::Full, why))
        }
        Again::Sealed | Again::WrongGeneration => {
            lane.close(Closed::Sealed);
            Settled::Elsewhere(refuse(ErrorKind::Unavailable, "it takes no messages any more"))
        }
        Again::WrongTopic => {
            lane.close(Closed::Sealed);
            Settled::Failed(refuse(ErrorKind::NotFound, "it is not this topic's any more"))
        }
        Again::Refused => Settled::Failed(refuse(ErrorKind::Timeout, "the batch was given up")),
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

/// Ends a batch that no attempt is known to have stored. Where one may have, it is asked for once more;
/// if it is not there, the answer sees to it that it never will be.
async fn end(shared: &Shared, lane: &Lane, batch: &Batch, verdict: Settled) -> Settled {
    let (true, Some(day)) = (batch.unknown, batch.first_day) else {
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
                Settled::At(id) => return Settled::At(id),
            };
            let open = format!("{why}, and the node could not be asked: it may be stored, or not");
            Settled::Failed(Error::with_source(ErrorKind::Unknown, open, unasked))
        }
    }
}

async fn fence(shared: &Shared, batch: &Append<'_>) -> Result<Option<MessageId>> {
    let node = batch.partition.node();
    let connection = shared.cluster.inner.nodes.node(node).await?.get().await?;
    append::fence(connection, batch, shared.options.append_timeout)
        .await
        .map_err(|failure| failure.into_error(&format!("ask partition {}", batch.partition)))
}

/// Messages without a key go to another open partition; those with one fail.
fn send_elsewhere(shared: &Arc<Shared>, lane: &Lane, batch: Batch, error: &Error) {
    let (keyed, free) = batch.divide(|_, keyed| keyed);
    if keyed.len() > 0 {
        shared.answer(&keyed, Err(error.clone()));
    }
    if free.len() == 0 {
        return;
    }
    match shared.open_lane_after(lane.index) {
        Some(other) => {
            if other.push_batch(free) {
                other.writer.schedule(other);
            }
        }
        None => shared.answer(&free, Err(error.clone())),
    }
}
