//! Everything that needs real servers, in reading order: from the servers themselves to the command.

#![allow(unreachable_pub, missing_docs)]

mod support;

/// Positions, last ids and lag are computed: compared with a count.
mod arithmetic;
/// What is fetched ahead is bounded by bytes.
mod bounded_reads;
/// From day to day: no message is left behind, and lag is right.
mod days;
/// Private Postgres servers: found, started, ended with their parent.
mod embedded;
/// The statements of leases and cursors: who may move what.
mod fence;
/// A transaction that appends and commits late: no gap, nothing skipped.
mod late_commit;
/// Who owns a partition, through joins, crashes, pauses and restarts.
mod leases;
/// Midnight, and clocks that are wrong.
mod midnight;
/// A position anywhere in a batch: exactly the rest comes.
mod positions;
/// A message goes in and comes out.
mod round_trip;
/// The functions for SQL users: append, message, messages.
mod sql_functions;
/// Where a group starts: earliest, latest, a time, an id.
mod starts;
