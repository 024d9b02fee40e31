-- Says whether the relay is about to sleep (1) or awake (0): at once and for all, before any commit. A
-- statement of its own, before the look that must see what was published until then.
-- $1 flag
select setval('shardmq.outbox_flag', $1)
