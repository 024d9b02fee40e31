-- Forgets batches that were appended. Primary key.
-- $1 ids
delete from shardmq.outbox_batch b where b.id = any($1::bigint[])
