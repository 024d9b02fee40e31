#!/usr/bin/env bash
# Proves what can be proved of the layers with grep and cargo tree. ARCHITECTURE.md states them.
set -euo pipefail
cd "$(dirname "$0")/.."

failed=
# $1: what is forbidden; the rest is an extended regular expression, and the files that may have it.
forbid() {
    local what=$1 pattern=$2 allowed=$3 found
    found=$(grep -rnEi --include='*.rs' --include='*.sql' -e "$pattern" src migrations |
        grep -vE "^($allowed)" | grep -vE '^[^:]+:[0-9]+: *//' || true)
    if [ -n "$found" ]; then
        printf 'layers: %s\n%s\n' "$what" "$found" >&2
        failed=yes
    fi
}

# A statement begins a string. Beside the store only migrations and the embedded servers have some.
verbs='select |with [a-z_]+ as|insert into |update [a-z_.]+ +(as |set )|delete from |truncate '
verbs+='|(create|alter|drop) (or replace |unique )*(table|schema|index|database|role|function|view)'
forbid 'SQL outside of the store' "\"[[:space:]]*($verbs)" \
    'src/store/|src/migrate\.rs|src/embedded/|migrations/'
forbid 'a table or function by name outside of the store' \
    '"[^"]*\bshardmq(_control|_log)?\.[a-z_]+\b *(\(|where|set|from|for|order|limit)' \
    'src/store/|src/migrate\.rs|migrations/'
notifying='src/store/sql/(notify|control_bump|control_tell_group|control_tell_primaries)\.sql'
notifying+='|migrations/control/V003__assignment\.sql|migrations/outbox/V002__publish\.sql'
forbid 'LISTEN or NOTIFY elsewhere' '"(un)?listen ([a-z_]+[";]|\{)|"notify [a-z_]+[",;]|pg_notify' \
    "src/store/listen\.rs|$notifying"
forbid 'a notification inside the appending transaction' 'pg_notify|\bnotify [a-z]+' \
    "src/[^:]*\.rs|$notifying"
forbid 'a connection that is opened elsewhere' 'tokio_postgres::connect|\bconfig\.connect\(|NoTls' \
    'src/store/(target|tls)\.rs'
forbid 'a crate of the command in the library' '\b(clap|comfy_table|indicatif|jiff|axum)::' \
    'src/bin/'
forbid 'Redis outside of its notifier' '\bredis::' 'src/notifier/redis(\.rs|/)|src/notifier\.rs|src/embedded/|src/bin/'

# What is stored may be odd: reading it is an error, and no panic.
if found=$(grep -nE '\brow\.get(::<|\()' src/store/{fetch,unread,failures,dead}.rs src/admin/dead.rs); then
    printf 'layers: a column of stored data that is read without try_get\n%s\n' "$found" >&2
    failed=yes
fi

# Without features the library brings no command line, no web server, no Redis, no TLS.
unwanted='clap|comfy-table|indicatif|jiff|tempfile|tracing-subscriber|axum|hyper|redis|rustls|openssl|native-tls'
tree=$(cargo tree --locked -e normal --prefix none --no-default-features)
if found=$(grep -E "^($unwanted)[a-z_-]* v" <<<"$tree"); then
    printf 'layers: the core depends on\n%s\n' "$found" >&2
    failed=yes
fi
grep -q '^tokio-postgres v' <<<"$tree" || {
    echo 'layers: cargo tree shows no tokio-postgres, so it proves nothing' >&2
    failed=yes
}

if [ -n "$failed" ]; then exit 1; fi
echo 'layers: as they should be'
