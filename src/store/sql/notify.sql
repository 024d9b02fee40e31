-- A hint, alone in its transaction, which the server begins and ends: its commit waits for no flush and no standby,
-- since it has written nothing before.
-- $1 payload
select pg_notify('shardmq', $1)
