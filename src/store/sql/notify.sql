-- A hint, alone in its transaction, which the server begins and ends: its commit waits for no flush and no standby,
-- since it has written nothing before. It takes a lock of the whole server, which somebody else's commit may hold that
-- does wait: it is refused then, soon, since it has a connection that data wants too.
-- $1 payload
select pg_notify('shardmq', $1), set_config('lock_timeout', '200ms', true)
