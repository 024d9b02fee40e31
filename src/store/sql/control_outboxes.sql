-- Databases with an outbox that are no nodes.
select dsn from shardmq_control.outbox order by dsn
