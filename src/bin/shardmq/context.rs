//! What every command is given.

use std::path::PathBuf;

use shardmq::notifier::NotifierKind;
use shardmq::{Cluster, ClusterBuilder};

use crate::failure::{Failure, USAGE};

/// The arguments that all commands share.
pub(crate) struct Context {
    pub(crate) url: Option<String>,
    pub(crate) topology_file: Option<PathBuf>,
    pub(crate) redis_url: Option<String>,
    /// It was given with the command, and not by the environment.
    pub(crate) redis_url_is_argument: bool,
    pub(crate) json: bool,
}

impl Context {
    /// The control database's address.
    pub(crate) fn url(&self) -> Result<&str, Failure> {
        self.url.as_deref().filter(|url| !url.is_empty()).ok_or_else(|| {
            let text = "which control database? Give --url, or set SHARDMQ_URL";
            Failure::new(USAGE, text)
        })
    }

    /// The cluster of the control database.
    pub(crate) async fn connect(&self) -> Result<Cluster, Failure> {
        let mut builder = self.builder()?;
        if let Some(url) = &self.redis_url {
            builder = builder.redis_url(url);
        }
        Ok(builder.connect().await?)
    }

    /// The same, with another notifier than it would have.
    pub(crate) async fn connect_by(&self, kind: NotifierKind) -> Result<Cluster, Failure> {
        Ok(self.builder()?.notifier_kind(kind).connect().await?)
    }

    fn builder(&self) -> Result<ClusterBuilder, Failure> {
        let mut builder = Cluster::builder(self.url()?);
        if let Some(path) = &self.topology_file {
            builder = builder.topology_file(path);
        }
        Ok(builder)
    }
}
