-- Says whether the relay is about to sleep (1) or awake (0): at once and for all, before any commit. A
-- statement of its own, before the look that must see what was published until then. Only who has the lease
-- says it.
-- $1 flag  $2 who does
select setval('shardmq.outbox_flag', $1)
 where exists (select from shardmq.outbox_relay r where r.holder = $2)
