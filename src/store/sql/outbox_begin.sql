-- Begins a relay's transaction, durable. No plan may read a whole table, however small it was when the plan
-- was made (which makes some seem costly: not to be compiled); a row that somebody is about to take back is
-- not waited for.
begin isolation level read committed, read write;
set local search_path = pg_catalog, pg_temp;
set local statement_timeout = '60s';
set local lock_timeout = '100ms';
set local idle_in_transaction_session_timeout = '5s';
set local jit = off;
set local enable_seqscan = off;
set local enable_bitmapscan = off;
set local plan_cache_mode = force_generic_plan;
set local client_min_messages = warning;
select set_config('synchronous_commit', 'on', true)
 where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')
