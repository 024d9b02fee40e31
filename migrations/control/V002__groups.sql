-- Where groups start, and who is alive in them. New objects only.

create table shardmq_control.consumer_group (
    topic text not null references shardmq_control.topic on delete cascade,
    group_name text not null check (group_name ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    start_at timestamptz not null,
    start_id bigint,
    from_clock boolean not null,
    primary key (topic, group_name)
);
comment on column shardmq_control.consumer_group.start_at is
    'Partitions without a cursor start at their first message from then on';
comment on column shardmq_control.consumer_group.start_id is
    'Where the group was started at an id: the exact start in that id''s own partition';
comment on column shardmq_control.consumer_group.from_clock is
    'The start is this database''s clock (latest): a node that was away then starts a minute earlier';

create table shardmq_control.member (
    member uuid primary key,
    topic text not null references shardmq_control.topic on delete cascade,
    group_name text not null,
    host text not null,
    pid int not null,
    started_at timestamptz not null default clock_timestamp(),
    heartbeat_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);
comment on table shardmq_control.member is
    'Live consumers, by which each knows its share; a silent one is left out after 15 s';
create index member_group on shardmq_control.member (topic, group_name);

create table shardmq_control.sweep (
    one_row boolean primary key default true check (one_row),
    swept_at timestamptz not null default clock_timestamp()
);
comment on table shardmq_control.sweep is
    'One row: when members and groups that are gone for good were last looked for. Some consumer does, once a minute';
insert into shardmq_control.sweep default values;
