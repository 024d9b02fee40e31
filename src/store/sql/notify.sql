-- A hint, alone in its transaction: such a commit waits for no flush and no standby.
-- $1 payload
select pg_notify('shardmq', $1)
