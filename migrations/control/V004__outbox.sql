-- Databases that have an outbox and are no nodes: any client relays from them. New objects only.

create table shardmq_control.outbox (
    dsn text primary key,
    added_at timestamptz not null default clock_timestamp()
);
comment on column shardmq_control.outbox.dsn is 'Without a password: that comes from each client';
