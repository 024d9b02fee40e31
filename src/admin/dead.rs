//! Dead letters: looking at them, giving them to their group again, dropping them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_postgres::Row;

use crate::admin::StoredMessage;
use crate::admin::groups::ANSWER;
use crate::admin::rows::read_message;
use crate::cluster::Cluster;
use crate::deadline::in_time;
use crate::error::{Error, ErrorKind, Result};
use crate::failure::FailedAttempt;
use crate::id::{NodeId, PartitionId};
use crate::name::{GroupName, TopicName};
use crate::store::connect::refused;
use crate::store::dead::{self, Chosen, What};
use crate::store::group_admin;

/// How many letters the first transaction moves, and at most.
const PORTION: (i32, i32) = (100, 500);
/// How long it shall take. The next one moves fewer where they were large, or hard to find.
const PORTION_TIME: Duration = Duration::from_secs(1);
/// How long it may take.
const PORTION_LIMIT: Duration = Duration::from_mins(1);
/// The most bytes of a node's part of a list, over the first letter.
const LIST_BYTES: i64 = 16 << 20;

/// The number of a dead letter: `01-42` is the 42nd of node 01.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeadLetterId {
    /// The node that it is on.
    pub node: NodeId,
    /// Its number there, from 1.
    pub number: i64,
}

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.node, self.number)
    }
}

impl FromStr for DeadLetterId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('-').and_then(|(node, number)| {
            let number = number.parse().ok().filter(|number| *number > 0)?;
            Some(Self { node: node.parse().ok()?, number })
        });
        let wrong = || Error::invalid(format!("{text:?} is no dead letter: they look like 01-42"));
        parts.ok_or_else(wrong)
    }
}

/// A message that a group has given up.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadLetter {
    /// Its number.
    pub id: DeadLetterId,
    /// The group that has given it up. Others are not concerned.
    pub group: GroupName,
    /// A copy of the message; the original may be dropped by now.
    pub message: StoredMessage,
    /// The message could not be read where it is stored: this has no key, headers and payload of
    /// it. The last failure says why.
    pub unread: bool,
    /// When the group got it for the first time.
    pub first_seen: SystemTime,
    /// When it was given up.
    pub died_at: SystemTime,
    /// How often it was tried, since it was sent or given to the group again.
    pub attempts: u32,
    /// The attempts that failed, with time and error, oldest first: of more than 16 the first and
    /// last eight. Those of before it was given to the group again are told too.
    pub failures: Vec<FailedAttempt>,
}

/// Which dead letters: those that meet every condition that is set; all where none is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterFilter {
    /// These, and none where the list is empty.
    pub ids: Option<Vec<DeadLetterId>>,
    /// Of this topic.
    pub topic: Option<TopicName>,
    /// Of this group.
    pub group: Option<GroupName>,
    /// Of this partition.
    pub partition: Option<PartitionId>,
    /// Whose last error has this text in it.
    pub error: Option<String>,
}

/// A list of dead letters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeadLetters {
    /// By node and number.
    pub letters: Vec<DeadLetter>,
    /// Whether there may be more, behind the last of these.
    pub more: bool,
    /// Nodes that did not answer.
    pub unreachable: Vec<NodeId>,
}

/// What was done with many.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLettersMoved {
    /// How many were given to their group again, or dropped.
    pub moved: u64,
    /// How many were not given to their group again, since their message still can't be read. They
    /// stay until it can, or until they are dropped.
    pub unread: u64,
    /// Nodes that did not answer, or not to the end: call it again.
    pub unreachable: Vec<NodeId>,
}

impl Cluster {
    /// Dead letters by node and number, behind one (none: from the first), at most so many; fewer
    /// where they are large. Nodes that do not answer are named.
    pub async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<DeadLetterId>,
        most: u32,
    ) -> Result<DeadLetters> {
        let mut nodes = self.nodes_of(filter);
        nodes.retain(|node| after.is_none_or(|after| *node >= after.node));
        let most = most.min(10_000);
        let asked = nodes.iter().map(|node| {
            let number = after.filter(|after| after.node == *node).map_or(0, |after| after.number);
            self.dead_letters_on(*node, filter, number, most)
        });
        let mut list = DeadLetters::default();
        for (node, answer) in nodes.iter().zip(join_all(asked).await) {
            match answer {
                // What follows a node that has more to tell comes behind all that it has.
                Ok(_) if list.more => {}
                Ok((letters, more)) => {
                    list.letters.extend(letters);
                    list.more = more;
                }
                Err(error) => self.note_unreachable(*node, error, &mut list.unreachable)?,
            }
        }
        let most = most as usize;
        list.more |= list.letters.len() > most;
        list.letters.truncate(most);
        Ok(list)
    }

    /// One dead letter; none where there is none of that number.
    pub async fn dead_letter(&self, id: DeadLetterId) -> Result<Option<DeadLetter>> {
        let filter = DeadLetterFilter { ids: Some(vec![id]), ..DeadLetterFilter::default() };
        let (letters, _) = self.dead_letters_on(id.node, &filter, 0, 1).await?;
        Ok(letters.into_iter().next())
    }

    /// Gives dead letters to their groups again, and to no other: each is delivered by the
    /// library's consumer that has its partition (not by one that uses SQL), in no order with
    /// others, its attempts counted anew; if it fails to the end it is a dead letter again. Those
    /// that die after this was called are not taken up again. Letters of groups that are gone stay.
    /// Of a letter without payload the message is read again; where that fails the letter stays,
    /// which [`DeadLettersMoved::unread`] tells.
    ///
    /// In portions of a transaction each; told is how many it is by now. Where this is cut off, or
    /// its future dropped, what was done stays done: call it again for the rest.
    pub async fn retry_dead_letters(
        &self,
        filter: &DeadLetterFilter,
        progress: impl FnMut(u64) + Send,
    ) -> Result<DeadLettersMoved> {
        self.move_dead_letters(What::Retry, filter, progress).await
    }

    /// Drops dead letters, for good. In portions, like
    /// [`retry_dead_letters`](Self::retry_dead_letters).
    pub async fn drop_dead_letters(
        &self,
        filter: &DeadLetterFilter,
        progress: impl FnMut(u64) + Send,
    ) -> Result<DeadLettersMoved> {
        self.move_dead_letters(What::Drop, filter, progress).await
    }

    async fn move_dead_letters(
        &self,
        what: What,
        filter: &DeadLetterFilter,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<DeadLettersMoved> {
        let mut all = DeadLettersMoved::default();
        for node in self.nodes_of(filter) {
            let mut count = |count| {
                all.moved += count;
                progress(all.moved);
            };
            match self.move_on(node, what, filter, &mut count).await {
                Ok(unread) => all.unread += unread,
                Err(error) => self.note_unreachable(node, error, &mut all.unreachable)?,
            }
        }
        Ok(all)
    }

    async fn move_on(
        &self,
        node: NodeId,
        what: What,
        filter: &DeadLetterFilter,
        progress: &mut (impl FnMut(u64) + Send),
    ) -> Result<u64> {
        let text = format!("move dead letters of node {node}");
        let chosen = chosen(filter, node);
        let until = in_time(ANSWER, &text, async {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            dead::clock(&connection).await.map_err(|error| refused(error, &text))
        });
        let until = until.await?;
        let mut most = PORTION.0;
        loop {
            let begun = Instant::now();
            let portion = in_time(PORTION_LIMIT, &text, async {
                let connection = self.inner.nodes.node(node).await?.get().await?;
                let moved = dead::portion(connection, what, &chosen, until, most).await;
                moved.map_err(|error| refused(error, &text))
            });
            let groups = portion.await?;
            if groups.is_empty() && what == What::Drop {
                return Ok(0);
            } else if groups.is_empty() {
                return self.count_unread(node, &chosen, until).await;
            }
            most = if begun.elapsed() > PORTION_TIME { most / 4 } else { most * 2 };
            most = most.clamp(1, PORTION.1);
            progress(groups.iter().map(|(.., count)| count.unsigned_abs()).sum());
            if what == What::Retry {
                self.tell_of_retries(&groups).await;
            }
        }
    }

    async fn count_unread(&self, node: NodeId, chosen: &Chosen, until: SystemTime) -> Result<u64> {
        let what = format!("count dead letters without payload of node {node}");
        in_time(ANSWER, &what, async {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let count = dead::count_unread(&connection, chosen, until).await;
            count.map(i64::unsigned_abs).map_err(|error| refused(error, &what))
        })
        .await
    }

    /// Consumers that hear of it fetch at once, the others when they next renew their leases.
    async fn tell_of_retries(&self, groups: &[(String, String, i64)]) {
        let what = "tell groups of their dead letters";
        let told = in_time(ANSWER, what, async {
            for (topic, group, _) in groups {
                let (topic, group) = (TopicName::new(topic)?, GroupName::new(group)?);
                let connection = self.inner.control.get().await?;
                let told = group_admin::tell(connection, &topic, &group).await;
                told.map_err(|error| refused(error, what))?;
            }
            Ok(())
        });
        if let Err(error) = told.await {
            tracing::debug!(error = %error.chain(), "consumers see it when they renew");
        }
    }

    async fn dead_letters_on(
        &self,
        node: NodeId,
        filter: &DeadLetterFilter,
        after: i64,
        most: u32,
    ) -> Result<(Vec<DeadLetter>, bool)> {
        let what = format!("read dead letters of node {node}");
        let asked = i32::try_from(most).unwrap_or(i32::MAX).saturating_add(1);
        let rows = in_time(ANSWER, &what, async {
            let connection = self.inner.nodes.node(node).await?.get().await?;
            let bounds = (after, asked, LIST_BYTES);
            let rows = dead::list(&connection, &chosen(filter, node), bounds).await;
            rows.map_err(|error| refused(error, &what))
        });
        let rows = rows.await?;
        let counted = usize::try_from(most).unwrap_or(usize::MAX);
        let bytes: usize = rows.iter().map(payload_len).sum();
        let more = rows.len() > counted || i64::try_from(bytes).unwrap_or(i64::MAX) >= LIST_BYTES;
        let letters = rows.iter().take(counted).map(|row| read(node, row));
        Ok((letters.collect::<Result<_>>()?, more))
    }

    /// The nodes that have some of them.
    fn nodes_of(&self, filter: &DeadLetterFilter) -> Vec<NodeId> {
        let mut nodes = self.inner.nodes.known();
        if let Some(partition) = filter.partition {
            nodes.retain(|node| *node == partition.node());
        }
        if let Some(ids) = &filter.ids {
            nodes.retain(|node| ids.iter().any(|id| id.node == *node));
        }
        nodes.sort_unstable();
        nodes
    }

    fn note_unreachable(&self, node: NodeId, error: Error, to: &mut Vec<NodeId>) -> Result<()> {
        if !matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unknown | ErrorKind::Timeout)
        {
            return Err(error);
        }
        let cluster = self.id();
        tracing::warn!(%node, %cluster, error = %error.chain(), "a node's dead letters are not told");
        to.push(node);
        Ok(())
    }
}

fn chosen(filter: &DeadLetterFilter, node: NodeId) -> Chosen {
    let here = |ids: &Vec<DeadLetterId>| {
        ids.iter().filter(|id| id.node == node).map(|id| id.number).collect()
    };
    Chosen {
        ids: filter.ids.as_ref().map(here),
        topic: filter.topic.as_ref().map(ToString::to_string),
        group: filter.group.as_ref().map(ToString::to_string),
        partition: filter.partition.map(PartitionId::as_i32),
        error: filter.error.clone(),
    }
}

/// The bytes of a payload that counts for a list.
fn payload_len(row: &Row) -> usize {
    row.try_get::<_, Option<&[u8]>>(6).ok().flatten().map_or(0, <[u8]>::len)
}

fn read(node: NodeId, row: &Row) -> Result<DeadLetter> {
    let odd = |error| refused(error, &format!("read a dead letter of node {node}"));
    let number = row.try_get(8).map_err(odd)?;
    let failures: &str = row.try_get(13).map_err(odd)?;
    // A letter whose history is odd is listed all the same.
    let failures = serde_json::from_str(failures).unwrap_or_else(|error| {
        vec![FailedAttempt::new(0, &format!("what was tried can't be read: {error}"))]
    });
    Ok(DeadLetter {
        id: DeadLetterId { node, number },
        group: GroupName::new(row.try_get(9).map_err(odd)?)?,
        message: read_message(row)?,
        unread: row.try_get::<_, Option<&[u8]>>(6).map_err(odd)?.is_none(),
        first_seen: row.try_get(10).map_err(odd)?,
        died_at: row.try_get(11).map_err(odd)?,
        attempts: u32::try_from(row.try_get::<_, i32>(12).map_err(odd)?).unwrap_or(0),
        failures,
    })
}
