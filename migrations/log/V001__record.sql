-- The log centre: warnings and errors of all clients. New objects only.

create table shardmq_log.compatibility (
    one_row boolean primary key default true check (one_row),
    min_library text not null
);
insert into shardmq_log.compatibility (min_library) values ('0.1.0');

create table shardmq_log.record (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    level text not null check (level in ('error', 'warn', 'info')),
    target text not null,
    message text not null,
    fields jsonb not null default '{}',
    host text not null,
    pid int not null
);
create index record_at on shardmq_log.record (at);
