//! Everything that needs real servers, in reading order: from the servers themselves to the command.

#![allow(unreachable_pub, missing_docs)]

mod support;

/// One message that the server refuses, among many that it takes.
mod bad_data;
/// Input outside of the limits: refused before anything is sent, and by the tables too.
mod bad_input;
/// Several partitions in one commit, without waiting for each other.
mod convoy;
/// Private Postgres servers: found, started, ended with their parent.
mod embedded;
/// The 99,999,999th message of a partition's day.
mod full;
/// A client that falls silent in the middle, or goes away: no lock stays, nobody is harmed.
mod half_pipeline;
/// What is fetched ahead is bounded by bytes.
mod bounded_reads;
/// From day to day: no message is left behind, and lag is right.
mod days;
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
/// Databases with settings of their own, and commits that are none.
mod settings;
/// The functions for SQL users: append, message, messages.
mod sql_functions;

/// The command, as people and scripts run it.
mod command;
/// The benches run, and say what they found.
mod bench;
