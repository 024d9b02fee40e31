-- Settings of the whole cluster, which processes read when they connect. New objects only.

create table shardmq_control.setting (
    name text primary key check (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    value text not null
);
comment on table shardmq_control.setting is
    'notifier: postgres, redis, both or none; redis_url, listen_url_NN: without a password, which comes from each client';
