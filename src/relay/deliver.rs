//! A frozen batch on its way into its partition, until it is there, or certainly never will be.
//!
//! ```text
//!           ┌─ appended, or found ─> done
//! append ───┼─ wrong day ─> rolled, the day named in the batch's row ─> append
//!           ├─ full, without keys; sealed; another generation or topic ─> withdrawn, fenced, put back
//!           ├─ data refused ─> divided, down to the culprit, which is set aside
//!           └─ no answer, full with keys ─> again, later
//! ```
//!
//! Two relays may have a batch at once: one that has lost its lease without knowing, and the next. Both may
//! append it, since its identity is its own. Putting it back is another matter: an attempt of the other's,
//! late, must find it refused. The fence's row is there for the day on which it was left, and after that day
//! an attempt that names it is turned away by it. So no attempt names a day that is not in the batch's row,
//! a batch that is withdrawn takes no other day, and none is fenced before the partition has come to the
//! latest. And only who has the lease puts a batch back, under the relay's lock: whoever takes over looks for
//! it afterwards.

use std::time::{Duration, SystemTime};

use tokio::time::timeout;

use super::Outlet;
use crate::deadline::{in_time, on_a_slow_line};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Day;
use crate::store::append::{self, Again, Append, Failure, Rolled};
use crate::store::connect::refused;
use crate::store::failed::Failed;
use crate::store::node::Connection;
use crate::store::outbox::{self, Frozen, State};

/// How long an attempt may take, beyond the time for its bytes.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How often days are found out before it is tried later.
const DAYS: u32 = 4;
/// Before a partition that is full, or whose clock is wrong, is tried again.
const LATER: Duration = Duration::from_secs(5);

/// How a batch fared.
#[derive(Debug)]
pub(super) enum End {
    /// It is there; the day tells of its partition.
    Done(Option<Day>),
    /// Another relay has brought it to its end, or is about to.
    Gone,
    /// It is in the outbox again; full, or refused for good.
    PutBack { full: Option<Day> },
    /// To be tried again: after a pause, or since its node is in trouble.
    Again(Error, Pause),
}

/// What is to be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// Its node.
    Node,
    /// Its partition, for a moment.
    Short,
    /// Its partition, for some seconds.
    Long,
}

/// A batch, with how it fared.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) frozen: Frozen,
    pub(super) end: End,
}

/// One attempt to bring a batch to its end.
pub(super) async fn deliver(outlet: &Outlet, frozen: Frozen) -> Outcome {
    let mut delivery = Delivery { outlet, frozen };
    let end = match delivery.frozen.state {
        State::Frozen => delivery.whole().await,
        State::Divided => delivery.parts().await,
        State::Withdrawn => delivery.put_back(None).await,
    };
    let end = end.unwrap_or_else(|again| again);
    Outcome { frozen: delivery.frozen, end }
}

struct Delivery<'a> {
    outlet: &'a Outlet,
    frozen: Frozen,
}

/// What a partition says in the end; `Err` ends the attempt.
enum Said {
    There(Day),
    Data(Error),
    Overtaken,
    Fenced,
    Full(Day),
    Never(Error),
}

impl Delivery<'_> {
    async fn whole(&mut self) -> Result<End, End> {
        match self.append(None).await? {
            Said::There(day) => {
                self.outlet.failpoint("appended").await;
                self.outlet.context.notifier.publish(&[self.frozen.partition]);
                Ok(End::Done(Some(day)))
            }
            Said::Data(_) | Said::Overtaken => {
                self.set_state(State::Divided).await?;
                self.parts().await
            }
            Said::Full(_) if self.frozen.is_keyed() => {
                Err(self.later("it is full until midnight UTC"))
            }
            Said::Full(day) => {
                self.set_state(State::Withdrawn).await?;
                self.put_back(Some(day)).await
            }
            // Another relay's, which did not come to put it back; or of before the outbox was restored.
            Said::Fenced => {
                self.set_state(State::Withdrawn).await?;
                self.put_back(None).await
            }
            Said::Never(error) => {
                let (partition, topic) = (self.frozen.partition, &self.frozen.topic);
                tracing::info!(%partition, %topic, error = %error.chain(), "a batch goes back to its outbox");
                self.outlet.failpoint("refused").await;
                self.set_state(State::Withdrawn).await?;
                self.put_back(None).await
            }
        }
    }

    /// Appends what can be, halving what can't, and sets the rest aside.
    async fn parts(&mut self) -> Result<End, End> {
        let mut open = vec![(0, self.frozen.len())];
        let mut dead: Vec<(i32, String)> = Vec::new();
        let mut there = None;
        while let Some((first, count)) = open.pop() {
            let why = match self.append(Some((first, count))).await? {
                Said::There(day) => {
                    there = Some(day);
                    continue;
                }
                Said::Full(_) => return Err(self.later("it is full until midnight UTC")),
                Said::Data(_) | Said::Overtaken if count > 1 => {
                    let half = count / 2;
                    open.extend([(first + half, count - half), (first, half)]);
                    continue;
                }
                Said::Data(error) | Said::Never(error) => error.chain(),
                Said::Overtaken | Said::Fenced => "the partition refused it before".to_owned(),
            };
            let place = |nth: usize| i32::try_from(nth + 1).unwrap_or(i32::MAX);
            dead.extend((first..first + count).map(|nth| (place(nth), why.clone())));
        }
        let connection = self.home().await?;
        let buried = outbox::bury_parts(connection, self.frozen.id, &dead).await;
        buried.map_err(|error| self.of_home(error))?;
        let topic = || Some(self.frozen.topic.to_string());
        let buried: Vec<_> = dead.into_iter().map(|(_, why)| (topic(), why)).collect();
        self.outlet.buried(&buried);
        if there.is_some() {
            self.outlet.context.notifier.publish(&[self.frozen.partition]);
        }
        Ok(End::Done(there))
    }

    /// Puts a batch back that is withdrawn, once its partition will never take it any more.
    async fn put_back(&mut self, full: Option<Day>) -> Result<End, End> {
        self.reach_the_latest_day().await?;
        let connection = self.node().await?;
        let fenced = append::fence(connection, &self.frozen.append(), ATTEMPT).await;
        let found =
            fenced.map_err(|failure| End::Again(failure.into_error(&self.what()), Pause::Node))?;
        if let Some(id) = found {
            return Ok(End::Done(Some(id.day())));
        }
        self.outlet.failpoint("withdrawn").await;
        let _of_this_process = self.outlet.working.lock().await;
        let holder = self.outlet.holder();
        let put_back = outbox::put_back(self.home().await?, holder, self.frozen.id);
        let put_back = timeout(time_for(self.frozen.arrays.bytes), put_back).await;
        let put_back = put_back.map_err(|_| self.later("its outbox does not answer"))?;
        if !put_back.map_err(|error| self.of_home(error))? {
            let error = Error::new(ErrorKind::Unavailable, "another relay is at work");
            return Err(End::Again(error, Pause::Short));
        }
        Ok(End::PutBack { full })
    }

    /// Waits until the partition stands on the latest day that an attempt may have named, or is gone: a fence
    /// is forgotten at the end of its day.
    async fn reach_the_latest_day(&self) -> Result<(), End> {
        match self.rolled().await? {
            Rolled::To(day) if day < self.frozen.named => {
                Err(self.later("it is closed until the day that was named"))
            }
            Rolled::To(_) | Rolled::Unknown => Ok(()),
            Rolled::Clock => Err(self.clock_is_wrong()),
        }
    }

    /// Appends the whole or a part, on the day that the partition says it has.
    async fn append(&mut self, part: Option<(usize, usize)>) -> Result<Said, End> {
        let arrays = part.map(|(first, count)| self.frozen.part(first, count));
        let mut last = self.frozen.day;
        for _ in 0..DAYS {
            if !self.outlet.is_ours() {
                let error = Error::new(ErrorKind::Unavailable, "the relay's lease is over");
                return Err(End::Again(error, Pause::Long));
            }
            let connection = self.node().await?;
            let append = match (&arrays, part) {
                (Some(arrays), Some((first, _))) => self.frozen.append_part(arrays, first),
                _ => self.frozen.append(),
            };
            let (day, today) = match self.attempt(connection, &append).await? {
                Ok(Again::WrongDay { day, today }) => (day, today),
                Ok(answer) => return self.read(&answer),
                Err(error) => return Ok(Said::Data(error)),
            };
            let day = if today <= day && last != day { day } else { self.roll().await? };
            last = day;
            self.name_day(day).await?;
        }
        Err(self.later("it takes another day each time"))
    }

    /// One attempt. The inner error: the server refused the data.
    async fn attempt(
        &self,
        connection: Connection,
        append: &Append<'_>,
    ) -> Result<Result<Again, Error>, End> {
        let what = self.what();
        match append::append_again(connection, append, time_for(append.arrays.bytes)).await {
            Ok(answer) => Ok(Ok(answer)),
            Err(failure @ Failure::Data(_)) => Ok(Err(failure.into_error(&what))),
            Err(failure @ Failure::Locked(..)) => {
                Err(End::Again(failure.into_error(&what), Pause::Short))
            }
            Err(failure) => Err(End::Again(failure.into_error(&what), Pause::Node)),
        }
    }

    fn read(&self, answer: &Again) -> Result<Said, End> {
        let never = |why| {
            Said::Never(Error::new(ErrorKind::Unavailable, format!("{}: {why}", self.what())))
        };
        // Where it may still name a later day, no fence holds: see the module.
        let settled = self.frozen.day == self.frozen.named;
        Ok(match *answer {
            Again::At(id) => Said::There(id.day()),
            Again::Full if settled => Said::Full(self.frozen.day),
            Again::Sealed if settled => never("it takes no messages any more"),
            Again::WrongGeneration => never("the topic has another map of keys"),
            Again::WrongTopic | Again::Each(_) => never("it is not this topic's any more"),
            Again::Overtaken => Said::Overtaken,
            Again::Refused => Said::Fenced,
            Again::Full | Again::Sealed | Again::WrongDay { .. } => {
                return Err(self.later("it is closed until the day that was named"));
            }
        })
    }

    async fn roll(&self) -> Result<Day, End> {
        match self.rolled().await? {
            Rolled::To(day) => Ok(day),
            Rolled::Clock => Err(self.clock_is_wrong()),
            // Found out by the next attempt.
            Rolled::Unknown => Ok(self.frozen.day),
        }
    }

    async fn rolled(&self) -> Result<Rolled, End> {
        let partition = self.frozen.partition;
        let rolled = append::roll(self.node().await?, partition, SystemTime::now()).await;
        rolled.map_err(|error| End::Again(error, Pause::Node))
    }

    fn clock_is_wrong(&self) -> End {
        let partition = self.frozen.partition;
        tracing::error!(
            %partition, alert = "clock",
            "the server's clock is more than an hour ahead of this machine's"
        );
        self.later("its clock is wrong, or this machine's")
    }

    /// Attempts name this day from now on.
    async fn name_day(&mut self, day: Day) -> Result<(), End> {
        let named = outbox::name_day(self.home().await?, self.frozen.id, day).await;
        let (first, latest) = named.map_err(|error| self.of_home(error))?.ok_or(End::Gone)?;
        (self.frozen.first_day, self.frozen.day, self.frozen.named) = (first, day, latest);
        Ok(())
    }

    async fn set_state(&mut self, state: State) -> Result<(), End> {
        let set = outbox::set_state(self.home().await?, self.frozen.id, state).await;
        let (first, latest) = set.map_err(|error| self.of_home(error))?.ok_or(End::Gone)?;
        (self.frozen.first_day, self.frozen.named) = (first, latest);
        self.frozen.state = state;
        self.outlet.failpoint(state.as_str()).await;
        Ok(())
    }

    /// A connection to the partition's node.
    async fn node(&self) -> Result<Connection, End> {
        let nodes = &self.outlet.context.nodes;
        let node = self.frozen.partition.node();
        let connection = async { nodes.node(node).await?.get().await };
        let connection = in_time(ATTEMPT, &self.what(), connection).await;
        connection.map_err(|error| End::Again(error, Pause::Node))
    }

    /// A connection to the outbox's database.
    async fn home(&self) -> Result<Connection, End> {
        self.outlet.get().await.map_err(|error| End::Again(error, Pause::Short))
    }

    fn of_home(&self, error: Failed) -> End {
        End::Again(refused(error, &self.what()), Pause::Short)
    }

    fn later(&self, why: &str) -> End {
        let error = Error::new(ErrorKind::Unavailable, format!("{}: {why}", self.what()));
        End::Again(error, Pause::Long)
    }

    fn what(&self) -> String {
        format!("relay to partition {}", self.frozen.partition)
    }
}

/// How long an attempt may take to append so many bytes.
fn time_for(bytes: i32) -> Duration {
    ATTEMPT + on_a_slow_line(bytes)
}

impl Pause {
    /// How long, where it is known.
    pub(super) fn long(self) -> Option<Duration> {
        (self == Self::Long).then_some(LATER)
    }
}
