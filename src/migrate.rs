//! Schemas: making them, bringing them up to date, and refusing what does not fit.
//!
//! Schemas with their own migrations and history table each: `shardmq` on every node,
//! `shardmq_control` and `shardmq_log` in the control and log database (which may be one database,
//! or a node's), and `shardmq_dedup` where a user wants it. The outbox is in `shardmq` too, with a
//! history of its own: on each node, and in any other database that is to have one. Nothing outside
//! of these schemas is touched.
//!
//! Whoever runs refinery for a service's own tables can run these in the same place:
//!
//! ```no_run
//! # async fn example(client: &mut tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! use shardmq::migrate::Schema;
//!
//! client.batch_execute(Schema::Node.prepare_sql()).await?;
//! Schema::Node.runner().run_async(client).await?;
//! Schema::Outbox.runner().run_async(client).await?;
//! # Ok(())
//! # }
//! ```

use refinery::{Report, Runner};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::error::{Error, ErrorKind, Result};
use crate::store::connect;
use crate::store::session::Session;

mod patience;
mod rights;

use patience::{LOCK_TIMEOUT, Patience, is_locked};

mod node {
    refinery::embed_migrations!("migrations/node");
}
mod control {
    refinery::embed_migrations!("migrations/control");
}
mod log {
    refinery::embed_migrations!("migrations/log");
}
mod dedup {
    refinery::embed_migrations!("migrations/dedup");
}
mod outbox {
    refinery::embed_migrations!("migrations/outbox");
}

/// One of the schemas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schema {
    /// `shardmq`: messages, cursors and leases, on each node.
    Node,
    /// `shardmq_control`: topology, groups and members.
    Control,
    /// `shardmq_log`: the log centre.
    Log,
    /// `shardmq_dedup`: messages that were applied, in a database that has the effects of some.
    Dedup,
    /// The outbox, in the schema `shardmq`: messages published in transactions, and delayed ones.
    /// Every node has it too.
    Outbox,
}

impl Schema {
    /// The schema's name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Node | Self::Outbox => "shardmq",
            Self::Control => "shardmq_control",
            Self::Log => "shardmq_log",
            Self::Dedup => "shardmq_dedup",
        }
    }

    /// What must be run before the [`runner`](Self::runner), which keeps its history in the schema.
    pub fn prepare_sql(self) -> &'static str {
        match self {
            Self::Node | Self::Outbox => "create schema if not exists shardmq",
            Self::Control => "create schema if not exists shardmq_control",
            Self::Log => "create schema if not exists shardmq_log",
            Self::Dedup => "create schema if not exists shardmq_dedup",
        }
    }

    /// refinery's runner of this schema's migrations. It takes no lock: use [`migrate`] where
    /// several processes may start at once. A schema that a newer library has migrated further is
    /// left as it is.
    pub fn runner(self) -> Runner {
        let mut runner = match self {
            Self::Node => node::migrations::runner(),
            Self::Control => control::migrations::runner(),
            Self::Log => log::migrations::runner(),
            Self::Dedup => dedup::migrations::runner(),
            Self::Outbox => outbox::migrations::runner(),
        };
        runner.set_migration_table_name(self.table("migration"));
        runner.set_abort_missing(false)
    }

    /// A table that each schema has, by its whole name.
    fn table(self, name: &str) -> String {
        let prefix = if self == Self::Outbox { "outbox_" } else { "" };
        format!("{}.{prefix}{name}", self.name())
    }

    /// The number of the newest migration that this library knows.
    fn version(self) -> i64 {
        let migrations = self.runner();
        migrations.get_migrations().iter().map(|m| i64::from(m.version())).max().unwrap_or(0)
    }
}

/// Brings a schema up to date; that of a node with its outbox. Safe to call in any number of
/// processes at once: they wait for each other. Returns what was done: the names of the migrations
/// that were applied, and that execute was revoked from everybody where a restored dump had given
/// it to them; none where all was done already.
///
/// It may run while the database is in use. A migration waits for a lock for a second at most, so
/// that nobody waits longer behind it, and is tried again for ten minutes in all; who has the lock
/// is logged as a warning. Each migration is a transaction of its own: what was applied stays,
/// whatever fails after it.
///
/// The URL must lead to Postgres itself, since the wait is a session's lock: through a pooler it
/// fails with [`ErrorKind::Invalid`], before anything is done. Fails with
/// [`ErrorKind::Incompatible`] where the schema's oldest library is newer than this, or its
/// functions are everybody's and belong to another role, and with [`ErrorKind::Unavailable`] where
/// a lock was not to be had.
pub async fn migrate(url: &str, schema: Schema) -> Result<Vec<String>> {
    migrate_by(url, schema, schema.runner()).await
}

/// The same with another runner, for tests of migrations that are to come.
#[doc(hidden)]
pub async fn migrate_by(url: &str, schema: Schema, runner: Runner) -> Result<Vec<String>> {
    let what = format!("migrate schema {}", schema.name());
    let refused = |error| connect::refused(error, &what);
    let mut client = connect::connect_directly(url, "shardmq migrate").await?;
    let mut patience = Patience::new(url, &client, &what).await?;
    let lock_timeout = LOCK_TIMEOUT.as_millis();
    let session = format!("{SESSION}; set lock_timeout = {lock_timeout}");
    client.batch_execute(&session).await.map_err(refused)?;
    let lock = "select pg_advisory_lock(1397247313, -1)";
    while let Err(error) = patience.watch(client.batch_execute(lock)).await {
        if !is_locked(&error) {
            return Err(refused(error));
        }
        patience.wait(error).await?;
    }
    let utf8 = client.query_one("show server_encoding", &[]).await.map_err(refused)?;
    if utf8.get::<_, &str>(0) != "UTF8" {
        let found = utf8.get::<_, &str>(0);
        return Err(Error::invalid(format!("the database's encoding is {found}, it must be UTF8")));
    }
    let mut applied = apply(&mut client, schema, &runner, &mut patience, &what).await?;
    if schema == Schema::Node {
        let (outbox, runner) = (Schema::Outbox, Schema::Outbox.runner());
        applied.extend(apply(&mut client, outbox, &runner, &mut patience, &what).await?);
    }
    if matches!(schema, Schema::Node | Schema::Outbox) {
        applied.extend(rights::repair(&client, &what).await?);
    }
    Ok(applied)
}

async fn apply(
    client: &mut Client,
    schema: Schema,
    runner: &Runner,
    patience: &mut Patience,
    what: &str,
) -> Result<Vec<String>> {
    let refused = |error| connect::refused(error, what);
    client.batch_execute(schema.prepare_sql()).await.map_err(refused)?;
    let session = Session::direct(client);
    if table_exists(session, schema, "compatibility").await.map_err(refused)? {
        check_library(session, schema).await?;
    }
    let names = |report: &Report| -> Vec<String> {
        report.applied_migrations().iter().map(ToString::to_string).collect()
    };
    let mut applied = Vec::new();
    loop {
        match patience.watch(runner.run_async(client)).await {
            Ok(report) => {
                applied.extend(names(&report));
                return Ok(applied);
            }
            Err(error) if is_locked(&error) => {
                applied.extend(error.report().map(names).unwrap_or_default());
                patience.wait(error).await?;
            }
            Err(error) => return Err(Error::with_source(ErrorKind::Database, what, error)),
        }
    }
}

/// Settings of a role or database that migrations must not depend on. A statement may run for an
/// hour, as to build an index.
const SESSION: &str = "set default_transaction_read_only = off; \
     set default_transaction_isolation = 'read committed'; \
     set statement_timeout = '1h'; set client_min_messages = warning";

/// Checks that a schema is there, is not older than this library needs, and admits it.
pub(crate) async fn check(session: Session<'_>, schema: Schema) -> Result<()> {
    let refused = |error| connect::refused(error, "look for the schema");
    if !table_exists(session, schema, "compatibility").await.map_err(refused)? {
        return Err(Error::new(ErrorKind::Incompatible, missing(schema)));
    }
    check_library(session, schema).await?;
    let sql = format!("select pg_catalog.max(version)::bigint from {}", schema.table("migration"));
    let rows = session.query(&sql, &[]).await.map_err(refused)?;
    let found = rows.first().and_then(|row| row.get::<_, Option<i64>>(0)).unwrap_or(0);
    let needed = schema.version();
    if found < needed {
        return Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "schema {} is at version {found}, this library ({}) needs {needed}: run `shardmq \
                 migrate`",
                schema.name(),
                env!("CARGO_PKG_VERSION"),
            ),
        ));
    }
    Ok(())
}

fn missing(schema: Schema) -> String {
    match schema {
        Schema::Outbox => "the database has no outbox: run `shardmq migrate --outbox`".to_owned(),
        _ => format!("the database has no schema {}: run `shardmq migrate`", schema.name()),
    }
}

async fn table_exists(
    session: Session<'_>,
    schema: Schema,
    table: &str,
) -> Result<bool, tokio_postgres::Error> {
    let name = schema.table(table);
    let sql = "select pg_catalog.to_regclass($1) is not null";
    let rows = session.query(sql, &[(&name, Type::TEXT)]).await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// Refuses where the schema says that it needs a newer library.
async fn check_library(session: Session<'_>, schema: Schema) -> Result<()> {
    let refused = |error| connect::refused(error, "read the schema's oldest library");
    let sql = format!("select min_library from {}", schema.table("compatibility"));
    let rows = session.query(&sql, &[]).await.map_err(refused)?;
    let Some(oldest) = rows.first().map(|row| row.get::<_, String>(0)) else {
        return Ok(());
    };
    let own = env!("CARGO_PKG_VERSION");
    if version_of(&oldest) > version_of(own) {
        return Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "schema {} needs shardmq {oldest} or later, this is {own}: update the library",
                schema.name()
            ),
        ));
    }
    Ok(())
}

/// The three numbers of a version; what is no number counts as 0.
fn version_of(text: &str) -> [u64; 3] {
    let mut numbers = [0; 3];
    for (number, part) in numbers.iter_mut().zip(text.split(['.', '-', '+'])) {
        *number = part.parse().unwrap_or(0);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(version_of("0.10.0") > version_of("0.9.9"));
        assert!(version_of("1.0.0-beta") > version_of("0.99.0"));
        assert_eq!(version_of("0.1.0"), [0, 1, 0]);
    }

    #[test]
    fn every_schema_has_migrations_numbered_without_a_gap() {
        for schema in [Schema::Node, Schema::Control, Schema::Log, Schema::Dedup, Schema::Outbox] {
            let mut versions: Vec<_> =
                schema.runner().get_migrations().iter().map(refinery::Migration::version).collect();
            versions.sort_unstable();
            assert_eq!(versions, (1..=schema.version().try_into().unwrap()).collect::<Vec<_>>());
        }
    }
}
