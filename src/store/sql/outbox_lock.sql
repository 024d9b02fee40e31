-- Takes the lock under which one relay at a time works, if it is free: two-int space, class 1397247314.
select set_config('shardmq.relay', pg_try_advisory_xact_lock(1397247314, 0)::text, true) = 'true'
