# ShardMQ. `make` says what there is.

.PHONY: help demo test test-majors bench check

ARGS ?=
# Tests wait for servers more than they work. Many more at a time than processors, and some are late.
export RUST_TEST_THREADS ?= 3
# The versions of PostgreSQL that `make test-majors` runs the tests on.
MAJORS ?= 14 15 16 17 18

help: ## Says what there is.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo '  make demo ARGS="--nodes 3 --messages 100000"    passes arguments on'

demo: ## Installs what is missing, builds, and shows ShardMQ at work on private servers.
	@.ci/install.sh demo $(filter --redis,$(ARGS))
	cargo run --locked --release --features cli --bin shardmq -- demo $(ARGS)

test: ## Installs what is missing and runs all tests.
	@.ci/install.sh test
	cargo test --locked --features cli $(ARGS)

test-majors: ## Runs the tests that need servers on PostgreSQL 14 to 18 (MAJORS="14 18").
	@.ci/install.sh test
	@set -e; for major in $(MAJORS); do \
		bin=$$(.ci/postgres-major.sh $$major); \
		echo "==> PostgreSQL $$major in $$bin"; \
		SHARDMQ_PG_BIN=$$bin cargo test --locked --features cli --test it $(ARGS); \
	done

bench: ## Runs the benches, quickly.
	cargo bench --locked --features cli --bench '*' -- --quick $(ARGS)

check: ## Runs everything that CI runs.
	.ci/run
