-- Writes to the log without storing anything: answered only by a server that can write, flush and
-- replicate. Its transaction is committed durably. Also makes the commit of a transaction wait that may
-- find nothing to do.
select pg_logical_emit_message(true, 'shardmq', '')
