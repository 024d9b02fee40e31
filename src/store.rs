//! All that knows SQL, table names and rows. One statement a file under `store/sql`.

pub(crate) mod append;
#[cfg(feature = "bench")]
pub(crate) mod bare;
#[cfg(test)]
mod bounds;
pub(crate) mod connect;
mod connection;
pub(crate) mod control;
pub(crate) mod dead;
pub(crate) mod dedup;
mod dsn;
pub(crate) mod failed;
pub(crate) mod failures;
#[cfg(feature = "embedded")]
pub(crate) mod faults;
pub(crate) mod fetch;
pub(crate) mod group;
pub(crate) mod group_admin;
mod kept;
pub(crate) mod listen;
pub(crate) mod membership;
pub(crate) mod node;
pub(crate) mod outbox;
pub(crate) mod packed;
pub(crate) mod param;
pub(crate) mod partitions;
mod passfile;
pub(crate) mod place;
mod places;
mod pool;
pub(crate) mod pooler;
pub(crate) mod session;
pub(crate) mod sql;
pub(crate) mod target;
pub(crate) mod timeline;
mod tls;
pub(crate) mod unread;
pub(crate) mod upkeep;
