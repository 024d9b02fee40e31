-- A heartbeat through the channel, by a listener that has heard nothing for a while.
select pg_notify('shardmq', 'beat')
