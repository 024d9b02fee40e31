//! Everything that needs real servers, in reading order: from the servers themselves to the
//! command.

#![allow(unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used)]
// What is plain in a test: sequences searched until something is found, names of a pair alike.
#![allow(clippy::maybe_infinite_iter, clippy::similar_names, clippy::needless_for_each)]
// A test's future is on the heap of its runtime, and some tell a whole story.
#![allow(clippy::large_futures, clippy::too_many_lines, clippy::format_push_string)]

mod support;

/// Every send has its answer in time, whatever ends or is in use around it.
mod answers;
/// Positions, last ids and lag are computed: compared with a count.
mod arithmetic;
/// One message that the server refuses, among many that it takes.
mod bad_data;
/// Input outside of the limits: refused before anything is sent, and by the tables too.
mod bad_input;
/// Partitions by a rule of the sender's own.
mod balancer;
/// A bank whose parts are killed: the sums agree.
mod bank;
/// What is fetched ahead is bounded by bytes.
mod bounded_reads;
/// Consumers that get everything, each in a group of its own.
mod broadcast;
/// Consuming by the functions alone, as psql and other languages do.
mod consume_by_sql;
/// Without the control database.
mod control_away;
/// Several partitions in one commit, without waiting for each other.
mod convoy;
/// A cluster that was restored from a dump is found out.
mod copies;
/// A server that crashes under load, again and again.
mod crash;
/// From day to day: no message is left behind, and lag is right.
mod days;
/// Payloads that can't be read are no dead end; headers are text.
mod decode;
/// What a group has applied in another database is not applied again.
mod dedup;
/// A message with a dedup key is stored once, whoever sends it again.
mod dedup_keys;
/// Messages for later: when they are due, or not at all.
mod delayed;
/// Private Postgres and Redis servers: found, started, ended with their parent.
mod embedded;
/// Consumers whose runtime or cluster has ended.
mod endings;
/// Acknowledged in the user's own transaction, or not at all.
mod exactly_once;
/// Nodes that fail under a producer.
mod failover;
/// Messages that are not handled: again in their place, parked, given up.
mod failures;
/// The statements of leases and cursors: who may move what.
mod fence;
/// Groups that want only some messages.
mod filters;
/// The 99,999,999th message of a partition's day.
mod full;
/// Groups are listed, described, moved and deleted.
mod groups;
/// A client that falls silent in the middle, or goes away: no lock stays, nobody is harmed.
mod half_pipeline;
/// Handlers: as many at a time as order allows, repeated where they fail.
mod handlers;
/// What consumers' signs of life cost.
mod heartbeats;
/// Partitions that are held back: paused by their consumer, or too far ahead of what is
/// acknowledged.
mod held_back;
/// Addresses with several hosts: the one that takes writes is found, and followed.
mod hosts;
/// Connections are opened when needed, and closed when not.
mod idle;
/// Acknowledgements that outlive their process.
mod journal;
/// What sessions keep prepared in the server.
mod kept;
/// A transaction that appends and commits late: no gap, nothing skipped.
mod late_commit;
/// Clocks of servers that leap ahead and come back.
mod leaps;
/// Who owns a partition, through joins, crashes, pauses and restarts.
mod leases;
/// Who has left stays away, whatever of it arrives late.
mod leaving;
/// A topic that is deleted and made again is another one, for all who use it.
mod lives;
/// Who holds a lock for long is told.
mod lock_holders;
/// A table that is locked or broken stops its own partition and no other.
mod locked_table;
/// A day table that is locked under a producer delays its own partition alone.
mod locked_under_producers;
/// A promoted standby that lacks only the roll to the next day.
mod lost_roll;
/// A server that comes back without the end of its log.
mod lost_tail;
/// Ninety-nine nodes: the most that there can be.
mod many_nodes;
/// Many processes that append to one partition, while another ends their connections.
mod many_processes;
/// Midnight, and clocks that are wrong.
mod midnight;
/// Schemas: made by many at once, brought up to date, refused where they do not fit.
mod migrations;
/// A group under a random schedule, against a simple model.
mod model;
/// With hints a message comes at once, without them within the poll interval.
mod notifications;
/// Notifiers in trouble, whichever it is.
mod notifiers;
/// Headers that only SQL can send come out as the server has them.
mod odd_headers;
/// Nodes that some members reach, or nobody.
mod out_of_reach;
/// Messages that are published in a transaction.
mod outbox;
/// Where a password comes from, that it can be replaced, and that nobody shows it.
mod passwords;
/// Paused for longer than its messages are kept, a partition harms nobody and goes on.
mod paused_for_days;
/// Every statement is one that the server takes, and the hot ones go by indexes only.
mod plans;
/// PgBouncer in transaction mode stands before everything.
mod pooler;
/// A position anywhere in a batch: exactly the rest comes.
mod positions;
/// A standby is promoted: what was acknowledged, and was to wait for it, is there.
mod promotions;
/// Batches that are repeated since their answer was lost: one copy, in every order of events.
mod repeats;
/// Old days are dropped, and nobody stumbles over it.
mod retention;
/// A message goes in and comes out.
mod round_trip;
/// Nothing that ShardMQ names is taken over by what others made.
/// Functions and operators of others, where a search_path finds them first.
mod search_path;
/// A group's position is moved under running consumers.
mod seeks;
/// Databases with settings of their own, and commits that are none.
mod settings;
/// The end of a consumer: nothing new, all that is answered is committed, nothing hangs.
mod shutdown;
/// An old primary that wakes up after its standby was promoted.
mod split_brain;
/// The functions for SQL users: append, message, messages.
mod sql_functions;
/// Commits whose wait for a standby is cancelled are not done.
mod standby_waits;
/// Where a group starts: earliest, latest, a time, an id.
mod starts;
/// Tasks of the library that panic.
mod supervision;
/// Encrypted connections: who is talked to is who it should be, or nobody.
mod tls;
/// Topics and nodes come and go.
mod topics;
/// Nodes that move, go, or are another's, under running clients.
mod topology;
/// Rows that can't be read.
mod unreadable;

/// The benches run, and say what they found.
mod bench;
/// The command, as people and scripts run it.
mod command;
