#!/usr/bin/env bash
# Installs what `make demo` and `make test` need and this machine lacks, and prints what it found.
# What is there already is never touched.
#
#   .ci/install.sh demo [--redis]    Rust, a C linker, the Postgres server programs, or Redis too
#   .ci/install.sh test              the same, and what only tests need
set -euo pipefail

# A PostgreSQL older than this can't hold the schemas.
OLDEST_POSTGRES=14

say() { echo "install: $*" >&2; }
die() {
    say "$@"
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Prints nothing where there is none. The library looks in the same places, in the same order.
postgres_bin() {
    if [ -n "${SHARDMQ_PG_BIN:-}" ]; then
        is_postgres "$SHARDMQ_PG_BIN" || die "SHARDMQ_PG_BIN is $SHARDMQ_PG_BIN," \
            "which has no postgres, initdb and pg_ctl"
        echo "$SHARDMQ_PG_BIN"
        return
    fi
    local dir
    candidates | while read -r dir; do
        # To the end, so that nobody writes into a closed pipe.
        if is_postgres "$dir"; then echo "$dir"; fi
    done | sed -n 1p
}

candidates() {
    if have pg_config; then pg_config --bindir || true; fi
    printf '%s\n' /usr/lib/postgresql/*/bin | sort -t/ -k5,5nr
    printf '%s\n' /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin | sort -r
    tr ':' '\n' <<<"$PATH"
}

is_postgres() { [ -x "$1/postgres" ] && [ -x "$1/initdb" ] && [ -x "$1/pg_ctl" ]; }

major_of() { "$1/postgres" --version | sed -E 's/.*\(PostgreSQL\) ([0-9]+).*/\1/'; }

# Runs a command as root; fails where that needs a password and nobody is there to type it.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo && [ -t 0 ]; then
        sudo "$@"
    elif have sudo; then
        sudo -n "$@"
    else
        return 1
    fi
}

apt_updated=
apt_install() {
    say "apt-get install $*"
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    if [ -z "$apt_updated" ]; then
        as_root "${apt[@]}" update >&2 || return 1
        apt_updated=yes
    fi
    as_root "${apt[@]}" install -y --no-install-recommends "$@" >&2
}

install_postgres() {
    local hint="install the PostgreSQL server, $OLDEST_POSTGRES or later (postgres, initdb and pg_ctl),
install: or set SHARDMQ_PG_BIN to the folder that has them"
    case "$(uname -s)" in
        Linux)
            have apt-get || die "there is no apt-get here: $hint"
            # Debian would also make and start a server of its own. We start ours, elsewhere.
            local conf=/etc/postgresql-common/createcluster.conf
            if [ ! -e "$conf" ]; then
                as_root mkdir -p "${conf%/*}" &&
                    echo 'create_main_cluster = false' | as_root tee "$conf" >/dev/null ||
                    die "this needs root, or sudo: $hint"
            fi
            apt_install postgresql || die "apt-get did not install it: $hint"
            ;;
        Darwin)
            have brew || die "there is no Homebrew here: $hint"
            brew install postgresql@17 >&2
            ;;
        *) die "this system is not known here: $hint" ;;
    esac
}

need_rust() {
    have cargo || die "Rust is missing: install 1.92 or later with rustup, and see that cargo is in PATH"
    have cc && return
    case "$(uname -s)" in
        Linux) have apt-get && apt_install gcc libc6-dev && return ;;
        Darwin) say "run: xcode-select --install" ;;
    esac
    die "a C compiler (cc) is missing: Rust links with it"
}

need_postgres() {
    local dir major
    dir=$(postgres_bin)
    if [ -z "$dir" ]; then
        install_postgres
        dir=$(postgres_bin)
    fi
    [ -n "$dir" ] || die "PostgreSQL was installed, but postgres, initdb and pg_ctl are not to be found"
    major=$(major_of "$dir")
    [ "$major" -ge "$OLDEST_POSTGRES" ] ||
        die "the PostgreSQL in $dir is version $major: $OLDEST_POSTGRES or later is needed"
    say "PostgreSQL $major in $dir"
}

# Debian's packages also set up services, which are not for us: tests start servers of their own.
apt_install_without_service() {
    local policy=/usr/sbin/policy-rc.d made= outcome=0
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null || return 1
        as_root chmod 755 "$policy"
        made=yes
    fi
    apt_install "$1" || outcome=1
    if [ -n "$made" ]; then as_root rm "$policy"; fi
    if have systemctl; then as_root systemctl disable --quiet "$1" >&2 || true; fi
    return "$outcome"
}

# Prints nothing where there is none. The tests look in the same places.
pgbouncer_program() {
    local program
    for program in /usr/sbin/pgbouncer /opt/homebrew/bin/pgbouncer /usr/local/bin/pgbouncer; do
        if [ -x "$program" ]; then
            echo "$program"
            return
        fi
    done
    command -v pgbouncer || true
}

# Prints nothing where there is none. The library looks in the same places, in the same order.
redis_program() {
    local name dir
    for name in redis-server valkey-server; do
        redis_folders | while read -r dir; do
            # To the end, so that nobody writes into a closed pipe.
            if [ -f "$dir/$name" ] && [ -x "$dir/$name" ]; then echo "$dir/$name"; fi
        done
    done | sed -n 1p
}

redis_folders() {
    if [ -n "${SHARDMQ_REDIS_BIN:-}" ]; then
        echo "$SHARDMQ_REDIS_BIN"
        return
    fi
    tr ':' '\n' <<<"$PATH"
    printf '%s\n' /usr/bin /opt/homebrew/bin /usr/local/bin
}

# Installs a server that is not Postgres. $1 says what it is, $2 prints its program; $3 and $4 are
# its packages in Debian and in Homebrew.
need_test_server() {
    local program hint="install $1"
    program=$("$2")
    if [ -z "$program" ]; then
        case "$(uname -s)" in
            Linux)
                have apt-get || die "there is no apt-get here: $hint"
                apt_install_without_service "$3" || die "apt-get did not install it: $hint"
                ;;
            Darwin)
                have brew || die "there is no Homebrew here: $hint"
                brew install "$4" >&2
                ;;
            *) die "this system is not known here: $hint" ;;
        esac
        program=$("$2")
    fi
    [ -n "$program" ] || die "$3 was installed, but its program is not to be found: $hint"
    say "$("$program" --version | sed -n 1p) in $program"
}

need_redis() {
    if [ -n "${SHARDMQ_REDIS_BIN:-}" ] && [ -z "$(redis_program)" ]; then
        die "SHARDMQ_REDIS_BIN is $SHARDMQ_REDIS_BIN, which has neither redis-server nor valkey-server"
    fi
    need_test_server 'redis-server, 6.2 or later, or valkey-server,
install: or set SHARDMQ_REDIS_BIN to the folder that has one' redis_program redis-server redis
}

need_test_servers() {
    need_test_server 'PgBouncer, 1.18 or later' pgbouncer_program pgbouncer pgbouncer
    need_redis
}

case "${1:-}" in
    demo)
        need_rust
        need_postgres
        if [ "${2:-}" = --redis ]; then need_redis; fi
        ;;
    test)
        need_rust
        need_postgres
        need_test_servers
        ;;
    *) die "usage: .ci/install.sh demo [--redis] | test" ;;
esac
