//! Which notifier a process has: what its builder says, else its environment, else the cluster.

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::cluster::Nodes;
use crate::error::{Error, ErrorKind, Result};
use crate::notifier::{NoNotifier, Notifier, NotifierKind, PostgresNotifier};

/// The names of the cluster's settings.
pub(crate) const NOTIFIER: &str = "notifier";
pub(crate) const REDIS_URL: &str = "redis_url";

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
}

impl Told {
    /// The notifier of this process. Nothing is connected yet.
    pub(super) fn make(
        self,
        settings: &BTreeMap<String, String>,
        means: Means,
    ) -> Result<Arc<dyn Notifier>> {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let kind = match (self.kind, variable("SHARDMQ_NOTIFIER")) {
            (Some(kind), _) => Some(kind),
            (None, Some(name)) => Some(name.parse()?),
            (None, None) => None,
        };
        let redis_url = self.redis_url.or_else(|| variable("SHARDMQ_REDIS_URL"));
        match self.own {
            Some(own) => Ok(own),
            None => means.make(&choose(kind, redis_url, settings)?),
        }
    }
}

/// A Redis that a process is told of is used, also where the cluster has none.
fn choose(
    kind: Option<NotifierKind>,
    redis_url: Option<String>,
    settings: &BTreeMap<String, String>,
) -> Result<Chosen> {
    let of_cluster: Option<NotifierKind> =
        settings.get(NOTIFIER).map(|name| name.parse()).transpose()?;
    let (is_cluster_s, told) = (kind.is_none() && redis_url.is_none(), redis_url.is_some());
    let kind = kind.unwrap_or_else(|| match of_cluster {
        Some(kind) if kind.needs_redis() || !told => kind,
        _ if told => NotifierKind::Redis,
        _ => NotifierKind::default(),
    });
    let redis_url = redis_url.or_else(|| settings.get(REDIS_URL).cloned());
    if kind.needs_redis() && redis_url.is_none() {
        let what = format!(
            "notifier {kind}: where is the Redis? ClusterBuilder::redis_url, SHARDMQ_REDIS_URL or the cluster's \
             setting says so"
        );
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(Chosen { kind, redis_url, is_cluster_s })
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
        PostgresNotifier::new(self.nodes, self.shutdown, self.tasks)
    }

    #[cfg(feature = "redis")]
    fn redis(self, chosen: &Chosen) -> Result<Arc<dyn Notifier>> {
        use crate::notifier::{Both, RedisNotifier};
        let url = chosen.redis_url.as_deref().unwrap_or_default();
        let redis = RedisNotifier::new(url, &prefix(self.cluster))?;
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
            (None, Some("redis://own"), &[], (Redis, url("own"))),
            (None, Some("redis://own"), cluster, (Both, url("own"))),
            (None, Some("redis://own"), &[(NOTIFIER, "postgres")], (Redis, url("own"))),
            (Some(Redis), None, cluster, (Redis, url("cluster"))),
            (Some(Nothing), Some("redis://own"), cluster, (Nothing, url("own"))),
            (Some(Postgres), None, cluster, (Postgres, url("cluster"))),
        ] {
            assert_eq!(chosen(kind, own, settings).unwrap(), expected, "{kind:?} {own:?}");
        }
    }

    #[test]
    fn a_redis_that_nobody_has_named_is_asked_for() {
        for (kind, settings) in [
            (Some(NotifierKind::Redis), &[][..]),
            (None, &[(NOTIFIER, "both")]),
            (None, &[(NOTIFIER, "kafka")]),
        ] {
            assert_eq!(chosen(kind, None, settings).unwrap_err().kind(), ErrorKind::Invalid);
        }
    }
}
