-- Forgets a database with an outbox. Primary key.
-- $1 dsn without password
delete from shardmq_control.outbox where dsn = $1 returning dsn
