-- A hint, alone in its transaction, which the server begins and ends: it writes nothing, so that its commit
-- waits for no flush and no standby, and there is nothing that a setting of the database could spoil.
-- $1 payload
select pg_notify('shardmq', $1)
