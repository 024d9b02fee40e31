-- Day tables: made, and left behind at midnight. The functions run with their owner's rights, since a
-- producer's role can't create tables. New objects only.

-- Limits on single keys, headers and payloads, for CHECKs. Keys and payloads are looked at one by one
-- only where all together are longer than one may be. To be joined with nothing unpacks an array that
-- comes compressed from another table, whose size would be that on disk.
create function shardmq.keys_fit(keys text[]) returns boolean
    language sql immutable
    return (select coalesce(bool_and(octet_length(k) <= 1024), true) from unnest(keys) k);

create function shardmq.headers_fit(headers jsonb[]) returns boolean
    language sql immutable
    return (
        select coalesce(bool_and(jsonb_typeof(h) = 'object' and
            (select coalesce(sum(octet_length(e.key) + octet_length(e.value)), 0) <= 65536
               from jsonb_each_text(case when jsonb_typeof(h) = 'object' then h else '{}' end) e)), true)
          from unnest(headers) h);

create function shardmq.payloads_fit(payloads bytea[]) returns boolean
    language sql immutable
    return (select coalesce(bool_and(octet_length(m) <= 67108864), true) from unnest(payloads) m);

-- Why the arrays of a row are not those of as many messages as it says; null where they are.
create function shardmq.misfit(p_count int, p_payloads bytea[], p_keys text[], p_headers jsonb[]) returns text
    language sql immutable
    set search_path = pg_catalog, pg_temp
    as $$
        select case
            when p_count is null or p_count < 1 or cardinality(p_payloads) is distinct from p_count
                then format('it says that it has %s messages, and has %s payloads', p_count, cardinality(p_payloads))
            when p_keys is not null and cardinality(p_keys) <> p_count
                then format('it says that it has %s messages, and has %s keys', p_count, cardinality(p_keys))
            when p_headers is not null and cardinality(p_headers) <> p_count
                then format('it says that it has %s messages, and has %s headers', p_count, cardinality(p_headers))
            when exists (select from unnest(p_payloads) m where m is null) then 'a payload is null'
            when exists (select from unnest(p_headers) h where jsonb_typeof(h) <> 'object')
                then 'the headers of a message are no JSON object'
            end
    $$;

-- Refuses what no batch can have, and names the limit.
create function shardmq.check_batch(p_payloads bytea[], p_keys text[], p_headers jsonb[]) returns void
    language plpgsql immutable
    set search_path = pg_catalog, pg_temp
    as $$
declare
    messages int := coalesce(cardinality(p_payloads), 0);
    a record;
begin
    if messages not between 1 and 100000 then
        raise exception 'shardmq: a batch has 1 to 100000 messages, not %', messages
            using errcode = 'invalid_parameter_value';
    end if;
    for a in
        select * from (values
            ('payloads', cardinality(p_payloads), array_ndims(p_payloads), array_lower(p_payloads, 1)),
            ('keys', cardinality(p_keys), array_ndims(p_keys), array_lower(p_keys, 1)),
            ('headers', cardinality(p_headers), array_ndims(p_headers), array_lower(p_headers, 1)))
            v (name, length, dimensions, first)
         where v.length is not null
    loop
        if a.length <> messages then
            raise exception 'shardmq: % % for % messages: there must be one for each, or null in place of the array',
                a.length, a.name, messages using errcode = 'check_violation';
        elsif a.dimensions <> 1 or a.first <> 1 then
            raise exception 'shardmq: the array of % has % dimensions and begins at %: it must have one, and begin at 1',
                a.name, a.dimensions, a.first using errcode = 'check_violation';
        end if;
    end loop;
    if array_position(p_payloads, null) is not null then
        raise exception 'shardmq: payload % is null', array_position(p_payloads, null)
            using errcode = 'check_violation', hint = 'A message without content has an empty payload.';
    elsif not shardmq.payloads_fit(p_payloads) then
        raise exception 'shardmq: a payload is longer than 64 MiB' using errcode = 'program_limit_exceeded';
    elsif not shardmq.keys_fit(p_keys) then
        raise exception 'shardmq: a key is longer than 1024 bytes' using errcode = 'check_violation';
    elsif exists (select from unnest(p_headers) h where jsonb_typeof(h) <> 'object') then
        raise exception 'shardmq: the headers of a message are a JSON object, and nothing else'
            using errcode = 'check_violation';
    elsif exists (select from unnest(p_headers) h, jsonb_object_keys(h) k (name) where left(k.name, 8) = 'shardmq.') then
        raise exception 'shardmq: header names that begin with "shardmq." are reserved'
            using errcode = 'invalid_parameter_value';
    elsif p_headers is not null and not shardmq.headers_fit(p_headers) then
        raise exception 'shardmq: the headers of a message have more than 65536 bytes, names and values together'
            using errcode = 'check_violation';
    end if;
end $$;

-- Makes the table of a partition and day if it is missing. lz4 where the server has it: two to four
-- times as quick as pglz.
create function shardmq.make_day(p_partition int, p_day int) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set client_min_messages = warning
    as $$
declare
    compression text := '';
    first_id bigint := shardmq.first_id(p_partition, p_day);
begin
    perform shardmq.lock_partition(p_partition);
    if to_regclass('shardmq.' || shardmq.table_name(p_partition, p_day)) is not null then
        return;
    end if;
    if exists (select from pg_settings
                where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        compression := 'compression lz4';
    end if;
    execute format($sql$
        create table shardmq.%1$I (
            base_id bigint not null primary key,
            count int not null,
            bytes int not null,
            appended_at timestamptz not null,
            producer uuid not null,
            sequence bigint not null,
            keys text[] %2$s,
            headers jsonb[] %2$s,
            payloads bytea[] %2$s not null,
            unique (producer, sequence),
            constraint ids_of_the_day check (base_id >= %3$s and base_id + count - 1 <= %4$s),
            constraint a_payload_for_each_message
                check (count > 0 and count = cardinality(payloads) and array_ndims(payloads) = 1
                       and array_lower(payloads, 1) = 1),
            constraint no_payload_is_null check (array_position(payloads, null) is null),
            constraint bytes_up_to_134217728 check (bytes between 0 and 134217728),
            constraint time_is_finite check (isfinite(appended_at)),
            constraint a_key_or_null_for_each_message
                check (keys is null or cardinality(keys) = count and array_ndims(keys) = 1
                       and array_lower(keys, 1) = 1),
            constraint headers_or_null_for_each_message
                check (headers is null or cardinality(headers) = count and array_ndims(headers) = 1
                       and array_lower(headers, 1) = 1),
            constraint keys_of_1024_bytes
                check (keys is null or pg_column_size(keys || '{}'::text[]) <= 1024 or shardmq.keys_fit(keys)),
            constraint payloads_of_67108864_bytes
                check (pg_column_size(payloads || '{}'::bytea[]) <= 67108864 or shardmq.payloads_fit(payloads)),
            constraint headers_are_objects_of_65536_bytes check (headers is null or shardmq.headers_fit(headers))
        ) with (autovacuum_vacuum_insert_scale_factor = 1, toast.autovacuum_vacuum_insert_scale_factor = 1)
        $sql$, shardmq.table_name(p_partition, p_day), compression, first_id, first_id + 99999998);
end $$;

-- Tables for today and the days ahead, so that midnight finds them made. Not worth a long wait: what is
-- not made here is made on demand.
create function shardmq.make_days_ahead(p_partition int, p_days int) returns void
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '300ms'
    as $$
declare
    today int := shardmq.day_of(shardmq.clock());
    ahead int;
begin
    perform shardmq.lock_partition(p_partition);
    -- Only near the day that takes appends now: far from it the clock is wrong, or nobody appends.
    if not exists (select from shardmq.partition p
                    where p.partition = p_partition and p.state = 'open' and p.day <= today
                      and shardmq.day_start(today) <= shardmq.day_start(p.day) + interval '96 hours') then
        return;
    end if;
    for ahead in 0 .. least(p_days, 7) loop
        perform shardmq.make_day(p_partition,
            shardmq.day_of(shardmq.day_start(today) + ahead * interval '24 hours'));
    end loop;
end $$;

-- Moves a partition to the server's date: makes the table, records the finished day, then moves
-- "day". Refused (outcome "clock") when the caller's clock is more than an hour short of that date;
-- without a caller's clock, when the leap is longer than 31 days: one leap of a server's clock must
-- not pin a partition to a far day.
create function shardmq.roll(p_partition int, p_client_clock timestamptz, out outcome text, out day int)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    p shardmq.partition;
    today int;
    finished shardmq.day;
begin
    perform shardmq.lock_partition(p_partition);
    select * into p from shardmq.partition x where x.partition = p_partition;
    if not found or p.state = 'deleted' then
        outcome := 'unknown_partition';
        return;
    end if;
    day := p.day;
    today := shardmq.day_of(shardmq.clock());
    if today <= p.day then
        perform shardmq.make_day(p_partition, p.day);
        outcome := 'current';
        return;
    end if;
    if coalesce(p_client_clock < shardmq.day_start(today) - interval '1 hour',
                shardmq.day_start(today) > shardmq.day_start(p.day) + interval '31 days') then
        outcome := 'clock';
        return;
    end if;
    perform shardmq.make_day(p_partition, today);
    if to_regclass('shardmq.' || shardmq.table_name(p_partition, p.day)) is not null then
        -- The last row by its table's own column: the name alone would be the first row's output column.
        execute format($sql$
            select (select f.base_id from shardmq.%1$I f order by f.base_id limit 1),
                   l.base_id + l.count - 1
              from shardmq.%1$I l order by l.base_id desc limit 1
            $sql$, shardmq.table_name(p_partition, p.day))
           into finished.first_id, finished.last_id;
        if finished.last_id is not null then
            finished.count := finished.last_id - finished.first_id + 1;
            insert into shardmq.day (partition, day, first_id, last_id, count)
            values (p_partition, p.day, finished.first_id, finished.last_id, finished.count)
            on conflict do nothing;
        end if;
    end if;
    -- A late original that names a day before today is turned away by that. One of a client whose date
    -- was ahead of this partition may name today, or a later day.
    delete from shardmq.refused r where r.partition = p_partition and r.named < today;
    update shardmq.partition x set day = today where x.partition = p_partition;
    outcome := 'rolled';
    day := today;
end $$;
