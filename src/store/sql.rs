//! Every statement, by name.

use crate::id::{Day, PartitionId, first_of, last_of};

macro_rules! statements {
    ($($name:ident = $file:literal;)*) => {
        // Some are for private servers only.
        $(#[cfg_attr(not(feature = "embedded"), allow(dead_code))]
        pub(crate) const $name: &str = include_str!(concat!("sql/", $file, ".sql"));)*

        /// All statements with their files' names, for tests that prepare each.
        #[cfg(test)]
        pub(crate) const ALL: &[(&str, &str)] = &[$(($file, $name)),*];
    };
}

statements! {
    ACQUIRE = "acquire";
    APPEND_AGAIN = "append_again";
    APPEND_BEGIN = "append_begin";
    APPEND_DAYS = "append_days";
    APPEND_FUNCTION = "append_function";
    APPEND_INSERT = "append_insert";
    APPEND_LOCK = "append_lock";
    APPENDED_AT = "appended_at";
    APPEND_ONCE = "append_once";
    AT_WORK = "at_work";
    BEGIN_BRIEF = "begin_brief";
    BEGIN_DURABLE = "begin_durable";
    BEGIN_LOOK = "begin_look";
    BEGIN_PATIENT = "begin_patient";
    BEGIN_READ = "begin_read";
    BEGIN_RELAXED = "begin_relaxed";
    CLAIM_PARTITIONS = "claim_partitions";
    COMMIT_IN = "commit_in";
    COMMIT_IN_REFUSED = "commit_in_refused";
    COMMIT_PARKED_IN = "commit_parked_in";
    CONTROL_ADD_NODE = "control_add_node";
    CONTROL_ADD_OUTBOX = "control_add_outbox";
    CONTROL_ADOPT = "control_adopt";
    CONTROL_ASSIGN = "control_assign";
    CONTROL_ASSIGNMENT = "control_assignment";
    CONTROL_BUMP = "control_bump";
    CONTROL_BURY = "control_bury";
    CONTROL_CLUSTER = "control_cluster";
    CONTROL_CREATE_TOPIC = "control_create_topic";
    CONTROL_DELETE_GROUP = "control_delete_group";
    CONTROL_DELETE_TOPIC = "control_delete_topic";
    CONTROL_EXISTING = "control_existing";
    CONTROL_FORGET_NODE = "control_forget_node";
    CONTROL_GROUP_START = "control_group_start";
    CONTROL_GROUPS = "control_groups";
    CONTROL_HEARTBEAT = "control_heartbeat";
    CONTROL_KNOWN = "control_known";
    CONTROL_LEAVE = "control_leave";
    CONTROL_LIVE_BROADCASTS = "control_live_broadcasts";
    CONTROL_LOCK = "control_lock";
    CONTROL_MAKE_GROUP = "control_make_group";
    CONTROL_MEMBERS = "control_members";
    CONTROL_MOVED_NODE = "control_moved_node";
    CONTROL_NEWER_PRIMARY = "control_newer_primary";
    CONTROL_NODES = "control_nodes";
    CONTROL_OUTBOXES = "control_outboxes";
    CONTROL_PARTITION_COUNTS = "control_partition_counts";
    CONTROL_PARTITIONS = "control_partitions";
    CONTROL_REMOVE_OUTBOX = "control_remove_outbox";
    CONTROL_SERVER = "control_server";
    CONTROL_SET = "control_set";
    CONTROL_SETTINGS = "control_settings";
    CONTROL_SLOTS = "control_slots";
    CONTROL_STAND = "control_stand";
    CONTROL_SWEEP = "control_sweep";
    CONTROL_UNSET = "control_unset";
    CONTROL_TELL_GROUP = "control_tell_group";
    CONTROL_TELL_PRIMARIES = "control_tell_primaries";
    CONTROL_TOPIC = "control_topic";
    CONTROL_TOPICS = "control_topics";
    CONTROL_TOPICS_ON = "control_topics_on";
    DAY_FROZEN = "day_frozen";
    DEAD_LETTERS = "dead_letters";
    DEAD_LETTERS_UNREAD = "dead_letters_unread";
    DEAD_LETTER_DROP = "dead_letter_drop";
    DEAD_LETTER_RETRY = "dead_letter_retry";
    DEDUP_PRUNE = "dedup_prune";
    DEDUP_RECORD = "dedup_record";
    DELETE_GROUP = "delete_group";
    DELETE_PARTITION = "delete_partition";
    DROP_DAY = "drop_day";
    ENTRUSTED = "entrusted";
    EXPIRE_DAY = "expire_day";
    EXPIRE_DEAD_LETTERS = "expire_dead_letters";
    FAULT_CLOCK = "fault_clock";
    FAULT_DAYS = "fault_days";
    FAULT_LOCK = "fault_lock";
    FAULT_ROLL = "fault_roll";
    FENCE = "fence";
    FETCH = "fetch";
    FLUSH = "flush";
    FREEZE_DAY = "freeze_day";
    GROUP_LAG = "group_lag";
    GROUPS_ON = "groups_on";
    GROUP_START_READ = "group_start_read";
    GROUP_START_WRITE = "group_start_write";
    HEADS = "heads";
    IDENTITY = "identity";
    IDENTITY_ADOPT = "identity_adopt";
    IDENTITY_HERE = "identity_here";
    IS_DIRECT = "is_direct";
    KEEP_UP = "keep_up";
    LAG = "lag";
    LEAVE = "leave";
    LOCK_HOLDERS = "lock_holders";
    LOOK = "look";
    MAKE_CURSORS = "make_cursors";
    MAKE_DAYS_AHEAD = "make_days_ahead";
    MAKE_PARTITION = "make_partition";
    MESSAGE = "message";
    MISSED = "missed";
    NODE_CLOCK = "node_clock";
    NOTIFY = "notify";
    NOTIFY_TAIL = "notify_tail";
    OUTBOX_ARM = "outbox_arm";
    OUTBOX_BEGIN = "outbox_begin";
    OUTBOX_BURY = "outbox_bury";
    OUTBOX_BURY_PARTS = "outbox_bury_parts";
    OUTBOX_CANCEL = "outbox_cancel";
    OUTBOX_DELIVER = "outbox_deliver";
    OUTBOX_DONE = "outbox_done";
    OUTBOX_END = "outbox_end";
    OUTBOX_FREEZE = "outbox_freeze";
    OUTBOX_HOLD = "outbox_hold";
    OUTBOX_KEEP = "outbox_keep";
    OUTBOX_LANES = "outbox_lanes";
    OUTBOX_LEFT = "outbox_left";
    OUTBOX_LOCK = "outbox_lock";
    OUTBOX_LOOK = "outbox_look";
    OUTBOX_LOOK_DUE = "outbox_look_due";
    OUTBOX_NAME_DAY = "outbox_name_day";
    OUTBOX_NEXT = "outbox_next";
    OUTBOX_PRUNE = "outbox_prune";
    OUTBOX_PUBLISH = "outbox_publish";
    OUTBOX_PUT_BACK = "outbox_put_back";
    OUTBOX_SET_STATE = "outbox_set_state";
    OUTBOX_UNLOCKED = "outbox_unlocked";
    OVERLAP = "overlap";
    PARKED = "parked";
    PARTITION_STATE = "partition_state";
    PARTITIONS_HERE = "partitions_here";
    PARTITIONS_LOST = "partitions_lost";
    PARTITIONS_OF_TOPIC = "partitions_of_topic";
    PEEK = "peek";
    PROBE = "probe";
    PRUNE_SENT_KEYS = "prune_sent_keys";
    PUT_ASIDE = "put_aside";
    PUT_UNREAD = "put_unread";
    REGISTER_NODE = "register_node";
    RELEASE = "release";
    RENEW = "renew";
    RIGHTS = "rights";
    ROLL = "roll";
    SEEK = "seek";
    ORIGIN = "origin";
    PRIMARY = "primary";
    SERVER = "server";
    SERVER_PRIMARY = "server_primary";
    SETTLE_PARKED = "settle_parked";
    SET_RETENTION = "set_retention";
    SWEEP_BROADCASTS = "sweep_broadcasts";
    SWEEP_MEMBERS = "sweep_members";
    UNCLAIM_PARTITIONS = "unclaim_partitions";
    UNFROZEN_DAYS = "unfrozen_days";
    UNREGISTER_NODE = "unregister_node";
    UPKEEP_PARTITIONS = "upkeep_partitions";
}

/// A statement for one partition and day: tables are addressed by name.
pub(crate) fn for_day(statement: &str, partition: PartitionId, day: Day) -> String {
    statement
        .replace("{partition}", &partition.to_string())
        .replace("{day}", &day.to_string())
        .replace("{day_number}", &day.yymmdd().to_string())
        .replace("{first_id}", &first_of(partition, day).to_string())
        .replace("{last_id}", &last_of(partition, day).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_in_the_list_and_says_what_it_is_for() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/sql");
        let files = std::fs::read_dir(folder).unwrap().count();
        assert_eq!(files, ALL.len());
        for (name, text) in ALL {
            assert!(text.starts_with("-- "), "{name}");
        }
    }

    #[test]
    fn no_placeholder_is_left_after_filling_in() {
        let day = Day::from_yymmdd(50_102).unwrap();
        let partition = PartitionId::new(1, 1).unwrap();
        for (name, text) in ALL {
            let filled = for_day(text, partition, day);
            assert!(!filled.contains("{partition}") && !filled.contains("{day"), "{name}");
        }
        let filled = for_day(FETCH, partition, day);
        assert!(filled.contains("shardmq.batch_10101_050102"));
    }
}
