-- Begins a transaction that does not depend on the database's defaults and is durable when committed.
-- Only a warning tells that a wait for a standby was cancelled: it must come.
begin isolation level read committed, read write;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '5s';
set local idle_in_transaction_session_timeout = '5s';
set local client_min_messages = warning;
select set_config('synchronous_commit', 'on', true)
 where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')
