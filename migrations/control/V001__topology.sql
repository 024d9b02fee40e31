-- The control database: an index of what the nodes hold, so that clients find them. The nodes' own
-- rows are the truth. New objects only: takes no lock that anybody waits for.

create table shardmq_control.compatibility (
    one_row boolean primary key default true check (one_row),
    min_library text not null
);
comment on table shardmq_control.compatibility is 'The oldest library that may use this schema';
insert into shardmq_control.compatibility (min_library) values ('0.1.0');

create table shardmq_control.cluster (
    one_row boolean primary key default true check (one_row),
    id uuid not null default gen_random_uuid(),
    version bigint not null default 1,
    token uuid not null default gen_random_uuid(),
    history uuid[] not null default '{}',
    server text
);
comment on table shardmq_control.cluster is
    'One row: the id of the cluster, and the version of its topology, which rises with each change';
comment on column shardmq_control.cluster.token is
    'Drawn with each version: a database that was restored, or promoted without its end, gives a number to another version';
comment on column shardmq_control.cluster.server is
    'System identifier and database oid of this database since the first node was registered: a copy is another';
comment on column shardmq_control.cluster.history is 'The tokens of the 32 versions before, the latest first';
insert into shardmq_control.cluster default values;

create table shardmq_control.node (
    node int primary key check (node between 1 and 99),
    dsn text not null,
    added_at timestamptz not null default clock_timestamp(),
    registration uuid not null default gen_random_uuid(),
    system_identifier bigint,
    timeline bigint
);
comment on column shardmq_control.node.dsn is 'Without a password: that comes from each client';
comment on column shardmq_control.node.registration is
    'Drawn when an operator says which primary is the right one: what was known of its timeline before does not count';
comment on column shardmq_control.node.timeline is
    'The highest that was seen of this system identifier: a primary that has a lower one is an old one';

create table shardmq_control.topic (
    topic text primary key check (topic ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    topic_id uuid not null unique,
    generation int not null default 1 check (generation > 0),
    created_at timestamptz not null default clock_timestamp()
);

comment on column shardmq_control.topic.topic_id is
    'Drawn when the topic was made: a topic of the same name that is made later is another one';

create table shardmq_control.partition (
    partition int primary key check (partition between 10101 and 19999 and partition % 100 > 0),
    topic text not null references shardmq_control.topic on delete cascade,
    generation int not null,
    state text not null default 'open' check (state in ('open', 'sealed'))
);
create index partition_topic on shardmq_control.partition (topic);

create table shardmq_control.slots (
    topic text not null references shardmq_control.topic on delete cascade,
    generation int not null,
    first_slot int not null check (first_slot between 0 and 16383),
    last_slot int not null check (last_slot between first_slot and 16383),
    partition int not null,
    primary key (topic, generation, first_slot)
);
comment on table shardmq_control.slots is
    'The map of a generation: which partition the key slots first_slot to last_slot belong to';
