#!/usr/bin/env bash
# Installs what `make demo` and `make test` need and this machine lacks, and prints what it found.
# What is there already is never touched.
#
#   .ci/install.sh demo    Rust, a C linker, the Postgres server programs
#   .ci/install.sh test    the same, and what only tests need
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

# Redis and PgBouncer go here when tests need them.
need_test_servers() { :; }

case "${1:-}" in
    demo)
        need_rust
        need_postgres
        ;;
    test)
        need_rust
        need_postgres
        need_test_servers
        ;;
    *) die "usage: .ci/install.sh demo|test" ;;
esac
