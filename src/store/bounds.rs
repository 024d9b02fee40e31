//! Which of its bounds each statement has: a statement that is in none of these lists has none.

use crate::store::sql;

/// What opens a transaction, with bounds for all that is in it.
const OPENS: &[&str] = &[
    "append_begin",
    "begin_brief",
    "begin_durable",
    "begin_look",
    "begin_patient",
    "begin_read",
    "begin_relaxed",
    "outbox_begin",
];

/// Read alone, in the session's bounds, or in those of `begin_read` through a pooler; those of a
/// change of the topology in its transaction. A look has those of `begin_look`.
const READS: &[&str] = &[
    "control_adopt",
    "control_known",
    "control_server",
    "control_stand",
    "identity_adopt",
    "identity_here",
    "origin",
    "partitions_here",
    "partitions_lost",
    "append_days",
    "control_live_broadcasts",
    "dead_letters_unread",
    "heads",
    "appended_at",
    "at_work",
    "control_add_node",
    "control_add_outbox",
    "control_assignment",
    "control_cluster",
    "control_create_topic",
    "control_delete_topic",
    "control_existing",
    "control_forget_node",
    "control_group_start",
    "control_groups",
    "control_lock",
    "control_members",
    "control_moved_node",
    "control_newer_primary",
    "control_nodes",
    "control_outboxes",
    "control_partition_counts",
    "control_partitions",
    "control_remove_outbox",
    "control_set",
    "control_settings",
    "control_slots",
    "control_topic",
    "control_topics",
    "control_topics_on",
    "control_unset",
    "dead_letters",
    "entrusted",
    "fetch",
    "group_lag",
    "group_start_read",
    "groups_on",
    "identity",
    "is_direct",
    "lag",
    "lock_holders",
    "look",
    "message",
    "missed",
    "node_clock",
    "notify",
    "notify_tail",
    "outbox_left",
    "outbox_next",
    "overlap",
    "parked",
    "partition_state",
    "partitions_of_topic",
    "peek",
    "primary",
    "server",
    "server_primary",
    "unfrozen_days",
    "upkeep_partitions",
];

/// In a transaction that one of [`OPENS`] has opened.
const WRITES: &[&str] = &[
    "control_sweep",
    "make_partition",
    "unclaim_partitions",
    "acquire",
    "append_again",
    "append_function",
    "append_insert",
    "append_lock",
    "append_once",
    "claim_partitions",
    "control_assign",
    "control_bump",
    "control_bury",
    "control_delete_group",
    "control_heartbeat",
    "control_leave",
    "control_make_group",
    "control_tell_group",
    "control_tell_primaries",
    "day_frozen",
    "dead_letter_drop",
    "dead_letter_retry",
    "delete_group",
    "delete_partition",
    "drop_day",
    "expire_day",
    "expire_dead_letters",
    "fence",
    "flush",
    "group_start_write",
    "keep_up",
    "leave",
    "make_cursors",
    "make_days_ahead",
    "outbox_arm",
    "outbox_bury",
    "outbox_bury_parts",
    "outbox_cancel",
    "outbox_deliver",
    "outbox_done",
    "outbox_end",
    "outbox_freeze",
    "outbox_hold",
    "outbox_keep",
    "outbox_lanes",
    "outbox_lock",
    "outbox_look",
    "outbox_look_due",
    "outbox_name_day",
    "outbox_prune",
    "outbox_put_back",
    "outbox_set_state",
    "outbox_unlocked",
    "probe",
    "put_unread",
    "prune_sent_keys",
    "put_aside",
    "register_node",
    "release",
    "renew",
    "roll",
    "seek",
    "set_retention",
    "settle_parked",
    "sweep_broadcasts",
    "sweep_members",
    "unregister_node",
];

/// In a transaction of the user's, with the bounds that the user has set. Their names are whole.
const USERS: &[&str] = &[
    "commit_in",
    "commit_in_refused",
    "commit_parked_in",
    "dedup_prune",
    "dedup_record",
    "outbox_publish",
];

/// On a connection of their own, outside of the pool, each with its bound.
const LONG: &[(&str, &str)] = &[
    ("freeze_day", "30 minutes: store/upkeep, FREEZE"),
    ("fault_clock", "1 minute: embedded/faults"),
    ("fault_days", "1 minute: embedded/faults"),
    ("fault_lock", "1 minute: embedded/faults"),
    ("fault_roll", "1 minute: embedded/faults"),
    ("rights", "1 second for a lock, and it reads the catalog alone: migrate/patience"),
];

/// Where the library sends what is not in the list of statements, or sends past `query` and
/// `write`.
const SENDERS: &[&str] = &[
    // These bring the bounds.
    "store/connection.rs",
    "store/node.rs",
    "store/session.rs",
    // Pipelines that begin with one of OPENS.
    "store/append.rs",
    "store/append/function.rs",
    "store/append/once.rs",
    "store/control.rs",
    "store/listen.rs",
    // In a transaction of the user's.
    "store/dedup.rs",
    "store/failures.rs",
    "store/group.rs",
    "store/outbox.rs",
    // Connections of their own, whose bounds are set first.
    "admin/copies.rs",
    "embedded/database.rs",
    "embedded/faults.rs",
    "embedded/password.rs",
    "store/faults.rs",
    "migrate.rs",
    "migrate/patience.rs",
    "migrate/rights.rs",
];

#[test]
fn every_statement_has_its_bounds() {
    let long = LONG.iter().map(|(name, _)| name);
    let bounded: Vec<&str> =
        [OPENS, READS, WRITES, USERS].into_iter().flatten().chain(long).copied().collect();
    for (name, _) in sql::ALL {
        let lists = bounded.iter().filter(|bounded| *bounded == name).count();
        assert_eq!(lists, 1, "{name}: say in store/bounds.rs, in one list, what bounds it");
    }
    assert_eq!(bounded.len(), sql::ALL.len(), "a list has a statement that is gone");
}

#[test]
fn every_transaction_begins_with_bounds_and_whole_names() {
    for (name, text) in sql::ALL.iter().filter(|(name, _)| OPENS.contains(name)) {
        let has = |setting: &str| text.contains(setting);
        assert!(has("set local search_path = pg_catalog, pg_temp"), "{name}");
        for timeout in ["statement_timeout", "lock_timeout"] {
            let set = format!("set local {timeout} = '");
            assert!(has(&set) && !has(&format!("{timeout} = 0")), "{name}: {timeout}");
        }
    }
}

#[test]
fn statements_in_a_users_transaction_name_operators_and_functions_whole() {
    for (name, text) in sql::ALL.iter().filter(|(name, _)| USERS.contains(name)) {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with("--"));
        let text = lines.collect::<Vec<_>>().join("\n").replace("secs => ", "");
        // What is left without those must be no operator, and set no more than columns.
        let bare = text.replace("operator(pg_catalog.", "(");
        for whole in ["(=)", "(<)", "(<>)", "(@>)", "(+)", "(-)"] {
            assert!(!text.contains(whole), "{name}");
        }
        let rest =
            ["(=)", "(<)", "(<>)", "(@>)", "(+)", "(-)", "acked_id = case", "acked_ahead = case"]
                .into_iter()
                .fold(bare, |text, known| text.replace(known, ""));
        assert!(!rest.contains(['=', '<', '>', '@', '+', '-']), "{name}: {rest}");
        let calls = rest.match_indices('(').filter_map(|(nth, _)| {
            let start = rest[..nth].rfind(|c: char| !c.is_alphanumeric() && !"_.".contains(c));
            rest.get(start.map_or(0, |start| start + 1)..nth).filter(|name| !name.is_empty())
        });
        for call in calls {
            let known = ["applied", "any", "array", "values", "exists", "as"].contains(&call);
            assert!(known || call.contains('.'), "{name}: {call}");
        }
    }
}

#[test]
fn nothing_is_sent_past_the_bounds() {
    let calls =
        [".batch_execute(", ".query_typed", ".execute_typed", ".query_prepared(", ".simple_query("];
    let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let sends = code.into_iter().any(|line| calls.iter().any(|call| line.contains(call)));
            let allowed = SENDERS.contains(&name.as_str()) || name == "store/bounds.rs";
            assert!(!sends || allowed, "{name} sends a statement by itself: go through store/node");
        }
    }
}
