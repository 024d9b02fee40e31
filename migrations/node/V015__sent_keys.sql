-- Sends by a key of the caller's own: for two days a dedup key is stored once in a partition. A new table and
-- new functions; claim_partitions starts without keys: takes no lock that anybody waits for.

create table shardmq.sent_key (
    partition int not null,
    dedup_key text collate "C" not null check (octet_length(dedup_key) between 1 and 1024),
    id bigint not null,
    sent_at timestamptz not null,
    primary key (partition, dedup_key)
) with (autovacuum_vacuum_scale_factor = 0.05);
create index sent_key_sent_at on shardmq.sent_key (sent_at);
comment on table shardmq.sent_key is
    'Dedup keys of the last days with the ids of their messages, written in the transaction that appends these, under the partition''s lock';

-- For how long a dedup key is known at least.
create function shardmq.dedup_window() returns interval
    language sql immutable
    return interval '2 days';

-- The ids under which dedup keys were stored in a partition since a time; null for those that were not.
-- The caller holds the partition's lock. However small the table was when the plan was made: by index.
create function shardmq.sent_ids(p_partition int, p_dedup_keys text[], p_since timestamptz) returns bigint[]
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    as $$
begin
    return array(
        select (select s.id from shardmq.sent_key s
                 where s.partition = p_partition and s.dedup_key = k.dedup_key and s.sent_at > p_since)
          from unnest(p_dedup_keys) with ordinality k (dedup_key, nth)
         order by k.nth);
end $$;

-- Appends the messages of a batch whose dedup keys are new, each key once, and says where all of them
-- are: appended or duplicate (all are there) with an id for each message; else why not, as
-- append_batch does. A repeat needs a sequence of its own: what it repeats is known by the keys.
create function shardmq.append_batch_once(
    p_partition int, p_topic uuid, p_generation int, p_day int, p_producer uuid, p_sequence bigint,
    p_keys text[], p_headers jsonb[], p_payloads bytea[], p_dedup_keys text[],
    out outcome text, out ids bigint[], out day int, out today int, out base_id bigint)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    now_at timestamptz;
    since timestamptz;
    fresh record;
    appended record;
begin
    perform shardmq.lock_partition(p_partition);
    now_at := shardmq.clock();
    since := now_at - shardmq.dedup_window();
    if exists (select from shardmq.partition p
                where p.partition = p_partition and p.topic_id = p_topic and p.state <> 'deleted') then
        ids := shardmq.sent_ids(p_partition, p_dedup_keys, since);
        if array_position(ids, null) is null then
            -- As for a batch that append_batch finds: the commit waits for disk and standby.
            perform pg_logical_emit_message(true, 'shardmq', '');
            outcome := 'duplicate';
            return;
        end if;
    end if;
    select array_agg(m.dedup_key order by m.nth) as dedup_keys,
           case when p_keys is not null then array_agg(m.key order by m.nth) end as keys,
           case when p_headers is not null then array_agg(m.headers order by m.nth) end as headers,
           array_agg(m.payload order by m.nth) as payloads,
           sum(octet_length(m.payload) + coalesce(octet_length(m.key), 0)
               + coalesce(octet_length(m.headers::text), 0)) as bytes
      into fresh
      from (select distinct on (u.dedup_key) u.*
              from unnest(p_payloads, p_keys, p_headers, p_dedup_keys, ids) with ordinality
                   u (payload, key, headers, dedup_key, id, nth)
             where u.id is null
             order by u.dedup_key, u.nth) m;
    ids := null;
    select * into appended from shardmq.append_batch(p_partition, p_topic, p_generation, p_day, p_day,
        p_producer, p_sequence, fresh.bytes::int, fresh.keys, fresh.headers, fresh.payloads);
    -- A duplicate by its sequence is another batch, since these keys are not there.
    outcome := case appended.outcome when 'duplicate' then 'overtaken' else appended.outcome end;
    day := appended.day;
    today := appended.today;
    if outcome <> 'appended' then
        return;
    end if;
    base_id := appended.base_id;
    -- A key that is there is older than the window.
    insert into shardmq.sent_key (partition, dedup_key, id, sent_at)
    select p_partition, k.dedup_key, appended.base_id + k.nth - 1, now_at
      from unnest(fresh.dedup_keys) with ordinality k (dedup_key, nth)
    on conflict (partition, dedup_key) do update set id = excluded.id, sent_at = excluded.sent_at;
    ids := shardmq.sent_ids(p_partition, p_dedup_keys, since);
end $$;

-- For every other language: appends a message to a partition, or returns the id under which a message of
-- this dedup key was stored there in the last two days. It holds the partition's lock to the end of its
-- transaction, so call it alone.
create function shardmq.append_once(
    partition int, payload bytea, dedup_key text, key text default null, headers jsonb default null)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    p shardmq.partition;
    rolled record;
    appended record;
begin
    if payload is not null then
        perform shardmq.check_batch(array[payload], array[key], array[headers]);
    end if;
    perform set_config('lock_timeout', '30s', true),
            set_config('idle_in_transaction_session_timeout', '5s', true);
    if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    perform shardmq.lock_partition(partition);
    select * into p from shardmq.partition x where x.partition = append_once.partition;
    select * into rolled from shardmq.roll(append_once.partition, null);
    if rolled.outcome = 'clock' then
        raise exception 'shardmq: partition % stands on day % and the server''s clock on %: over 31 days later',
            append_once.partition, p.day, shardmq.day_of(shardmq.clock())
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'if that is right: select shardmq.roll(partition, your own clock)';
    end if;
    select * into appended from shardmq.append_batch_once(append_once.partition, p.topic_id, p.generation,
        rolled.day, gen_random_uuid(), 1,
        case when append_once.key is not null then array[append_once.key] end,
        case when append_once.headers is not null then array[append_once.headers] end,
        array[append_once.payload], array[append_once.dedup_key]);
    if appended.outcome not in ('appended', 'duplicate') then
        raise exception 'shardmq: append to partition %: %', append_once.partition,
            replace(appended.outcome, '_', ' ')
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    return appended.ids[1];
end $$;

-- Forgets dedup keys that are older than the window, and those of deleted partitions, where there may be too
-- many for the transaction that deletes: at most so many of each. Old is what both this server's clock and the
-- caller's say. Returns how many. Passes over those that
-- are being replaced. By indexes, also where nearly all keys are of one partition that is not deleted.
create function shardmq.prune_sent_keys(p_most int, p_client_clock timestamptz) returns bigint
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    as $$
        with old as (
            delete from shardmq.sent_key s
             where s.ctid = any (array(
                       select o.ctid from shardmq.sent_key o
                        where o.sent_at < (select least(shardmq.clock(), p_client_clock) - shardmq.dedup_window())
                        order by o.sent_at limit p_most
                          for update skip locked))
            returning true),
        orphaned as (
            delete from shardmq.sent_key s
             where s.ctid = any (array(
                       select o.ctid from shardmq.sent_key o
                        where o.partition = any (array(
                                  select p.partition from shardmq.partition p where p.state = 'deleted'))
                        limit p_most
                          for update skip locked))
            returning true)
        select (select count(*) from old) + (select count(*) from orphaned)
    $$;

-- Makes a partition of a topic under a number that is free, or that an earlier attempt to make a topic of this
-- name has taken and left empty. It has the retention that a new topic has, and no dedup keys.
create function shardmq.make_partition(
    p_partition int, p_topic text, p_topic_id uuid, p_generation int, p_version bigint) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
begin
    perform shardmq.lock_partition(p_partition);
    delete from shardmq.sent_key s
     where s.partition = p_partition
       and not exists (select from shardmq.partition p where p.partition = p_partition and p.state <> 'deleted');
    insert into shardmq.partition as p
           (partition, topic, topic_id, generation, day, topology_version, created_at)
    values (p_partition, p_topic, p_topic_id, p_generation, shardmq.day_of(shardmq.clock()), p_version,
            shardmq.clock())
    on conflict (partition) do update set
        topic = excluded.topic, topic_id = excluded.topic_id, generation = excluded.generation, state = 'open',
        day = greatest(excluded.day, p.day), topology_version = excluded.topology_version,
        low_watermark = 0, created_at = excluded.created_at, deleted_at = null,
        retention_days = default, drop_unread = default, dead_letter_days = default
     where p.state = 'deleted' or (p.topic = excluded.topic and p.topic_id <> excluded.topic_id);
    perform shardmq.make_day(p_partition,
                             (select p.day from shardmq.partition p where p.partition = p_partition));
end $$;

-- Takes partitions for a topic that is being made: those that it has here already, then those that an earlier
-- attempt to make a topic of this name has left empty, then free numbers. A number is free a day after its
-- partition was deleted, and where the control database has not given it to another topic. Where a topic of
-- this name has messages here that the control database does not know, nothing is taken: its messages would
-- be the new topic's.
-- p_known: the numbers of this node that the control database has given away.
create function shardmq.claim_partitions(
    p_topic text, p_topic_id uuid, p_generation int, p_count int, p_version bigint, p_known int[])
    returns setof int
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    v_node int := (select i.node from shardmq.identity i);
    number int;
    taken int := 0;
begin
    if v_node is null then
        raise exception 'shardmq: this database is not registered as a node'
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform shardmq.lock_partition(0);
    number := (select min(p.partition) from shardmq.partition p
                where p.topic = p_topic and p.topic_id <> p_topic_id and p.state <> 'deleted'
                  and shardmq.last_id(p.partition) > 0);
    if number is not null then
        raise exception 'shardmq: partition % has messages of a topic "%" that the control database does not know',
            number, p_topic
            using errcode = 'object_in_use';
    end if;
    for number in
        select n from (
            select p.partition as n, case when p.topic_id = p_topic_id then 0 else 1 end as rank
              from shardmq.partition p
             where p.topic = p_topic and p.state = 'open'
               and (p.topic_id = p_topic_id or p.partition <> all (p_known))
            union all
            select f, 2 from generate_series(10000 + v_node * 100 + 1, 10000 + v_node * 100 + 99) f
             where f <> all (p_known)
               and not exists (select from shardmq.partition p where p.partition = f and
                    (p.state <> 'deleted' or p.deleted_at > shardmq.clock() - interval '1 day'))
            ) c
         order by rank, n limit p_count
    loop
        perform shardmq.make_partition(number, p_topic, p_topic_id, p_generation, p_version);
        taken := taken + 1;
        return next number;
    end loop;
    if taken < p_count then
        raise exception 'shardmq: node % has % free partitions of 99, % are needed', v_node, taken, p_count
            using errcode = 'configuration_limit_exceeded',
                  hint = 'the number of a deleted partition is free a day later; another database can be a node';
    end if;
end $$;

-- Takes back what a creation that failed has taken for a topic: its partitions here, which nobody knows and
-- which are empty. Their numbers are free at once. Returns how many.
create function shardmq.unclaim_partitions(p_topic_id uuid) returns int
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    number int;
    done int := 0;
begin
    perform shardmq.lock_partition(0);
    for number in
        select p.partition from shardmq.partition p
         where p.topic_id = p_topic_id and p.state <> 'deleted' order by 1
    loop
        perform shardmq.lock_partition(number);
        continue when shardmq.last_id(number) > 0;
        perform shardmq.delete_partition(number, p_topic_id);
        update shardmq.partition p set deleted_at = '-infinity' where p.partition = number;
        done := done + 1;
    end loop;
    return done;
end $$;
