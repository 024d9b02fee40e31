//! Messages that are published in a transaction of the caller's, and messages for later. Neither
//! goes to a partition at once: a [relay](crate::relay) takes them there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::GenericClient;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::deadline::{after, in_time, spread, with_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Day, NodeId, ScheduledId};
use crate::message::Message;
use crate::producer::Producer;
use crate::producer::failover::is_of_node;
use crate::producer::shared::Shared;
use crate::store::append::Arrays;
use crate::store::connect::{is_definite, kind_of, refused};
use crate::store::failed::Failed;
use crate::store::outbox::{self, Due};

/// The most messages of [`Producer::deliver_all_at`] and [`Producer::deliver_all_after`].
pub const MAX_DELAYED: usize = 1_000;
/// The most bytes of these together, but for one message alone.
const MAX_DELAYED_BYTES: usize = 64 << 20;
/// Between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// For how long a call is repeated at most, whatever the send timeout is. Its node knows it for
/// three hours; a repeat after that would store it twice.
const REPEATED: Duration = Duration::from_hours(2);
/// How long taking a message back may take.
const CANCEL: Duration = Duration::from_secs(5);

impl Producer {
    /// Publishes a message in a transaction of the caller's, on a node or on any database with an
    /// outbox (`shardmq migrate --outbox URL`): it is sent if and only if the transaction commits,
    /// exactly once, usually within milliseconds. One statement. Returns the number of the message
    /// in that database, by which `shardmq.cancel` takes it back for as long as it is there.
    ///
    /// ```no_run
    /// # async fn example(
    /// #     producer: shardmq::Producer,
    /// #     client: &mut tokio_postgres::Client,
    /// # ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// let transaction = client.transaction().await?;
    /// transaction.execute("insert into invoice (cents) values (1999)", &[]).await?;
    /// let message = shardmq::Message::new("1999 cents").key("customer-42");
    /// producer.send_in(&transaction, message).await?;
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Messages of a key are stored in the order of publishing where one transaction had committed
    /// before the other published. A transaction that stays open delays its own messages and nobody
    /// else's. Where the topic does not exist, the message is set aside in `shardmq.outbox_dead`.
    ///
    /// A process that produces or consumes, with [upkeep](crate::ClusterBuilder::upkeep), must be
    /// running somewhere; not necessarily this one. Where this future is dropped the statement may
    /// have been sent.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the message is outside of a limit; nothing was sent then.
    /// [`ErrorKind::Incompatible`] where the database has no outbox, else those of the database:
    /// end the transaction with a rollback.
    pub async fn send_in<C>(&self, transaction: &C, message: Message) -> Result<i64>
    where
        C: GenericClient + Sync,
    {
        self.publish_in(transaction, message, None).await
    }

    /// Publishes a message in a transaction of the caller's, for a time: if the transaction
    /// commits, it is stored when that has come, by the clock of the transaction's database; at
    /// once where it has passed. Like [`send_in`](Self::send_in) in all else.
    ///
    /// # Errors
    /// Those of [`send_in`](Self::send_in); [`ErrorKind::Invalid`] also where the time is not
    /// between the years 2000 and 2099.
    pub async fn deliver_at_in<C>(
        &self,
        transaction: &C,
        time: SystemTime,
        message: Message,
    ) -> Result<i64>
    where
        C: GenericClient + Sync,
    {
        Day::of(time)?;
        self.publish_in(transaction, message, Some(time)).await
    }

    async fn publish_in<C>(
        &self,
        transaction: &C,
        message: Message,
        at: Option<SystemTime>,
    ) -> Result<i64>
    where
        C: GenericClient + Sync,
    {
        let shared = self.shared();
        check_open(&shared)?;
        check(&message, &shared)?;
        let published = outbox::publish(transaction, self.topic(), &message, at).await;
        published.map_err(|error| explained(error, "publish a message in a transaction"))
    }

    /// Sends a message at a time, which may be years from now: until then it waits on a node, for a
    /// message with a key on that of its key. Usually it is stored within 50 ms of that time, by
    /// the node's clock; at once where it has passed. The answer comes when it is on disk there.
    ///
    /// Not cancel safe: where the future is dropped the message may be stored, or not.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the message is outside of a limit, or the time not between the
    /// years 2000 and 2099; [`ErrorKind::Timeout`] where it was certainly not stored within the
    /// [send timeout](crate::ProducerBuilder::send_timeout); [`ErrorKind::Unknown`] where it may
    /// have been.
    pub async fn deliver_at(&self, time: SystemTime, message: Message) -> Result<ScheduledId> {
        one(self.deliver_all_at(time, [message]).await)
    }

    /// Sends a message after a while, by the clock of the node that it waits on: like
    /// [`deliver_at`](Self::deliver_at) in all else.
    ///
    /// # Errors
    /// Those of [`deliver_at`](Self::deliver_at).
    pub async fn deliver_after(&self, delay: Duration, message: Message) -> Result<ScheduledId> {
        one(self.deliver_all_after(delay, [message]).await)
    }

    /// Sends up to 1,000 messages at a time, with one statement for each node that they wait on.
    /// One result for each, in the order given; those of a node are all stored, or none. Like
    /// [`deliver_at`](Self::deliver_at) in all else.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for each where they are more than 1,000, or have more than 64 MiB, in
    /// all; nothing was sent then. Else those of [`deliver_at`](Self::deliver_at).
    pub async fn deliver_all_at(
        &self,
        time: SystemTime,
        messages: impl IntoIterator<Item = Message>,
    ) -> Vec<Result<ScheduledId>> {
        let valid = Day::of(time).map(|_| Due::At(time));
        self.deliver(valid, messages.into_iter().collect()).await
    }

    /// Sends up to 1,000 messages after a while: like [`deliver_all_at`](Self::deliver_all_at) in
    /// all else.
    ///
    /// # Errors
    /// Those of [`deliver_all_at`](Self::deliver_all_at).
    pub async fn deliver_all_after(
        &self,
        delay: Duration,
        messages: impl IntoIterator<Item = Message>,
    ) -> Vec<Result<ScheduledId>> {
        let at = SystemTime::now().checked_add(delay).unwrap_or(SystemTime::UNIX_EPOCH);
        let valid = Day::of(at).map(|_| Due::After(delay));
        self.deliver(valid, messages.into_iter().collect()).await
    }

    async fn deliver(&self, due: Result<Due>, messages: Vec<Message>) -> Vec<Result<ScheduledId>> {
        let shared = &self.shared();
        let due = match due.and_then(|due| check_all(shared, &messages).map(|()| due)) {
            Ok(due) => due,
            Err(error) => return messages.iter().map(|_| Err(error.clone())).collect(),
        };
        let mut results: Vec<Result<ScheduledId>> = Vec::new();
        let mut groups: BTreeMap<Option<NodeId>, (Vec<usize>, Vec<Message>)> = BTreeMap::new();
        for (index, message) in messages.into_iter().enumerate() {
            results.push(Err(shared.why_closed()));
            if let Err(error) = check(&message, shared) {
                results[index] = Err(error);
                continue;
            }
            let node = message.key.as_deref().map(|key| node_of(shared, key));
            let group = groups.entry(node).or_default();
            group.0.push(index);
            group.1.push(message);
        }
        // At once: a node that is away holds up no other's.
        let sends = groups.into_iter().map(|(node, (indexes, messages))| async move {
            (indexes, deliver_together(shared, node, due, &messages).await)
        });
        for (indexes, answer) in join_all(sends).await {
            for (nth, index) in indexes.into_iter().enumerate() {
                results[index] = match &answer {
                    Ok((node, ids)) => ids.get(nth).map_or_else(
                        || Err(Error::new(ErrorKind::Unknown, "deliver later: an id is missing")),
                        |number| Ok(ScheduledId { node: *node, number: *number }),
                    ),
                    Err(error) => Err(error.clone()),
                };
            }
        }
        results
    }

    fn shared(&self) -> Arc<Shared> {
        self.handle.lines.current()
    }
}

impl Cluster {
    /// Takes a message back that waits for its time. False: it is on its way or was sent, was taken
    /// back before, or there never was one of this id.
    ///
    /// # Errors
    /// [`ErrorKind::Unknown`] where the node did not answer: it may have been taken back. It may be
    /// asked again, and false means either then.
    pub async fn cancel(&self, id: ScheduledId) -> Result<bool> {
        let what = format!("take message {id} back");
        let connection = async { self.inner.nodes.node(id.node).await?.get().await };
        let connection = in_time(CANCEL, &what, connection).await?;
        match timeout(CANCEL, outbox::cancel(connection, id.number)).await {
            Ok(Ok(cancelled)) => Ok(cancelled),
            Ok(Err(error)) if is_definite(&error) => Err(explained(error, &what)),
            Ok(Err(error)) => Err(Error::with_source(ErrorKind::Unknown, what, error)),
            Err(_) => Err(Error::new(ErrorKind::Unknown, format!("{what}: no answer in time"))),
        }
    }
}

fn one(results: Vec<Result<ScheduledId>>) -> Result<ScheduledId> {
    let missing = || Err(Error::new(ErrorKind::Unknown, "deliver later: no answer"));
    results.into_iter().next().unwrap_or_else(missing)
}

/// A dedup key is known in the partition alone, and when it is too late for an answer.
fn check(message: &Message, shared: &Shared) -> Result<()> {
    if message.dedup_key.is_some() {
        let why = "a message with a dedup key can't be published in a transaction, nor delayed";
        return Err(Error::invalid(why));
    }
    message.check(shared.options.max_payload)
}

fn check_open(shared: &Shared) -> Result<()> {
    let is_closed = shared.closed.load(Ordering::Acquire) || shared.budget.is_closed();
    if is_closed { Err(shared.why_closed()) } else { Ok(()) }
}

fn check_all(shared: &Shared, messages: &[Message]) -> Result<()> {
    check_open(shared)?;
    let (count, bytes) = (messages.len(), messages.iter().map(Message::size).sum::<usize>());
    if count > MAX_DELAYED {
        return Err(Error::invalid(format!(
            "there are {count} messages, the limit is {MAX_DELAYED}"
        )));
    }
    if count > 1 && bytes > MAX_DELAYED_BYTES {
        return Err(Error::invalid(format!(
            "the messages have {bytes} bytes, the limit is {MAX_DELAYED_BYTES}"
        )));
    }
    Ok(())
}

/// The node of a key's partition.
fn node_of(shared: &Shared, key: &str) -> NodeId {
    shared.lane_of(key).partition.node()
}

/// Stores messages for later on one node: that of their key, or any that is up.
async fn deliver_together(
    shared: &Shared,
    node: Option<NodeId>,
    due: Due,
    messages: &[Message],
) -> Result<(NodeId, Vec<i64>)> {
    let limit = shared.options.send_timeout.min(REPEATED);
    let (deadline, began) = (after(Instant::now(), limit), SystemTime::now());
    let mut later = Later {
        shared,
        token: Uuid::now_v7(),
        due,
        arrays: outbox::arrays_of(messages),
        unknown: None,
    };
    let mut backoff = BACKOFF.0;
    loop {
        // Once it may be stored on a node it is asked for there.
        let nodes =
            later.unknown.or(node).map_or_else(|| shared.nodes_by_health(), |node| vec![node]);
        let mut last = None;
        for node in nodes {
            match later.attempt(node).await {
                Ok(ids) => return Ok((node, ids)),
                Err(error) if error.is_transient() || is_of_node(&error) => last = Some(error),
                // It says nothing of an attempt before that had no answer.
                Err(error) if later.unknown.is_some() => {
                    let what = "deliver a message later: it may have been stored before";
                    return Err(Error::with_source(ErrorKind::Unknown, what, error));
                }
                Err(error) => return Err(error),
            }
            if later.unknown.is_some() {
                break;
            }
        }
        let over = Instant::now() + backoff >= deadline;
        if !over {
            sleep(spread(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
        // However long this process was stopped: the monotonic clock stands still in a suspended
        // machine.
        let is_old = began.elapsed().is_ok_and(|elapsed| elapsed >= REPEATED);
        if over || is_old || Instant::now() >= deadline + BACKOFF.1 {
            let seconds = limit.as_secs_f32();
            let kind =
                if later.unknown.is_some() { ErrorKind::Unknown } else { ErrorKind::Timeout };
            let why = format!("deliver a message later: not done within {seconds} s");
            let cause = last.map_or_else(|| "no answer".to_owned(), |error| error.chain());
            return Err(Error::with_source(kind, why, cause));
        }
    }
}

/// Messages that are to be stored for later.
struct Later<'a> {
    shared: &'a Shared,
    token: Uuid,
    due: Due,
    arrays: Arrays,
    /// The node on which they may be stored.
    unknown: Option<NodeId>,
}

impl Later<'_> {
    async fn attempt(&mut self, node: NodeId) -> Result<Vec<i64>> {
        let shared = self.shared;
        let (limit, topic) = (shared.options.append_timeout, &shared.topology.topic);
        let what = format!("store messages for later on node {node}");
        let connection = shared.cluster.inner.nodes.connect(node, limit).await?;
        let stored = outbox::deliver(connection, self.token, topic, self.due, &self.arrays);
        // What is large takes its time on a slow line.
        let limit = with_bytes(limit, self.arrays.bytes);
        match timeout(limit, stored).await {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) if is_definite(&error) => Err(explained(error, &what)),
            Ok(Err(error)) => {
                self.unknown = Some(node);
                Err(Error::with_source(ErrorKind::Unknown, what, error))
            }
            Err(_) => {
                self.unknown = Some(node);
                Err(Error::new(ErrorKind::Unknown, format!("{what}: no answer in time")))
            }
        }
    }
}

fn explained(error: Failed, what: &str) -> Error {
    if kind_of(&error) == ErrorKind::Incompatible {
        let what = format!("{what}: the database has no outbox: run `shardmq migrate --outbox`");
        return Error::with_source(ErrorKind::Incompatible, what, error);
    }
    refused(error, what)
}
