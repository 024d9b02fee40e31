-- What groups have applied in this database: for handlers whose effects are here and whose messages are
-- elsewhere. New objects only.

create table shardmq_dedup.compatibility (
    one_row boolean primary key default true check (one_row),
    min_library text not null
);
insert into shardmq_dedup.compatibility (min_library) values ('0.1.0');

create table shardmq_dedup.applied (
    group_name text not null check (group_name ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    producer uuid not null,
    sequence bigint not null,
    index int not null check (index >= 0),
    applied_at timestamptz not null default clock_timestamp(),
    primary key (group_name, producer, sequence, index)
);
comment on table shardmq_dedup.applied is 'Messages, by their uid, whose effects are committed here';
-- Rows come in the order of this time, nearly: it costs next to nothing.
create index applied_at on shardmq_dedup.applied using brin (applied_at) with (autosummarize = on);
