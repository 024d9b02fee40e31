-- Begins the transaction around one statement that reads, where the session's settings are not ours: a
-- pooler's.
begin isolation level read committed;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '100ms';
set local idle_in_transaction_session_timeout = '5s'
