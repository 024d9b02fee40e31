-- Begins a transaction that does not depend on the database's defaults, for leases: a crash may take
-- them back, so its commit waits for nothing.
begin isolation level read committed, read write;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '5s';
set local idle_in_transaction_session_timeout = '5s';
set local synchronous_commit = off
