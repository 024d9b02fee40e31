-- Locks partitions for an append, in a statement of its own: the next one's snapshot must be newer
-- than the lock. Waits for the first partition only and takes others as it gets them, so there is no
-- convoy and no deadlock; leaves the list of what it got in a local setting, by which the inserts
-- know. Only a warning tells that a wait for a standby was cancelled: it must come. The idle timeout ends
-- a backend whose client fell silent in the middle of the pipeline.
-- What is waited for later is a lock of a day table. That does not take long, so that a table which somebody
-- has locked does not hold up the other partitions of the transaction.
-- $1 int[]: partitions, at most 16    $2 text: lock_timeout
select set_config('idle_in_transaction_session_timeout', '5s', true),
       set_config('lock_timeout', $2, true),
       set_config('client_min_messages', 'warning', true),
       case when current_setting('synchronous_commit') in ('off', 'local', 'remote_write')
            then set_config('synchronous_commit', 'on', true) end,
       set_config('shardmq.held',
           (select ',' || string_agg(held.partition::text, ',') || ','
              from (select p.partition
                      from unnest($1::int[]) with ordinality p (partition, nth)
                     where case when nth = 1
                                then pg_advisory_xact_lock(1397247313, p.partition) is not null
                                else pg_try_advisory_xact_lock(1397247313, p.partition) end) held),
           true),
       set_config('lock_timeout', '100ms', true)
