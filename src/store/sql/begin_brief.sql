-- Begins a durable transaction that waits for locks for a moment only: it looks at tables that somebody may
-- have locked, and others need the connection.
begin isolation level read committed, read write;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '100ms';
set local idle_in_transaction_session_timeout = '5s';
set local client_min_messages = warning;
select set_config('synchronous_commit', 'on', true)
 where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')
