-- The first statement of every transaction that takes a partition's lock: whatever the database's
-- defaults are. A statement that waits for the lock counts as running, so that it may run for long.
begin isolation level read committed, read write;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '5s'
