-- In the next statement, whose snapshot is newer than the lock: whether this relay still has the lease. What
-- follows does nothing where it has not.
-- $1 holder
select set_config('shardmq.relay',
           (current_setting('shardmq.relay') = 'true'
            and exists (select from shardmq.outbox_relay r where r.holder = $1))::text, true) = 'true'
