-- Messages for people, and what lag is counted with. Functions, not views: a view would keep day
-- tables from being dropped. New objects only.

-- The messages of a partition after an id, in order, at most so many.
create function shardmq.messages(partition int, after_id bigint default 0, max int default 100)
    returns table (id bigint, uid text, topic text, part int, key text, headers jsonb, payload bytea,
                   appended_at timestamptz)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    as $$
declare
    d int;
    got int;
    rest int := messages.max;
begin
    for d in select shardmq.days(messages.partition, (after_id / 100000000 % 1000000)::int) loop
        continue when to_regclass('shardmq.' || shardmq.table_name(messages.partition, d)) is null;
        return query execute format($sql$
            select m.* from (
                select b.base_id + u.n - 1,
                       coalesce(u.headers ->> 'shardmq.uid', b.producer || ':' || b.sequence || ':' || u.n - 1),
                       (select p.topic from shardmq.partition p where p.partition = $1), $1,
                       u.key, u.headers, u.payload, b.appended_at
                  from (select * from shardmq.%1$I t
                         where t.base_id >= coalesce((select max(base_id) from shardmq.%1$I where base_id <= $2), $2)
                         order by t.base_id limit $3 + 1) b,
                       unnest(b.payloads, b.keys, b.headers) with ordinality u (payload, key, headers, n)
                 where b.base_id + u.n - 1 > $2 and u.n <= b.count
                 order by 1 limit $3) m
            $sql$, shardmq.table_name(messages.partition, d)) using messages.partition, after_id, rest;
        get diagnostics got = row_count;
        rest := rest - got;
        exit when rest <= 0;
    end loop;
end $$;

-- One message by its id; no row where there is none.
create function shardmq.message(id bigint)
    returns table (id bigint, uid text, topic text, part int, key text, headers jsonb, payload bytea,
                   appended_at timestamptz)
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select m.* from shardmq.messages(($1 / 100000000000000)::int, $1 - 1, 1) m where m.id = $1
    $$;

-- The last id of a partition, 0 where it has no message.
create function shardmq.last_id(p_partition int) returns bigint
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    d int := (select p.day from shardmq.partition p where p.partition = p_partition);
    last bigint;
begin
    if to_regclass('shardmq.' || shardmq.table_name(p_partition, d)) is not null then
        execute format('select base_id + count - 1 from shardmq.%I order by base_id desc limit 1',
                       shardmq.table_name(p_partition, d)) into last;
    end if;
    return coalesce(last,
        (select x.last_id from shardmq.day x where x.partition = p_partition order by x.day desc limit 1), 0);
end $$;

-- When the message after this id was appended; null where there is none yet.
create function shardmq.next_appended_at(p_partition int, p_id bigint) returns timestamptz
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    d int;
    at timestamptz;
begin
    for d in select shardmq.days(p_partition, (p_id / 100000000 % 1000000)::int) loop
        continue when to_regclass('shardmq.' || shardmq.table_name(p_partition, d)) is null;
        execute format($sql$
            select appended_at from shardmq.%1$I
             where base_id >= coalesce((select max(base_id) from shardmq.%1$I where base_id <= $1), $1)
               and base_id + count - 1 > $1
             order by base_id limit 1
            $sql$, shardmq.table_name(p_partition, d)) into at using p_id;
        exit when at is not null;
    end loop;
    return at;
end $$;

-- The position from which a reader sees exactly what was appended at or after a time: a binary search by
-- day and one by id, since appended_at rises with both and has no index of its own. A table that was dropped
-- counts as before that time.
create function shardmq.position_at(p_partition int, p_at timestamptz) returns bigint
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    all_days int[] := array(select x.day from shardmq.days(p_partition, 0) x (day) order by 1);
    first int := 1;
    past int := cardinality(all_days) + 1;
    half int;
    found int;
    low bigint;
    high bigint;
    middle bigint;
    last record;
    probe record;
    before bigint := greatest((select p.low_watermark - 1 from shardmq.partition p where p.partition = p_partition), 0);
begin
    -- The first day that has a row at or after p_at, or is empty as yet, is in [first, past).
    while first < past loop
        half := first + (past - first) / 2;
        if to_regclass('shardmq.' || shardmq.table_name(p_partition, all_days[half])) is null then
            first := half + 1;
            continue;
        end if;
        execute format('select base_id, count, appended_at from shardmq.%I order by base_id desc limit 1',
                       shardmq.table_name(p_partition, all_days[half])) into last;
        if last.appended_at < p_at then
            before := greatest(before, last.base_id + last.count - 1);
            first := half + 1;
        else
            past := half;
            found := case when last.base_id is not null then all_days[half] end;
            high := last.base_id;
        end if;
    end loop;
    if found is null then
        return before;
    end if;
    -- The first row at or after p_at begins in [low, high].
    low := shardmq.first_id(p_partition, found);
    while low < high loop
        middle := low + (high - low) / 2;
        execute format($sql$
            select base_id, count, appended_at from shardmq.%I
             where base_id <= $1 order by base_id desc limit 1
            $sql$, shardmq.table_name(p_partition, found)) into probe using middle;
        if probe.base_id is null or probe.appended_at < p_at then
            low := coalesce(probe.base_id + probe.count, middle + 1);
            low := greatest(low, middle + 1);
        else
            high := probe.base_id;
        end if;
    end loop;
    return low - 1;
end $$;
