//! Everything that needs real servers, in reading order: from the servers themselves to the command.

#![allow(unreachable_pub, missing_docs)]

mod support;

/// Private Postgres servers: found, started, ended with their parent.
mod embedded;
/// A server that comes back without the end of its log.
mod lost_tail;
/// Old days are dropped, and nobody stumbles over it.
mod retention;
/// A message goes in and comes out.
mod round_trip;
