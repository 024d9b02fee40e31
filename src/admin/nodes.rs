//! Looking after nodes: registered, moved to another address, removed.

use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::id::NodeId;
use crate::migrate::{self, Schema};
use crate::store::connect::{self, refused};
use crate::store::node::{Connection, Durability, Node, Unfinished, query, write};
use crate::store::param::Param;
use crate::store::{control, outbox, place, sql};

/// A node as the control database has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its number.
    pub node: NodeId,
    /// Its address, a libpq URL without password.
    pub url: String,
}

impl Cluster {
    /// Registers a database as a node, or changes a node's address. Its schema must be up to date
    /// ([`migrate()`](migrate::migrate)). The password is not stored: every process takes it from
    /// `PGPASSWORD` or its password file. Files that the address names are looked for by every
    /// process on its own machine.
    ///
    /// The primary that answers counts as the right one from then on, also where it is an older one
    /// than was known, as after a restore from a backup. Where the address has several hosts, the
    /// others must be no primary of the same server then.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] where the database is another node already, or another cluster's, or
    /// where it is empty and there is a node of this number.
    pub async fn add_node(&self, node: NodeId, url: &str) -> Result<()> {
        let what = format!("register node {node}");
        let candidate = Node::candidate(url, self.inner.nodes.options(1))?;
        let connection = candidate.get().await?;
        self.refuse_in_place_of(node, &connection).await?;
        let server = place::here_by(&connection).await.map_err(|error| refused(error, &what))?;
        let primary = connection.primary();
        let params: [&dyn Param; 3] = [&self.id(), &i32::from(node.number()), &server];
        write(connection, Durability::Durable, sql::REGISTER_NODE, &params)
            .await
            .map_err(|error| refused(error, &what))?;
        candidate.close();
        // What is there now is compared by the pool's check: a stranger is refused.
        let address = connect::without_password(url)?;
        let check = Node::new(url, self.id(), node, self.inner.nodes.options(1))?;
        drop(check.get().await?);
        check.close();
        // One change: whoever sees the version sees the address.
        let change = Unfinished::new(self.inner.control.get().await?);
        let refused = |error| refused(error, &what);
        let server = place::here_by(change.connection()).await.map_err(refused)?;
        control::begin_change(change.connection()).await.map_err(refused)?;
        control::stand(change.connection(), server).await.map_err(refused)?;
        let added = control::add_node(change.connection(), node, &address, primary).await;
        added.map_err(refused)?;
        control::commit_change(change.connection()).await.map_err(refused)?;
        change.finished();
        self.inner.nodes.refresh().await.map(drop)
    }

    /// Gives a node another address: that of the same database elsewhere, such as a standby that
    /// was promoted. Running clients use it within about 5 s.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no node of this number, [`ErrorKind::Conflict`] where
    /// the address leads to something else; the message says to what.
    pub async fn replace_node(&self, node: NodeId, url: &str) -> Result<()> {
        self.refuse_unknown(node).await?;
        self.add_node(node, url).await
    }

    /// Forgets a node that has no partitions. Its database stays as it is, but is nobody's node any
    /// more, where it can be reached.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no node of this number, [`ErrorKind::Conflict`] where
    /// it has partitions, or messages wait on it for their time or for a relay; the message names
    /// the topics, or says how many wait. A node that can't be reached is not asked.
    pub async fn remove_node(&self, node: NodeId) -> Result<()> {
        self.refuse_unknown(node).await?;
        let what = format!("remove node {node}");
        let refused = |error| refused(error, &what);
        // While it is known: afterwards nobody finds it.
        let reached = self.inner.nodes.node(node).await?.get().await;
        if let Ok(connection) = &reached {
            refuse_waiting(connection, node).await?;
        }
        let change = Unfinished::new(self.inner.control.get().await?);
        control::begin_change(change.connection()).await.map_err(refused)?;
        let topics = control::topics_on(change.connection(), node).await.map_err(refused)?;
        if !topics.is_empty() {
            control::give_change_up(change.connection()).await.map_err(refused)?;
            change.finished();
            let what = format!("node {node} has partitions of {}", topics.join(", "));
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        control::forget_node(change.connection(), node).await.map_err(refused)?;
        control::commit_change(change.connection()).await.map_err(refused)?;
        change.finished();
        if let Ok(connection) = reached {
            let params: [&dyn Param; 2] = [&self.id(), &i32::from(node.number())];
            write(connection, Durability::Durable, sql::UNREGISTER_NODE, &params)
                .await
                .map_err(refused)?;
        }
        self.inner.nodes.refresh().await.map(drop)
    }

    async fn refuse_unknown(&self, node: NodeId) -> Result<()> {
        if self.inner.nodes.refresh().await?.iter().any(|(known, _)| *known == node) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, format!("node {node} is not registered")))
    }

    /// An empty database in the place of a node would hide all that the node has.
    async fn refuse_in_place_of(&self, node: NodeId, candidate: &Connection) -> Result<()> {
        let what = format!("register node {node}");
        let known = self.inner.nodes.refresh().await?.iter().any(|(id, _)| *id == node);
        let found = query(candidate, sql::IDENTITY, &[]).await.map_err(|e| refused(e, &what))?;
        if known && found.is_empty() {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "node {node} is registered already, and this database is not it: it is empty"
                ),
            ));
        }
        Ok(())
    }

    /// Registers a database that has an outbox and is no node, so that all processes with
    /// [upkeep](crate::ClusterBuilder::upkeep) relay from it. Its schema must be there
    /// ([`migrate()`](migrate::migrate) with [`Schema::Outbox`]). As of nodes, the password is not
    /// stored. Idempotent.
    ///
    /// # Errors
    /// [`ErrorKind::Incompatible`] where the database has no outbox.
    pub async fn add_outbox(&self, url: &str) -> Result<()> {
        let what = "register a database with an outbox";
        let single = connect::connect_once(url, "shardmq outbox add").await?;
        migrate::check(single.session(), Schema::Outbox).await?;
        let address = connect::without_password(url)?;
        let refused = |error| refused(error, what);
        let change = Unfinished::new(self.inner.control.get().await?);
        control::begin_change(change.connection()).await.map_err(refused)?;
        control::add_outbox(change.connection(), &address).await.map_err(refused)?;
        control::commit_change(change.connection()).await.map_err(refused)?;
        change.finished();
        self.inner.nodes.refresh().await.map(drop)
    }

    /// Forgets a database that has an outbox and is no node: nobody relays from it any more who was
    /// not told of it otherwise. What waits in it stays. By the address that it was registered
    /// with.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where no database is registered under this address.
    pub async fn remove_outbox(&self, url: &str) -> Result<()> {
        let address = connect::without_password(url)?;
        let refused = |error| refused(error, "forget a database with an outbox");
        let change = Unfinished::new(self.inner.control.get().await?);
        control::begin_change(change.connection()).await.map_err(refused)?;
        let was_there =
            control::remove_outbox(change.connection(), &address).await.map_err(refused)?;
        control::commit_change(change.connection()).await.map_err(refused)?;
        change.finished();
        if !was_there {
            let what = "no outbox is registered under this address";
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        self.inner.nodes.refresh().await.map(drop)
    }

    /// The addresses of databases that have an outbox and are no nodes, without passwords.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where the control database can't be reached.
    pub async fn outboxes(&self) -> Result<Vec<String>> {
        let connection = self.inner.control.get().await?;
        let outboxes = control::outboxes(&connection).await;
        outboxes.map_err(|error| refused(error, "read the databases with an outbox"))
    }

    /// All nodes, by number.
    pub async fn nodes(&self) -> Result<Vec<NodeInfo>> {
        let nodes = self.inner.nodes.refresh().await?;
        Ok(nodes.into_iter().map(|(node, url)| NodeInfo { node, url }).collect())
    }
}

/// What waits on a node that is none any more is relayed by nobody.
async fn refuse_waiting(connection: &Connection, node: NodeId) -> Result<()> {
    let what = format!("look for messages that wait on node {node}");
    let left = match outbox::left(connection).await {
        Ok(left) => left,
        // It was never migrated so far.
        Err(error) if connect::kind_of(&error) == ErrorKind::Incompatible => 0,
        Err(error) => return Err(refused(error, &what)),
    };
    if left == 0 {
        return Ok(());
    }
    let why = format!("{left} messages wait on node {node}, to be relayed or for their time");
    Err(Error::new(ErrorKind::Conflict, why))
}
