//! Names of what is counted, through the `metrics` facade: install any recorder to see them.

/// Messages that are on disk, by this process.
pub const SENT: &str = "shardmq_sent_messages_total";
/// Messages that were refused or given up.
pub const SEND_FAILED: &str = "shardmq_send_failed_messages_total";
/// Batches appended: messages by batch say how well the disk's flushes are shared.
pub const APPENDED: &str = "shardmq_appended_batches_total";
/// Append transactions that failed and were looked into.
pub const APPEND_FAILED: &str = "shardmq_append_failed_total";
/// Messages handed out.
pub const DELIVERED: &str = "shardmq_delivered_messages_total";
/// Messages acknowledged.
pub const ACKED: &str = "shardmq_acked_messages_total";
/// Calls of a handler that failed.
pub const HANDLER_FAILED: &str = "shardmq_failed_handlers_total";
/// Deliveries dropped without an answer.
pub const UNANSWERED: &str = "shardmq_unanswered_deliveries_total";
/// Messages parked, to be tried again later.
pub const PARKED: &str = "shardmq_parked_messages_total";
/// Messages given up: dead letters.
pub const DEAD_LETTERS: &str = "shardmq_dead_letters_total";
/// Messages that are stored and can't be read.
pub const UNREADABLE: &str = "shardmq_unreadable_messages_total";
/// How often it was told that a partition stands still: when it has begun, and each minute while it lasts.
pub const STALLED: &str = "shardmq_stalled_partitions_total";
/// Tasks of the library that panicked or ended unexpectedly, and were started again, by `task`.
pub const TASK_FAILED: &str = "shardmq_failed_tasks_total";
/// Dead letters whose time was over.
pub const DEAD_EXPIRED: &str = "shardmq_expired_dead_letters_total";
/// Cursors moved.
pub const FLUSHED: &str = "shardmq_flushed_cursors_total";
/// Assignments of a group taken over: how often partitions are divided anew.
pub const ASSIGNED: &str = "shardmq_assignments_total";
/// Partitions taken.
pub const ACQUIRED: &str = "shardmq_acquired_partitions_total";
/// Acknowledgements that were not written to the journal, since a write has failed.
pub const UNWRITTEN: &str = "shardmq_unwritten_acks_total";
/// Partitions lost to another owner.
pub const LEASE_LOST: &str = "shardmq_lost_partitions_total";
/// Hints that could not be sent.
pub const NOTIFY_FAILED: &str = "shardmq_notify_failed_total";
/// How long canaries took through a notifier, in seconds, from their sending to their arrival at the sender.
pub const NOTIFIER_ROUND_TRIP: &str = "shardmq_notifier_round_trip_seconds";
/// How hints of a node arrive at a consumer: 0 they do, 1 the notifier reconnects, 2 it is polled.
pub const NOTIFIER_STATE: &str = "shardmq_notifier_state";
/// Listening connections lost.
pub const LISTENER_LOST: &str = "shardmq_listener_lost_total";
/// Days dropped by retention.
pub const DAYS_DROPPED: &str = "shardmq_dropped_days_total";
/// Looks at a day that is kept beyond its time, since a group has not finished it.
pub const DAYS_KEPT: &str = "shardmq_kept_days_total";
/// Attempts to drop a day whose table was in use.
pub const DROPS_CONTENDED: &str = "shardmq_contended_drops_total";
/// Messages that retention dropped before a group had read them.
pub const MISSED: &str = "shardmq_missed_messages_total";
/// Messages taken out of an outbox, or of those for later, on their way to the log.
pub const RELAYED: &str = "shardmq_relayed_messages_total";
/// Messages of an outbox that no partition took, set aside.
pub const OUTBOX_DEAD: &str = "shardmq_outbox_dead_messages_total";

/// Describes all of them to the installed recorder.
pub fn describe() {
    use ::metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    let counters = [
        (SENT, "messages that are on disk"),
        (SEND_FAILED, "messages that were refused or given up"),
        (APPENDED, "batches appended"),
        (APPEND_FAILED, "append transactions that failed"),
        (DELIVERED, "messages handed out"),
        (ACKED, "messages acknowledged"),
        (HANDLER_FAILED, "calls of a handler that failed"),
        (UNANSWERED, "deliveries dropped without an answer"),
        (PARKED, "messages parked, to be tried again later"),
        (DEAD_LETTERS, "messages given up"),
        (UNREADABLE, "messages that are stored and can't be read"),
        (STALLED, "tellings that a partition stands still"),
        (TASK_FAILED, "tasks of the library that failed and were started again"),
        (DEAD_EXPIRED, "dead letters whose time was over"),
        (FLUSHED, "cursors moved"),
        (ASSIGNED, "assignments of a group taken over"),
        (ACQUIRED, "partitions taken"),
        (UNWRITTEN, "acknowledgements not written to the journal"),
        (LEASE_LOST, "partitions lost to another owner"),
        (NOTIFY_FAILED, "hints that could not be sent"),
        (LISTENER_LOST, "listening connections lost"),
        (DAYS_DROPPED, "days dropped by retention"),
        (DAYS_KEPT, "looks at a day that is kept beyond its time"),
        (DROPS_CONTENDED, "attempts to drop a day whose table was in use"),
        (MISSED, "messages dropped before a group had read them"),
        (RELAYED, "messages taken out of an outbox"),
        (OUTBOX_DEAD, "messages of an outbox set aside"),
    ];
    for (name, text) in counters {
        describe_counter!(name, Unit::Count, text);
    }
    describe_histogram!(NOTIFIER_ROUND_TRIP, Unit::Seconds, "round trips of canaries");
    describe_gauge!(NOTIFIER_STATE, "hints arrive: 0; the notifier reconnects: 1; it is polled: 2");
}
