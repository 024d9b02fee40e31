//! Everything that needs real servers, in reading order: from the servers themselves to the command.

#![allow(unreachable_pub, missing_docs)]

mod support;

/// What is fetched ahead is bounded by bytes.
mod bounded_reads;
/// Private Postgres servers: found, started, ended with their parent.
mod embedded;
/// A transaction that appends and commits late: no gap, nothing skipped.
mod late_commit;
/// Midnight, and clocks that are wrong.
mod midnight;
/// A position anywhere in a batch: exactly the rest comes.
mod positions;
/// A message goes in and comes out.
mod round_trip;
/// The functions for SQL users: append, message, messages.
mod sql_functions;
