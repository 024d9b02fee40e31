-- Messages that are published in a transaction of the caller's, on their way to the log; those that are
-- for later; what a relay has taken; and what no partition will take. On every node, and in any other
-- database that has an outbox. New objects only: takes no lock that anybody waits for.

create table shardmq.outbox_compatibility (
    one_row boolean primary key default true check (one_row),
    min_library text not null
);
comment on table shardmq.outbox_compatibility is 'The oldest library that may use the outbox of this database';
insert into shardmq.outbox_compatibility (min_library) values ('0.1.0');

-- The one clock, as a node has it.
do $make$
begin
    if to_regprocedure('shardmq.clock()') is null then
        create function shardmq.clock() returns timestamptz
            language sql volatile
            return clock_timestamp();
    end if;
end $make$;

-- One sequence for both tables, so that an id says which message is meant wherever it waits. No cache: of
-- two transactions that follow each other the second has the higher ids.
create sequence shardmq.outbox_id cache 1;

-- Whether the relay is about to sleep, and wants to be woken: 1 or 0. A sequence, since what is set in one
-- is seen by all at once, whatever their isolation, before any commit.
create sequence shardmq.outbox_flag minvalue 0 maxvalue 1 start 0;
select setval('shardmq.outbox_flag', 0);

-- The next id. Whoever has one has a transaction id before, by which the relay knows whose ids may still
-- come.
create function shardmq.draw_outbox_id() returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
begin
    perform pg_current_xact_id();
    return nextval('shardmq.outbox_id');
end $$;

-- The limits of a message's headers, as the day tables have them; names of ShardMQ's own are refused.
create function shardmq.outbox_headers_fit(headers jsonb) returns boolean
    language sql immutable
    return jsonb_typeof(headers) = 'object' and
            (select coalesce(sum(octet_length(e.key) + octet_length(e.value)), 0) <= 65536
                    and coalesce(bool_and(e.key <> '' and left(e.key, 8) <> 'shardmq.'), true)
               from jsonb_each_text(case when jsonb_typeof(headers) = 'object' then headers else '{}' end) e);

-- Rows come and go: vacuumed by their number and not by their share. An exclusive lock to cut the table
-- short is not worth it.
create table shardmq.outbox (
    id bigint primary key default shardmq.draw_outbox_id(),
    uid uuid not null default gen_random_uuid(),
    topic text not null,
    key text,
    headers jsonb,
    payload bytea not null,
    published_at timestamptz not null default clock_timestamp(),
    constraint topic_name check (topic ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    constraint key_of_1024_bytes check (octet_length(key) <= 1024),
    constraint headers_of_65536_bytes check (shardmq.outbox_headers_fit(headers)),
    constraint payload_of_67108864_bytes check (octet_length(payload) <= 67108864)
) with (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_scale_factor = 1, autovacuum_analyze_scale_factor = 0.2,
        autovacuum_analyze_threshold = 50000, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off,
        toast.autovacuum_vacuum_scale_factor = 0.0, toast.autovacuum_vacuum_threshold = 20000,
        toast.vacuum_truncate = off);
comment on table shardmq.outbox is
    'Messages that are published, until a relay takes them. Rows that are inserted otherwise than by publish() are found within some seconds';
comment on column shardmq.outbox.uid is
    'The message''s identity, drawn with the row: a database that is promoted without its tail may relay the row a second time, under the same uid. An id may belong to another message then';

create table shardmq.delayed (
    id bigint primary key default shardmq.draw_outbox_id(),
    uid uuid not null default gen_random_uuid(),
    due_at timestamptz not null,
    topic text not null,
    key text,
    headers jsonb,
    payload bytea not null,
    published_at timestamptz not null default clock_timestamp(),
    constraint due_before_2100 check (due_at < '2100-01-01 00:00:00+00'),
    constraint topic_name check (topic ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    constraint key_of_1024_bytes check (octet_length(key) <= 1024),
    constraint headers_of_65536_bytes check (shardmq.outbox_headers_fit(headers)),
    constraint payload_of_67108864_bytes check (octet_length(payload) <= 67108864)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_scale_factor = 1, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off,
        toast.vacuum_truncate = off);
create index delayed_due on shardmq.delayed (due_at, id);
comment on table shardmq.delayed is 'Messages that are to be delivered later';

create table shardmq.delayed_call (
    token uuid primary key,
    ids bigint[] not null,
    called_at timestamptz not null
) with (vacuum_truncate = off);
create index delayed_call_at on shardmq.delayed_call (called_at);
comment on table shardmq.delayed_call is
    'Calls of deliver_all() of the last hours: one that is repeated, since its answer was lost, stores nothing twice, also when what it stored is due and gone';

-- Batches in the order of their numbers: each is appended, repeated until it is there, and deleted.
create sequence shardmq.outbox_batch_id cache 1;
create table shardmq.outbox_batch (
    id bigint primary key,
    partition int not null,
    topic text not null,
    topic_id uuid not null,
    generation int not null,
    producer uuid not null unique,
    first_day int not null,
    day int not null,
    state text not null default 'frozen' check (state in ('frozen', 'divided', 'withdrawn')),
    count int not null,
    bytes int not null,
    ids bigint[] not null,
    uids uuid[] not null,
    keys text[],
    headers jsonb[],
    payloads bytea[] not null
) with (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off,
        toast.autovacuum_vacuum_scale_factor = 0.0, toast.autovacuum_vacuum_threshold = 5000,
        toast.vacuum_truncate = off);
create index outbox_batch_partition on shardmq.outbox_batch (partition, id);
comment on table shardmq.outbox_batch is
    'What a relay has taken for a partition: the same content under the same identity, however often it is appended';
comment on column shardmq.outbox_batch.producer is
    'Of this batch alone: a database that was restored, or promoted without its tail, uses none for other content';
comment on column shardmq.outbox_batch.day is
    'The latest day that an attempt may name; first_day is the earliest that one has named';
comment on column shardmq.outbox_batch.state is
    'divided: its parts are appended, since some message of it is refused. withdrawn: it is being put back into the outbox, and no attempt may name a later day';

create table shardmq.outbox_dead (
    id bigint primary key,
    uid uuid not null default gen_random_uuid(),
    topic text,
    key text,
    headers jsonb,
    payload bytea,
    error text not null,
    died_at timestamptz not null
);
comment on table shardmq.outbox_dead is
    'Messages that no partition takes, set aside: outbox_revive() puts them back';

create table shardmq.outbox_relay (
    one_row boolean primary key default true check (one_row),
    cluster uuid,
    holder uuid,
    until timestamptz not null
) with (fillfactor = 50);
comment on table shardmq.outbox_relay is 'Who relays from here, and to which cluster';
insert into shardmq.outbox_relay (until) values ('-infinity');

-- lz4 where the server has it: two to four times as quick as pglz.
do $compress$
declare
    c record;
begin
    if not exists (select from pg_settings
                    where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        return;
    end if;
    for c in select table_name as t, column_name as name from information_schema.columns
              where table_schema = 'shardmq' and table_name in ('outbox', 'delayed', 'outbox_batch', 'outbox_dead')
                and column_name in ('headers', 'payload', 'keys', 'payloads') loop
        execute format('alter table shardmq.%I alter column %I set compression lz4', c.t, c.name);
    end loop;
end $compress$;
