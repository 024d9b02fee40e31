-- Appending by function: repeats of a batch whose fate is unknown, other languages, and poolers
-- without prepared statements. The library's own first attempt is a pipeline with the same guards.
-- New objects only.

-- Where a producer's batch is, looking in every day since that of the first attempt. The caller holds
-- the partition's lock.
create function shardmq.find_batch(p_partition int, p_producer uuid, p_sequence bigint, p_first_day int)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    d int;
    found_id bigint;
begin
    for d in select shardmq.days(p_partition, p_first_day) loop
        continue when to_regclass('shardmq.' || shardmq.table_name(p_partition, d)) is null;
        execute format('select base_id from shardmq.%I where producer = $1 and sequence = $2',
                       shardmq.table_name(p_partition, d))
           into found_id using p_producer, p_sequence;
        if found_id is not null then
            return found_id;
        end if;
    end loop;
    return null;
end $$;

-- Appends a batch, or says why not: appended, duplicate (with the first base_id), refused, overtaken,
-- unknown_partition, wrong_topic, wrong_generation, wrong_day (day and today say which is right),
-- sealed, full. All but the first two are final: the batch is not there.
create function shardmq.append_batch(
    p_partition int, p_topic uuid, p_generation int, p_day int, p_first_day int,
    p_producer uuid, p_sequence bigint, p_bytes int,
    p_keys text[], p_headers jsonb[], p_payloads bytea[],
    out outcome text, out base_id bigint, out day int, out today int)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    p shardmq.partition;
    last record;
    overtaken boolean;
    inserted int;
begin
    perform shardmq.lock_partition(p_partition);
    select * into p from shardmq.partition x where x.partition = p_partition;
    if not found or p.state = 'deleted' then
        outcome := 'unknown_partition';
        return;
    end if;
    day := p.day;
    today := shardmq.day_of(shardmq.clock());
    base_id := shardmq.find_batch(p_partition, p_producer, p_sequence, p_first_day);
    if base_id is not null then
        -- Its commit may not have reached the disk or the standby: a transaction that writes WAL of
        -- its own waits for both.
        perform pg_logical_emit_message(true, 'shardmq', '');
        outcome := 'duplicate';
        return;
    end if;
    if exists (select from shardmq.refused r
                where (r.partition, r.producer, r.sequence) = (p_partition, p_producer, p_sequence)) then
        outcome := 'refused';
    elsif p.topic_id <> p_topic then
        outcome := 'wrong_topic';
    elsif p.generation <> p_generation then
        outcome := 'wrong_generation';
    elsif p.day <> p_day or today > p.day
          or to_regclass('shardmq.' || shardmq.table_name(p_partition, p.day)) is null then
        outcome := 'wrong_day';
    elsif p.state <> 'open' then
        outcome := 'sealed';
    end if;
    if outcome is not null then
        return;
    end if;
    execute format($sql$
        select exists (select from shardmq.%1$I where producer = $1 and sequence > $2)
        $sql$, shardmq.table_name(p_partition, p.day))
       into overtaken using p_producer, p_sequence;
    if overtaken then
        outcome := 'overtaken';
        return;
    end if;
    execute format($sql$
        select base_id + count as next_id, appended_at from shardmq.%1$I order by base_id desc limit 1
        $sql$, shardmq.table_name(p_partition, p.day))
       into last;
    base_id := coalesce(last.next_id, shardmq.first_id(p_partition, p.day));
    if base_id + cardinality(p_payloads) - 1 > shardmq.first_id(p_partition, p.day) + 99999998 then
        outcome := 'full';
        base_id := null;
        return;
    end if;
    execute format($sql$
        insert into shardmq.%1$I
            (base_id, count, bytes, appended_at, producer, sequence, keys, headers, payloads)
        values ($1, cardinality($2), $3, greatest(shardmq.clock(), $4, $5), $6, $7, $8, $9, $2)
        $sql$, shardmq.table_name(p_partition, p.day))
      using base_id, p_payloads, p_bytes, last.appended_at, shardmq.day_start(p.day),
            p_producer, p_sequence, p_keys, p_headers;
    get diagnostics inserted = row_count;
    if inserted <> 1 then
        raise exception 'shardmq: a trigger or rule kept the batch from being stored in partition %', p_partition
            using errcode = 'integrity_constraint_violation';
    end if;
    outcome := 'appended';
end $$;

-- Asks for a batch under the lock. Where it is not there (null), a row in "refused" is left, so that
-- a late original is turned away: the answer is final. The row stays until the partition has left the
-- latest day that an attempt has named.
create function shardmq.fence_batch(
    p_partition int, p_producer uuid, p_sequence bigint, p_first_day int, p_latest_day int)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    found_id bigint;
begin
    perform shardmq.lock_partition(p_partition);
    found_id := shardmq.find_batch(p_partition, p_producer, p_sequence, p_first_day);
    if found_id is null then
        insert into shardmq.refused as r (partition, producer, sequence, named)
        values (p_partition, p_producer, p_sequence, p_latest_day)
        on conflict (partition, producer, sequence) do update
           set named = greatest(r.named, excluded.named);
    else
        perform pg_logical_emit_message(true, 'shardmq', '');
    end if;
    return found_id;
end $$;

-- The producer under which a session's batches are stored that name one: made of the role that has logged in and
-- the uuid it names. So a role can only repeat, and only overtake, what it has appended itself: not the batches of
-- another role, and none of the library's.
create function shardmq.producer_of_session(p_producer uuid) returns uuid
    language sql stable
    return encode(substr(sha256(convert_to(session_user::text || ' ' || p_producer::text, 'UTF8')), 1, 16),
                  'hex')::uuid;

-- For every other language: appends a batch to a partition and returns its first id. It holds the
-- partition's lock to the end of its transaction, so call it alone. With a producer and a sequence of
-- your own (rising by batch), a repeat by the same role returns the first id again; the uid of its messages has a
-- producer that is made of your role and yours.
create function shardmq.append(
    partition int, payloads bytea[], keys text[] default null, headers jsonb[] default null,
    producer uuid default null, sequence bigint default null)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    p shardmq.partition;
    rolled record;
    appended record;
    bytes bigint;
begin
    if (producer is null) <> (sequence is null) then
        raise exception 'shardmq: producer and sequence go together' using errcode = 'invalid_parameter_value';
    end if;
    perform shardmq.check_batch(payloads, keys, headers);
    bytes := (select coalesce(sum(octet_length(m)), 0) from unnest(payloads) m)
           + (select coalesce(sum(octet_length(k)), 0) from unnest(keys) k)
           + (select coalesce(sum(octet_length(h::text)), 0) from unnest(headers) h);
    if bytes > 134217728 then
        raise exception 'shardmq: the batch has % bytes, the limit is 134217728', bytes
            using errcode = 'program_limit_exceeded';
    end if;
    perform set_config('lock_timeout', '30s', true),
            set_config('idle_in_transaction_session_timeout', '5s', true);
    if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    perform shardmq.lock_partition(partition);
    select * into p from shardmq.partition x where x.partition = append.partition;
    select * into rolled from shardmq.roll(append.partition, null);
    if rolled.outcome = 'clock' then
        raise exception 'shardmq: partition % stands on day % and the server''s clock on %: over 31 days later',
            append.partition, p.day, shardmq.day_of(shardmq.clock())
            using errcode = 'object_not_in_prerequisite_state',
                  hint = 'if that is right: select shardmq.roll(partition, your own clock)';
    end if;
    select * into appended from shardmq.append_batch(append.partition, p.topic_id, p.generation, rolled.day, 0,
        coalesce(shardmq.producer_of_session(append.producer), gen_random_uuid()),
        coalesce(append.sequence, 1), bytes::int,
        append.keys, append.headers, append.payloads);
    if appended.outcome not in ('appended', 'duplicate') then
        raise exception 'shardmq: append to partition %: %', append.partition, replace(appended.outcome, '_', ' ')
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    return appended.base_id;
end $$;
