//! Which notifier a process has: what its builder says, else its environment, else the cluster.

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::cluster::Nodes;
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::notifier::{NoNotifier, Notifier, NotifierKind, PostgresNotifier};

/// The names of the cluster's settings.
pub(crate) const NOTIFIER: &str = "notifier";
pub(crate) const REDIS_URL: &str = "redis_url";

/// Where to listen to a node, in place of its own address.
pub(crate) fn listen_url_of(node: NodeId) -> String {
    format!("listen_url_{node}")
}

/// Where to listen to nodes: what the builder was told goes before what the cluster says.
pub(super) fn listen_urls(
    told: HashMap<NodeId, String>,
    settings: &BTreeMap<String, String>,
    nodes: impl Iterator<Item = NodeId>,
) -> HashMap<NodeId, String> {
    let of_cluster = |node| settings.get(&listen_url_of(node)).map(|url| (node, url.clone()));
    nodes.filter_map(of_cluster).chain(told).collect()
}

/// What the builder was told.
#[derive(Default)]
pub(super) struct Told {
    pub(super) own: Option<Arc<dyn Notifier>>,
    pub(super) kind: Option<NotifierKind>,
    pub(super) redis_url: Option<String>,
}

/// What is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chosen {
    kind: NotifierKind,
    redis_url: Option<String>,
    /// The cluster's setting, and not this process' own.
    is_cluster_s: bool,
}

/// What a process shares with its notifier.
pub(super) struct Means {
    /// Whose channels of a Redis these are.
    #[cfg_attr(not(feature = "redis"), allow(dead_code))]
    pub(super) cluster: Uuid,
    pub(super) nodes: Arc<Nodes>,
    pub(super) shutdown: CancellationToken,
    pub(super) tasks: TaskTracker,
    pub(super) hint_interval: Duration,
}

impl Told {
    /// The notifier of this process. Nothing is connected yet.
    pub(super) fn make(
        self,
        settings: &BTreeMap<String, String>,
        means: Means,
    ) -> Result<Arc<dyn Notifier>> {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let redis_url = self.redis_url.or_else(|| variable("SHARDMQ_REDIS_URL"));
        if let Some(own) = self.own {
            return Ok(own);
        }
        let kind = match (self.kind, variable("SHARDMQ_NOTIFIER")) {
            (Some(kind), _) => Some(kind),
            (None, Some(name)) => Some(name.parse()?),
            (None, None) => None,
        };
        means.make(&choose(kind, redis_url, settings)?)
    }
}

/// An address says where, and not whether: processes that are told of a Redis and others must have a notifier in
/// common. What the cluster says is no reason not to work at all.
fn choose(
    told: Option<NotifierKind>,
    redis_url: Option<String>,
    settings: &BTreeMap<String, String>,
) -> Result<Chosen> {
    let has_own = redis_url.is_some();
    let redis_url = redis_url.or_else(|| settings.get(REDIS_URL).cloned());
    let kind = match (told, settings.get(NOTIFIER)) {
        (Some(kind), _) => kind,
        (None, Some(name)) => of_cluster(name, redis_url.is_some()),
        (None, None) if has_own => NotifierKind::Both,
        (None, None) => NotifierKind::default(),
    };
    if kind.needs_redis() && redis_url.is_none() {
        let what = format!(
            "notifier {kind}: where is the Redis? ClusterBuilder::redis_url, SHARDMQ_REDIS_URL or the cluster's \
             setting says so"
        );
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(Chosen { kind, redis_url, is_cluster_s: told.is_none() && !has_own })
}

fn of_cluster(name: &str, has_redis: bool) -> NotifierKind {
    let wrong = match name.parse::<NotifierKind>() {
        Ok(kind) if has_redis || !kind.needs_redis() => return kind,
        Ok(_) => "the cluster's setting lacks the Redis that it needs",
        Err(_) => "the cluster's setting is none that this version knows",
    };
    tracing::error!(notifier = name, "{wrong}");
    NotifierKind::Postgres
}

impl Means {
    fn make(self, chosen: &Chosen) -> Result<Arc<dyn Notifier>> {
        match chosen.kind {
            NotifierKind::Postgres => Ok(Arc::new(self.postgres())),
            NotifierKind::None => Ok(Arc::new(NoNotifier::new())),
            NotifierKind::Redis | NotifierKind::Both => self.redis(chosen),
        }
    }

    fn postgres(self) -> PostgresNotifier {
        PostgresNotifier::new(self.nodes, self.shutdown, self.tasks, self.hint_interval)
    }

    #[cfg(feature = "redis")]
    fn redis(self, chosen: &Chosen) -> Result<Arc<dyn Notifier>> {
        use crate::notifier::{Both, RedisNotifier};
        let url = chosen.redis_url.as_deref().unwrap_or_default();
        let redis = match RedisNotifier::new(url, &prefix(self.cluster)) {
            Ok(redis) => redis,
            Err(error) if chosen.is_cluster_s => {
                tracing::error!(error = %error.chain(), "the cluster's Redis");
                return Ok(Arc::new(self.postgres()));
            }
            Err(error) => return Err(error),
        };
        Ok(match chosen.kind {
            NotifierKind::Both => Arc::new(Both::new(self.postgres(), redis)),
            _ => Arc::new(redis),
        })
    }

    /// What the cluster says is no reason not to work at all.
    #[cfg(not(feature = "redis"))]
    fn redis(self, chosen: &Chosen) -> Result<Arc<dyn Notifier>> {
        let Chosen { kind, is_cluster_s, .. } = *chosen;
        let what =
            format!("notifier {kind}: this program was built without feature `redis` of shardmq");
        if !is_cluster_s {
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        tracing::error!("{what}, so hints through Redis are neither sent nor heard");
        Ok(match kind {
            NotifierKind::Both => Arc::new(self.postgres()),
            _ => Arc::new(NoNotifier::new()),
        })
    }
}

/// What the channels of a cluster begin with.
#[cfg(feature = "redis")]
pub(crate) fn prefix(cluster: Uuid) -> String {
    format!("shardmq:{}", cluster.simple())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        kind: Option<NotifierKind>,
        url: Option<&str>,
        settings: &[(&str, &str)],
    ) -> Result<(NotifierKind, Option<String>)> {
        let settings = settings.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        choose(kind, url.map(str::to_owned), &settings).map(|c| (c.kind, c.redis_url))
    }

    #[test]
    fn a_process_may_have_another_than_the_cluster() {
        use NotifierKind::{Both, None as Nothing, Postgres, Redis};
        let cluster: &[_] = &[(NOTIFIER, "both"), (REDIS_URL, "redis://cluster")];
        let url = |host: &str| Some(format!("redis://{host}"));
        for (kind, own, settings, expected) in [
            (None, None, &[][..], (Postgres, None)),
            (None, None, cluster, (Both, url("cluster"))),
            (None, Some("redis://own"), &[], (Both, url("own"))),
            (None, Some("redis://own"), cluster, (Both, url("own"))),
            (None, Some("redis://own"), &[(NOTIFIER, "postgres")], (Postgres, url("own"))),
            // What the cluster has wrong, or what is of a later version.
            (None, None, &[(NOTIFIER, "both")], (Postgres, None)),
            (None, None, &[(NOTIFIER, "kafka")], (Postgres, None)),
            (Some(Redis), None, cluster, (Redis, url("cluster"))),
            (Some(Nothing), Some("redis://own"), cluster, (Nothing, url("own"))),
            (Some(Postgres), None, cluster, (Postgres, url("cluster"))),
        ] {
            assert_eq!(chosen(kind, own, settings).unwrap(), expected, "{kind:?} {own:?}");
        }
    }

    #[test]
    fn a_redis_that_nobody_has_named_is_asked_for() {
        let error = chosen(Some(NotifierKind::Redis), None, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
