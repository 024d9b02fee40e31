-- Messages that a group failed at: those that it tries again later, beside the log, and those that it has
-- given up. Both are copies: the day of the original may be dropped. New objects, functions in the place of
-- others, and a column of shardmq.partition with a constant default: an exclusive lock for a moment, no table is
-- rewritten.

-- The same columns in the same order, so that one can be made of the other.
create table shardmq.retry (
    id uuid primary key default gen_random_uuid(),
    group_name text not null,
    topic text not null,
    partition int not null,
    message_id bigint not null check (message_id / 100000000000000 = partition),
    producer uuid not null,
    sequence bigint not null,
    message_index int not null check (message_index >= 0),
    key text check (octet_length(key) <= 1024),
    headers jsonb check (jsonb_typeof(headers) = 'object'),
    payload bytea not null,
    appended_at timestamptz not null check (isfinite(appended_at)),
    first_seen timestamptz not null check (isfinite(first_seen)),
    attempts int not null check (attempts >= 0),
    failures jsonb not null default '[]' check (jsonb_typeof(failures) = 'array'),
    due_at timestamptz not null
) with (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02, vacuum_truncate = off);
comment on table shardmq.retry is
    'Messages that a group is to be given again, beside the log. The id is random: after a failover that '
    'lost the end of the log, none is used again';
create index retry_due on shardmq.retry (group_name, partition, due_at);

create table shardmq.dead_letter (
    id bigint generated always as identity primary key,
    group_name text not null,
    topic text not null,
    partition int not null,
    message_id bigint not null check (message_id / 100000000000000 = partition),
    producer uuid not null,
    sequence bigint not null,
    message_index int not null check (message_index >= 0),
    key text check (octet_length(key) <= 1024),
    headers jsonb check (jsonb_typeof(headers) = 'object'),
    payload bytea,
    appended_at timestamptz not null check (isfinite(appended_at)),
    first_seen timestamptz not null check (isfinite(first_seen)),
    attempts int not null check (attempts >= 0),
    failures jsonb not null default '[]' check (jsonb_typeof(failures) = 'array'),
    died_at timestamptz not null
);
comment on table shardmq.dead_letter is
    'Messages that a group has given up, until somebody decides. Without payload: the message could not be read';
create index dead_letter_unread on shardmq.dead_letter (id) where payload is null;
create index dead_letter_group on shardmq.dead_letter (topic, group_name, id);
create index dead_letter_died on shardmq.dead_letter (partition, died_at);

do $$ begin
    if exists (select from pg_settings where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        alter table shardmq.retry alter column payload set compression lz4;
        alter table shardmq.dead_letter alter column payload set compression lz4;
    end if;
end $$;

-- The messages of a row that could not be read, read again: none where it still can't be read.
create function shardmq.read_again(p_partition int, p_base_id bigint, p_producer uuid, p_sequence bigint)
    returns table (message_id bigint, key text, headers jsonb, payload bytea)
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
begin
    return query execute format($sql$
        select b.base_id + u.n - 1, u.key, u.headers, u.payload
          from shardmq.%I b, unnest(b.payloads, b.keys, b.headers) with ordinality u (payload, key, headers, n)
         where (b.base_id, b.producer, b.sequence) = ($1, $2, $3)
           and shardmq.misfit(b.count, b.payloads, b.keys, b.headers) is null
        $sql$, shardmq.table_name(p_partition, (p_base_id / 100000000 % 1000000)::int))
      using p_base_id, p_producer, p_sequence;
exception
    when others then
        return;
end $$;

-- Gives dead letters to their group again, and to no other: up to so many of these ids, or of those that
-- the filter leaves (null: all), oldest first, with their history, and their attempts counted anew. Those
-- whose group is not known in their partition any more stay, and those whose message still can't be read.
-- Returns how many of which groups.
create function shardmq.dead_letter_retry(p_ids bigint[], p_topic text, p_group text, p_partition int,
                                          p_error text, p_before timestamptz, p_most int)
    returns table (topic text, group_name text, moved bigint)
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with found as materialized (
            select r.partition, m.message_id, m.key, m.headers, m.payload
              from (select distinct d.partition, d.message_id - d.message_index as base_id, d.producer, d.sequence
                      from shardmq.dead_letter d
                     where d.payload is null
                       and (p_ids is null or d.id = any (p_ids))
                       and (p_topic is null or d.topic = p_topic)
                       and (p_group is null or d.group_name = p_group)
                       and (p_partition is null or d.partition = p_partition)) r,
                   lateral shardmq.read_again(r.partition, r.base_id, r.producer, r.sequence) m),
        chosen as (
            select d.id
              from shardmq.dead_letter d
              join shardmq.cursor c on (c.group_name, c.partition) = (d.group_name, d.partition)
             where (p_ids is null or d.id = any (p_ids))
               and (p_topic is null or d.topic = p_topic)
               and (p_group is null or d.group_name = p_group)
               and (p_partition is null or d.partition = p_partition)
               and (p_error is null or strpos(d.failures -> -1 ->> 'error', p_error) > 0)
               and (p_before is null or d.died_at <= p_before)
               and (d.payload is not null
                    or exists (select from found f
                                where (f.partition, f.message_id) = (d.partition, d.message_id)))
             order by d.id limit p_most
               for update of d skip locked
               for key share of c),
        gone as (
            delete from shardmq.dead_letter d using chosen where d.id = chosen.id returning d.*),
        again as (
            insert into shardmq.retry (group_name, topic, partition, message_id, producer, sequence,
                                       message_index, key, headers, payload, appended_at, first_seen,
                                       attempts, failures, due_at)
            select g.group_name, g.topic, g.partition, g.message_id, g.producer, g.sequence,
                   g.message_index, coalesce(g.key, f.key), coalesce(g.headers, f.headers),
                   coalesce(g.payload, f.payload), g.appended_at, g.first_seen,
                   0, g.failures, shardmq.clock() + row_number() over (order by g.id) * interval '1 us'
              from gone g
              left join found f on g.payload is null and (f.partition, f.message_id) = (g.partition, g.message_id))
        select g.topic, g.group_name, count(*) from gone g group by g.topic, g.group_name
    $$;

-- The same, to be rid of them.
create function shardmq.dead_letter_drop(p_ids bigint[], p_topic text, p_group text, p_partition int,
                                         p_error text, p_before timestamptz, p_most int)
    returns table (topic text, group_name text, moved bigint)
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with chosen as (
            select d.id
              from shardmq.dead_letter d
             where (p_ids is null or d.id = any (p_ids))
               and (p_topic is null or d.topic = p_topic)
               and (p_group is null or d.group_name = p_group)
               and (p_partition is null or d.partition = p_partition)
               and (p_error is null or strpos(d.failures -> -1 ->> 'error', p_error) > 0)
               and (p_before is null or d.died_at <= p_before)
             order by d.id limit p_most
               for update skip locked),
        gone as (
            delete from shardmq.dead_letter d using chosen where d.id = chosen.id
            returning d.topic, d.group_name)
        select g.topic, g.group_name, count(*) from gone g group by g.topic, g.group_name
    $$;

alter table shardmq.partition
    add column dead_letter_days int not null default 30 check (dead_letter_days between 1 and 3650);
comment on column shardmq.partition.dead_letter_days is 'How many days a dead letter is kept';

-- Drops dead letters of a partition whose time is over by this server's clock and the caller's, up to so many.
-- Returns how many.
create function shardmq.expire_dead_letters(p_partition int, p_most int, p_client_clock timestamptz)
    returns bigint
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with chosen as (
            select d.id
              from shardmq.dead_letter d join shardmq.partition p using (partition)
             where d.partition = p_partition
               and d.died_at < (select least(shardmq.clock(), p_client_clock)) - p.dead_letter_days * interval '1 day'
             order by d.died_at limit p_most
               for update of d skip locked),
        gone as (delete from shardmq.dead_letter d using chosen where d.id = chosen.id returning 1)
        select count(*) from gone
    $$;

-- As before; what is parked goes too.
-- Forgets a group of a topic on this node: deleted, unknown, or live, where a consumer has a lease that
-- owns one of its cursors. A member's row has no topic, so one that owns nothing counts too if its group
-- bears the name.
create or replace function shardmq.delete_group(p_topic text, p_group text) returns text
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    known boolean;
begin
    -- Nobody takes one of them between the look at the leases and the end.
    perform from shardmq.cursor c join shardmq.partition p on p.partition = c.partition
      where c.group_name = p_group and p.topic = p_topic
      order by c.partition
        for update of c;
    if exists (
        select from shardmq.member m
          left join shardmq.cursor c on c.member = m.member
          left join shardmq.partition p on p.partition = c.partition
         where m.group_name = p_group and shardmq.is_live(m)
           and (p.partition is null or p.topic = p_topic)) then
        return 'live';
    end if;
    delete from shardmq.cursor c using shardmq.partition p
     where p.partition = c.partition and c.group_name = p_group and p.topic = p_topic;
    known := found;
    delete from shardmq.retry r where r.group_name = p_group and r.topic = p_topic;
    delete from shardmq.group_start g where (g.topic, g.group_name) = (p_topic, p_group);
    return case when known or found then 'deleted' else 'unknown' end;
end $$;

-- As before; what is parked goes too.
-- Removes broadcast groups whose consumer has not renewed its lease here for so long, by this server's clock
-- and the caller's, and which is not among those that the caller knows to live: it has died, or it is away for
-- good. A live one that can't reach this node would else begin anew here. Returns how many.
drop function shardmq.sweep_broadcasts(interval);
create function shardmq.sweep_broadcasts(p_idle interval, p_client_clock timestamptz, p_live text[])
    returns bigint
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with idle as (
            delete from shardmq.group_start g
             where g.broadcast and g.group_name <> all (p_live) and g.seen_at < least(shardmq.clock(), p_client_clock) - p_idle
               and not exists (select from shardmq.member m
                                where m.group_name = g.group_name
                                  and m.leased_until > least(shardmq.clock(), p_client_clock) - p_idle)
            returning g.group_name),
        cursors as (
            delete from shardmq.cursor c using idle where c.group_name = idle.group_name),
        parked as (
            delete from shardmq.retry r using idle where r.group_name = idle.group_name)
        select count(*) from idle
    $$;

-- As before; what is parked goes too, and dead letters: the number is used again.
-- Ends a partition: drops its tables and cursors. Its number stays taken for a day.
create or replace function shardmq.delete_partition(p_partition int, p_topic_id uuid) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    v_topic text;
    t record;
begin
    perform shardmq.lock_partition(p_partition);
    update shardmq.partition p set state = 'deleted', deleted_at = shardmq.clock()
     where p.partition = p_partition and p.topic_id = p_topic_id and p.state <> 'deleted'
    returning p.topic into v_topic;
    if not found then
        return false;
    end if;
    for t in select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where n.nspname = 'shardmq' and c.relkind = 'r' and c.relname like 'batch\_' || p_partition || '\_%' loop
        execute format('drop table shardmq.%I', t.relname);
    end loop;
    delete from shardmq.day d where d.partition = p_partition;
    delete from shardmq.refused r where r.partition = p_partition;
    delete from shardmq.cursor c where c.partition = p_partition;
    -- Behind the cursors: whoever puts something aside has locked one.
    delete from shardmq.retry r where r.partition = p_partition;
    delete from shardmq.dead_letter l where l.partition = p_partition;
    -- A topic of that name that is made later is another one: its groups begin anew.
    delete from shardmq.group_start g
     where g.topic = v_topic
       and not exists (select from shardmq.partition p where p.topic = v_topic and p.state <> 'deleted');
    return true;
end $$;
