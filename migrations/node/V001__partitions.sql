-- What a node knows of itself and of its partitions. New objects only: takes no lock that anybody
-- waits for.

create table shardmq.compatibility (
    one_row boolean primary key default true check (one_row),
    min_library text not null
);
comment on table shardmq.compatibility is 'The oldest library that may use this schema';
insert into shardmq.compatibility (min_library) values ('0.1.0');

create table shardmq.identity (
    one_row boolean primary key default true check (one_row),
    cluster uuid not null,
    node int not null check (node between 1 and 99),
    server text
);
comment on table shardmq.identity is
    'One row once the node was registered: clients refuse a node whose identity is not what they were told';

comment on column shardmq.identity.server is
    'System identifier and database oid of this database when it was registered: a copy is another';

create table shardmq.partition (
    partition int primary key check (partition between 10101 and 19999 and partition % 100 > 0),
    topic text not null check (topic ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    topic_id uuid not null,
    generation int not null check (generation > 0),
    state text not null default 'open' check (state in ('open', 'sealed', 'deleted')),
    day int not null check (day between 101 and 991231),
    low_watermark bigint not null default 0,
    topology_version bigint not null,
    created_at timestamptz not null,
    deleted_at timestamptz
);
comment on table shardmq.partition is
    'The truth about the partitions of this node. Read by every append, written once a day and on topology changes, always under the partition''s advisory lock';
comment on column shardmq.partition.topic_id is
    'Drawn when the topic was made: a topic of the same name that is made later is another one';
comment on column shardmq.partition.day is
    'The day (YYMMDD, UTC) whose table takes appends; only rises. A day before it is closed';
comment on column shardmq.partition.low_watermark is 'Ids below it were dropped by retention';

create table shardmq.day (
    partition int not null,
    day int not null,
    first_id bigint not null,
    last_id bigint not null,
    count bigint not null,
    primary key (partition, day)
);
comment on table shardmq.day is
    'Closed days that have messages: readers step by it, lag is counted with it';

create table shardmq.refused (
    partition int not null,
    producer uuid not null,
    sequence bigint not null,
    named int not null,
    primary key (partition, producer, sequence)
);
comment on column shardmq.refused.named is
    'The latest day that an attempt may have named: needed until the partition has left that day';
comment on table shardmq.refused is
    'Batches whose producer was told that they are not there: a late original is turned away';
