-- Writes to the log without storing anything: answered only by a server that can write, flush and
-- replicate. Its transaction is committed durably.
select pg_logical_emit_message(true, 'shardmq', '')
