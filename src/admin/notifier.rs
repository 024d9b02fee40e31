//! How hints travel: the cluster's setting, and whether they arrive here.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::cluster::{Cluster, NOTIFIER, REDIS_URL, listen_url_of};
use crate::consumer::NodeHints;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{NodeId, PartitionId};
use crate::notifier::{HealthState, Hint, Notifier, NotifierKind};
use crate::store::connect::{connect_directly, refused, without_password};
use crate::store::control;
use crate::store::node::{Node, Unfinished};

/// How long a canary is waited for.
const HEARD: Duration = Duration::from_secs(5);

/// Which notifier processes of a cluster have that are not told otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NotifierSetting {
    /// Which.
    pub notifier: NotifierKind,
    /// Where the Redis is, without its password; none where none was set.
    pub redis_url: Option<String>,
}

impl Cluster {
    /// Which notifier processes have that are not told otherwise, as the control database has it now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where the control database can't be reached.
    pub async fn notifier_setting(&self) -> Result<NotifierSetting> {
        let notifier = self.setting(NOTIFIER).await?;
        let notifier = notifier.map_or(Ok(NotifierKind::default()), |name| name.parse())?;
        Ok(NotifierSetting { notifier, redis_url: self.setting(REDIS_URL).await? })
    }

    async fn setting(&self, name: &str) -> Result<Option<String>> {
        let connection = self.inner.control.get().await?;
        let settings = control::settings(&connection).await;
        let settings = settings.map_err(|error| refused(error, "read the settings"))?;
        Ok(settings.get(name).cloned())
    }

    /// Sets which notifier processes have that are not told otherwise, and where its Redis is, if it needs one;
    /// without an address that stays as it was set, and is tried again. Processes have it when they connect
    /// next. Producers and consumers must have one in common: to move from one to another, set
    /// [`NotifierKind::Both`] first, restart all, then set the other.
    ///
    /// The password is not stored: every process takes it from `SHARDMQ_REDIS_PASSWORD`, or has an address
    /// of its own in `SHARDMQ_REDIS_URL`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the address is none, or is needed and missing;
    /// [`ErrorKind::Unavailable`] where no canary comes back through that Redis within 5 s. Nothing is set
    /// then.
    pub async fn set_notifier(&self, kind: NotifierKind, redis_url: Option<&str>) -> Result<()> {
        let address = if kind.needs_redis() {
            let stored = self.setting(REDIS_URL).await?;
            let url = redis_url.or(stored.as_deref()).ok_or_else(|| {
                let what = format!("notifier {kind}: the address of a Redis is needed");
                Error::new(ErrorKind::Invalid, what)
            })?;
            Some(self.tried(url).await?)
        } else {
            None
        };
        let what = |error| refused(error, "set the notifier");
        let change = Unfinished::new(self.inner.control.get().await?);
        control::begin_change(change.connection()).await.map_err(what)?;
        control::set(change.connection(), NOTIFIER, &kind.to_string()).await.map_err(what)?;
        if let Some(address) = address {
            control::set(change.connection(), REDIS_URL, &address).await.map_err(what)?;
        }
        control::commit_change(change.connection()).await.map_err(what)?;
        change.finished();
        Ok(())
    }

    /// Sets where processes listen for a node's hints that are not told otherwise
    /// ([`ClusterBuilder::listen_url`](crate::ClusterBuilder::listen_url)), where the node's own address leads
    /// to a pooler in transaction mode; with none, at its own address again. Processes have it when they
    /// connect next. As of nodes, the password is not stored.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no node of this number, [`ErrorKind::Conflict`] where the
    /// address leads to another database, [`ErrorKind::Invalid`] where it leads to a pooler too.
    pub async fn set_listen_url(&self, node: NodeId, url: Option<&str>) -> Result<()> {
        if !self.nodes().await?.iter().any(|info| info.node == node) {
            return Err(Error::new(ErrorKind::NotFound, format!("node {node} is not registered")));
        }
        let address = match url {
            Some(url) => Some(self.checked(node, url).await?),
            None => None,
        };
        let what = |error| refused(error, "set where to listen");
        let change = Unfinished::new(self.inner.control.get().await?);
        control::begin_change(change.connection()).await.map_err(what)?;
        let name = listen_url_of(node);
        match address {
            Some(url) => control::set(change.connection(), &name, &url).await.map_err(what)?,
            None => control::unset(change.connection(), &name).await.map_err(what)?,
        }
        control::commit_change(change.connection()).await.map_err(what)?;
        change.finished();
        Ok(())
    }

    /// An address to be stored, which leads to the node.
    async fn checked(&self, node: NodeId, url: &str) -> Result<String> {
        let own = Node::new(url, self.inner.id, node, self.inner.nodes.options(1))?;
        let reached = own.get().await.map(drop);
        own.close();
        reached?;
        connect_directly(url, "shardmq").await?;
        without_password(url)
    }

    /// An address to be stored, of a Redis through which hints come.
    #[cfg(feature = "redis")]
    async fn tried(&self, url: &str) -> Result<String> {
        use crate::cluster::prefix;
        use crate::notifier::{RedisNotifier, redis_without_password};
        let address = redis_without_password(url)?;
        let redis = RedisNotifier::new(url, &prefix(self.inner.id))?;
        let node = NodeId::new(1)?;
        let heard = hear(&redis, node).await?;
        redis.shutdown().await;
        match heard.health.error {
            Some(error) => Err(Error::new(ErrorKind::Unavailable, error)),
            None => Ok(address),
        }
    }

    #[cfg(not(feature = "redis"))]
    #[allow(clippy::unused_async, clippy::unused_self)]
    async fn tried(&self, _: &str) -> Result<String> {
        let what = "this program was built without feature `redis` of shardmq";
        Err(Error::new(ErrorKind::Invalid, what))
    }

    /// Whether hints of each node arrive in this process, by its own notifier: subscribes to each, and waits
    /// for a canary for at most 5 s. In the order of the nodes.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where the control database can't be reached.
    pub async fn notifier_health(&self) -> Result<Vec<NodeHints>> {
        let nodes = self.nodes().await?;
        let heard = nodes.iter().map(|info| hear(&*self.inner.notifier, info.node));
        join_all(heard).await.into_iter().collect()
    }
}

/// Subscribes to a node for as long as it takes to hear that hints arrive, by both where there are two.
async fn hear(notifier: &dyn Notifier, node: NodeId) -> Result<NodeHints> {
    let mut hints = notifier.subscribe(&[PartitionId::new(node.number(), 1)?]);
    let mut arrives = false;
    let arrive = async {
        // What can't arrive as things are set is not waited for: no hint tells of that.
        while notifier.health(node).state != HealthState::Polling {
            let hint = timeout(HEARD / 50, hints.next()).await;
            arrives |= matches!(hint, Ok(Some(Hint::Look)));
            if arrives && notifier.health(node).error.is_none() {
                return;
            }
        }
    };
    let arrive = timeout(HEARD, arrive).await;
    let mut health = notifier.health(node);
    if arrive.is_err() && health.error.is_none() {
        health.error = Some(format!("no canary came back within {HEARD:?}"));
    }
    Ok(NodeHints { node, health })
}
