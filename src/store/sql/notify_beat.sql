-- A canary through the channel, by a listener that has heard nothing for a while.
-- $1 what it knows its own by; no partition
select pg_notify('shardmq', $1)
