//! Where this process is seen by others: its listening sessions have its name. Where one is gone, and
//! nothing else is heard of the process, it has died.

use std::collections::BTreeSet;

use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use crate::id::NodeId;

/// News of groups that a slow consumer may be behind; who is further behind looks.
const CAPACITY: usize = 256;

/// A database in which this process may listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Control,
    Node(NodeId),
}

/// This process' listening sessions, and what it hears of groups.
#[derive(Debug)]
pub(crate) struct Presence {
    process: Uuid,
    listening: watch::Sender<BTreeSet<Place>>,
    groups: broadcast::Sender<Option<String>>,
}

impl Presence {
    pub(super) fn new() -> Self {
        Self {
            process: Uuid::new_v4(),
            listening: watch::Sender::default(),
            groups: broadcast::channel(CAPACITY).0,
        }
    }

    /// The `application_name` of the session that listens at a place.
    pub(crate) fn name(&self, place: Place) -> String {
        let what = match place {
            Place::Control => "topology",
            Place::Node(_) => "listen",
        };
        format!("shardmq {what} {}", self.process.simple())
    }

    /// The same, where there is a session now.
    pub(crate) fn session(&self, place: Place) -> Option<String> {
        self.is_at(place).then(|| self.name(place))
    }

    pub(crate) fn is_at(&self, place: Place) -> bool {
        self.listening.borrow().contains(&place)
    }

    /// Changes when a session begins or ends anywhere.
    pub(crate) fn changes(&self) -> watch::Receiver<BTreeSet<Place>> {
        self.listening.subscribe()
    }

    /// A session listens from now on, until the guard is dropped.
    pub(crate) fn arrive(&self, place: Place) -> Present<'_> {
        self.listening.send_modify(|places| {
            places.insert(place);
        });
        Present { presence: self, place }
    }

    /// What the control database tells of groups, as `topic group`; none: look at all.
    pub(crate) fn group_news(&self) -> broadcast::Receiver<Option<String>> {
        self.groups.subscribe()
    }

    pub(super) fn tell_groups(&self, news: Option<&str>) {
        // An error says that nobody consumes here.
        let _ = self.groups.send(news.map(str::to_owned));
    }
}

/// A session that listens.
pub(crate) struct Present<'a> {
    presence: &'a Presence,
    place: Place,
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.presence.listening.send_modify(|places| {
            places.remove(&self.place);
        });
    }
}
