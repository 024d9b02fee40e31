-- Begins the transaction around one look. It is over before its member gives it up, and a table that is
-- locked is left to its reader at once.
begin isolation level read committed;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '4s';
set local lock_timeout = '50ms';
set local idle_in_transaction_session_timeout = '5s'
