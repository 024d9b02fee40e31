-- Registers a database with an outbox.
-- $1 dsn without password
insert into shardmq_control.outbox (dsn) values ($1) on conflict do nothing
