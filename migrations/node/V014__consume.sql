-- Consuming by function, for psql and every other language: partitions under a lease, messages from the
-- group's position on, acknowledgements. The rows are those of the library's consumers, and so is who may
-- change them. New objects only.
--
--   take ─> token ─> pull ─> ack ─> pull ─> .. ─> give_back
--    └──── again, before the lease is over
--
-- Errors of their own, after each of which "take" gives a new token, if the partition is still to be had,
-- and what was pulled before is void:
--   SMQ01  the partition is another's, or the lease is over
--   SMQ02  the group was moved by a seek
--   SMQ03  the server was started anew, or is another: messages that were pulled may not be there any more
-- And one that comes again until the messages that it names can be read, or are acknowledged unread:
--   SMQ04  the next messages are stored and can't be read

-- Which server this is, as a number.
create function shardmq.incarnation() returns bigint
    language sql stable
    return (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint;

-- What a consumer shows for a partition that it has: the fence, and the server that it is of.
create function shardmq.token_of(c shardmq.cursor) returns text
    language sql stable
    return concat_ws(':', c.group_name, c.partition, c.owner, c.epoch, c.reset_epoch, shardmq.incarnation());

-- The cursor that a token stands for, locked to the end of the transaction if asked for.
create function shardmq.held(p_token text, p_lock boolean) returns shardmq.cursor
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    part text[] := string_to_array(p_token, ':');
    c shardmq.cursor;
begin
    if p_token is null
       or p_token !~ '^[a-z0-9][a-z0-9._-]{0,99}:1\d{4}:[0-9a-f-]{36}:\d{1,18}:\d{1,18}:\d{1,18}$' then
        raise exception 'shardmq: % is no token of shardmq.take', coalesce(quote_literal(left(p_token, 300)), 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    if p_lock then
        select * into c from shardmq.cursor x
         where x.group_name = part[1] and x.partition = part[2]::int
           for no key update;
    else
        select * into c from shardmq.cursor x
         where x.group_name = part[1] and x.partition = part[2]::int;
    end if;
    if part[6]::bigint <> shardmq.incarnation() then
        raise exception 'shardmq: the server was started anew, or is another, since partition % was taken', part[2]
            using errcode = 'SMQ03', hint = 'What was pulled is void: take again.';
    elsif (c.owner::text, c.epoch) is distinct from (part[3], part[4]::bigint) then
        raise exception 'shardmq: partition % of group % is another consumer''s, or nobody''s', part[2], part[1]
            using errcode = 'SMQ01', hint = 'What was pulled is void: take again.';
    elsif c.reset_epoch <> part[5]::bigint then
        raise exception 'shardmq: group % was moved in partition %', part[1], part[2]
            using errcode = 'SMQ02', hint = 'What was pulled is void: take again.';
    end if;
    return c;
end $$;

-- The last id up to which all is acknowledged, given one up to which it is and runs beyond it: these may
-- join it, also over the end of a closed day, where ids leap.
create function shardmq.watermark(p_partition int, p_id bigint, p_ahead int8multirange) returns bigint
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    w bigint := p_id;
    d int;
    run int8range;
begin
    while w < upper(p_ahead) - 1 loop
        run := (select r from unnest(p_ahead) r where r @> w + 1);
        if run is null then
            d := (w / 100000000 % 1000000)::int;
            exit when d >= (select p.day from shardmq.partition p where p.partition = p_partition)
                   or w < (select x.last_id from shardmq.day x where (x.partition, x.day) = (p_partition, d));
            d := (select min(x) from shardmq.days(p_partition, d + 1) x);
            run := (select r from unnest(p_ahead) r where r @> shardmq.first_id(p_partition, d));
            exit when run is null;
        end if;
        w := upper(run) - 1;
    end loop;
    return w;
end $$;

-- Takes partitions of a topic on this node for a group, up to "most" with those that this consumer has
-- already, and returns all that it has of the topic, each with the token for "pull" and "ack". Called
-- again it keeps the lease, so call it at least each third of that. A consumer is a uuid of your own choice.
-- A lease that is over may be taken over, unless the server was started in the last five seconds: consumers
-- that are well renew theirs then. "start" counts where this node has not heard of the group: "earliest" or
-- "latest". "missed" is how many messages retention has dropped before the group had them.
create function shardmq.take(topic text, group_name text, member uuid, most int default 1,
                             lease interval default '30 s', start text default 'earliest')
    returns table (partition int, token text, acked_id bigint, missed bigint)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
declare
    wanted int;
begin
    perform shardmq.check_take(take.topic, take.group_name, take.member, take.most, take.lease, take.start);
    insert into shardmq.group_start (topic, group_name, start_at, seen_at)
    select take.topic, take.group_name,
           case take.start when 'latest' then shardmq.clock() else timestamptz 'epoch' end, shardmq.clock()
     where not exists (select from shardmq.group_start g
                        where (g.topic, g.group_name) = (take.topic, take.group_name))
    on conflict do nothing;
    insert into shardmq.member as m (member, group_name, leased_until, lease_secs)
    values (take.member, take.group_name, shardmq.clock() + take.lease, extract(epoch from take.lease))
    on conflict (member) do update
        set leased_until = excluded.leased_until, lease_secs = excluded.lease_secs
     where m.group_name = excluded.group_name;
    if not found then
        raise exception 'shardmq: consumer % is one of another group than %', take.member, take.group_name
            using errcode = 'invalid_parameter_value';
    end if;
    insert into shardmq.cursor (group_name, partition, acked_id)
    select take.group_name, p.partition, shardmq.start_position(take.topic, take.group_name, p.partition)
      from shardmq.partition p
     where p.topic = take.topic and p.state <> 'deleted'
       and not exists (select from shardmq.cursor c
                        where (c.group_name, c.partition) = (take.group_name, p.partition))
     order by p.partition
    on conflict do nothing;
    wanted := take.most - (select count(*) from shardmq.cursor c join shardmq.partition p using (partition)
                            where c.group_name = take.group_name and c.member = take.member
                              and p.topic = take.topic);
    if wanted > 0 then
        perform shardmq.take_free(take.topic, take.group_name, take.member, wanted);
    end if;
    return query
        select c.partition, shardmq.token_of(c), c.acked_id, shardmq.missed(c.partition, c.acked_id)
          from shardmq.cursor c join shardmq.partition p on p.partition = c.partition
         where c.group_name = take.group_name and c.member = take.member
           and p.topic = take.topic and p.state <> 'deleted'
         order by c.partition;
end $$;

-- Refuses what "take" can't be asked for.
create function shardmq.check_take(p_topic text, p_group text, p_member uuid, p_most int, p_lease interval,
                                   p_start text)
    returns void
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
begin
    if not exists (select from shardmq.partition p where p.topic = p_topic and p.state <> 'deleted') then
        raise exception 'shardmq: this node has no partition of topic %', coalesce(quote_literal(p_topic), 'null')
            using errcode = 'undefined_object';
    elsif p_group is null or p_group !~ '^[a-z0-9][a-z0-9._-]{0,99}$' then
        raise exception 'shardmq: % is no name of a group: [a-z0-9][a-z0-9._-]{0,99}',
            coalesce(quote_literal(p_group), 'null')
            using errcode = 'invalid_parameter_value';
    elsif p_member is null then
        raise exception 'shardmq: a consumer needs a uuid' using errcode = 'invalid_parameter_value';
    elsif coalesce(p_most, 0) not between 1 and 99 then
        raise exception 'shardmq: a consumer takes 1 to 99 partitions, not %', coalesce(p_most::text, 'null')
            using errcode = 'invalid_parameter_value';
    elsif p_lease is null or p_lease not between '1 s' and '10 min' then
        raise exception 'shardmq: a lease is of 1 second to 10 minutes, not %', coalesce(p_lease::text, 'null')
            using errcode = 'invalid_parameter_value';
    elsif p_start is null or p_start not in ('earliest', 'latest') then
        raise exception 'shardmq: a group starts at ''earliest'' or ''latest'', not %',
            coalesce(quote_literal(p_start), 'null')
            using errcode = 'invalid_parameter_value';
    end if;
end $$;

-- Takes so many free partitions: those without a member, and those whose member's lease is over. Rows
-- locked by others are passed over. Each acquisition draws a new owner and raises the epoch, so that what
-- an earlier owner sends later is refused.
create function shardmq.take_free(p_topic text, p_group text, p_member uuid, p_most int) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with live as (
            select m.member from shardmq.member m where shardmq.is_live(m)),
        seen as materialized (
            select c.partition, c.epoch
              from shardmq.cursor c join shardmq.partition p using (partition)
             where c.group_name = p_group and p.topic = p_topic and p.state <> 'deleted'
               and (c.member is null
                    or not exists (select from live where live.member = c.member)
                       and pg_postmaster_start_time() < clock_timestamp() - interval '5 s')),
        -- Whoever took one since this snapshot has raised its epoch, and may be live without being in it.
        free as (
            select c.partition
              from seen join shardmq.cursor c
                on c.group_name = p_group and c.partition = seen.partition and c.epoch = seen.epoch
             order by c.partition limit p_most
               for no key update of c skip locked)
        update shardmq.cursor c
           set member = p_member, owner = gen_random_uuid(), epoch = c.epoch + 1,
               acked_id = shardmq.watermark(c.partition, c.acked_id, c.acked_ahead),
               acked_ahead = c.acked_ahead - int8multirange(int8range(
                   null, shardmq.watermark(c.partition, c.acked_id, c.acked_ahead), '[]'))
          from free
         where c.group_name = p_group and c.partition = free.partition
    $$;

-- The next messages of a partition that are not acknowledged, in order: at most so many, and so many bytes
-- of payload, but at least one where there is one. Nothing moves: the same messages come again until they
-- are acknowledged. With "hold" the group's position is locked to the end of the transaction: what is pulled
-- in it, done in it and acknowledged in it is done once.
create function shardmq.pull(token text, most int default 100, most_bytes int default 16777216,
                             hold boolean default false)
    returns table (id bigint, uid text, key text, headers jsonb, payload bytea, appended_at timestamptz)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
#variable_conflict use_column
declare
    c shardmq.cursor;
    low bigint;
    missed bigint;
    d int;
    at_day int;
    last bigint;
    b record;
    stretch int;
    scanned int;
    got int;
    rest int := most;
    bytes bigint := 0;
    why text;
begin
    if coalesce(most, 0) not between 1 and 100000 then
        raise exception 'shardmq: 1 to 100000 messages are pulled at a time, not %', coalesce(most::text, 'null')
            using errcode = 'invalid_parameter_value';
    elsif coalesce(most_bytes, 0) < 1 then
        raise exception 'shardmq: at least one byte is pulled, not %', coalesce(most_bytes::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    c := shardmq.held(token, coalesce(hold, false));
    last := c.acked_id;
    if not exists (select from shardmq.member m where m.member = c.member and shardmq.is_live(m)) then
        raise exception 'shardmq: the lease of partition % of group % is over', c.partition, c.group_name
            using errcode = 'SMQ01', hint = 'Take again.';
    end if;
    missed := shardmq.missed(c.partition, c.acked_id);
    if missed > 0 then
        raise warning 'shardmq: retention dropped % messages of partition % before group % had them',
            missed, c.partition, c.group_name;
    end if;
    -- Days that retention has dropped are not in the list. All but its last one are closed when it is made,
    -- and read after that: none is left with a message in it. The last one is not left.
    for d in select shardmq.days(c.partition, (last / 100000000 % 1000000)::int) loop
        begin
            loop
                scanned := 0;
                stretch := least(rest, 512) + 1;
                for b in execute format($sql$
                    select * from shardmq.%1$I t
                     where t.base_id >= coalesce((select max(base_id) from shardmq.%1$I where base_id <= $1), $1)
                     order by t.base_id limit $2
                    $sql$, shardmq.table_name(c.partition, d)) using last, stretch
                loop
                    scanned := scanned + 1;
                    continue when b.base_id + b.count - 1 <= last;
                    if not c.acked_ahead
                           @> int8range(greatest(b.base_id, last + 1), b.base_id + b.count - 1, '[]') then
                        if rest < most and bytes + b.bytes > most_bytes then
                            return;
                        end if;
                        why := shardmq.misfit(b.count, b.payloads, b.keys, b.headers);
                        if why is not null then
                            -- What is before it comes first.
                            if rest < most then
                                return;
                            end if;
                            raise exception 'shardmq: messages % to % can''t be read: %',
                                greatest(b.base_id, last + 1), b.base_id + greatest(b.count, 1) - 1, why
                                using errcode = 'SMQ04', hint = 'To go on without them, acknowledge the last one.';
                        end if;
                        return query
                            select v.id, v.uid, v.key, v.headers, v.payload, b.appended_at
                              from shardmq.unpacked(b.base_id, b.producer, b.sequence, b.payloads, b.keys, b.headers,
                                                    last, c.acked_ahead) v
                             where b.bytes <= most_bytes or v.bytes_before < most_bytes
                             order by v.id limit rest;
                        get diagnostics got = row_count;
                        rest := rest - got;
                        bytes := bytes + b.bytes;
                        if rest = 0 or bytes > most_bytes then
                            return;
                        end if;
                    end if;
                    last := b.base_id + b.count - 1;
                end loop;
                exit when scanned < stretch;
            end loop;
        exception
            when data_corrupted or internal_error or data_exception then
                if rest < most then
                    return;
                end if;
                raise exception 'shardmq: the next message of partition % behind % can''t be read: %',
                    c.partition, last, sqlerrm
                    using errcode = 'SMQ04', hint = 'To go on without it, acknowledge it.';
            when undefined_table then
                -- Retention has dropped it since, or the open day has none yet.
                select p.low_watermark, p.day into low, at_day from shardmq.partition p where p.partition = c.partition;
                if d < at_day and shardmq.first_id(c.partition, d) + 99999998 >= low then
                    raise;
                end if;
        end;
    end loop;
end $$;

-- The messages of a row after a position that are not acknowledged ahead, each with the bytes of those
-- before it.
create function shardmq.unpacked(p_base_id bigint, p_producer uuid, p_sequence bigint, p_payloads bytea[],
                                 p_keys text[], p_headers jsonb[], p_position bigint, p_ahead int8multirange)
    returns table (id bigint, uid text, key text, headers jsonb, payload bytea, bytes_before bigint)
    language sql stable
    begin atomic
        select p_base_id + u.n - 1,
               coalesce(u.headers ->> 'shardmq.uid', p_producer || ':' || p_sequence || ':' || u.n - 1),
               u.key, u.headers, u.payload,
               sum(octet_length(u.payload)) over (order by u.n) - octet_length(u.payload)
          from unnest(p_payloads, p_keys, p_headers) with ordinality u (payload, key, headers, n)
         where p_base_id + u.n - 1 > p_position and not p_ahead @> p_base_id + u.n - 1;
    end;

-- Acknowledges a message and all before it in its partition, with the token that it was pulled with. False
-- where it was acknowledged before. In a transaction it counts if that is committed; the group's position in
-- this one partition is locked until then.
create function shardmq.ack(token text, id bigint) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    c shardmq.cursor := shardmq.held(token, true);
    done bigint;
begin
    -- Not the day of a message that is appended later: nothing may count as done that is not there.
    if (ack.id / 100000000000000 = c.partition
        and (exists (select from shardmq.day d
                      where d.partition = c.partition and ack.id between d.first_id and d.last_id)
             or ack.id between (select shardmq.first_id(p.partition, p.day) from shardmq.partition p
                                 where p.partition = c.partition) and shardmq.last_id(c.partition))) is not true then
        raise exception 'shardmq: partition % has no message %', c.partition, coalesce(ack.id::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    if ack.id <= c.acked_id then
        return false;
    end if;
    done := shardmq.watermark(c.partition, ack.id, c.acked_ahead);
    update shardmq.cursor x
       set acked_id = done, acked_ahead = x.acked_ahead - int8multirange(int8range(null, done, '[]'))
     where x.group_name = c.group_name and x.partition = c.partition;
    return true;
end $$;

-- Gives back all that a consumer has of a group on this node, and ends its lease. Returns how many partitions
-- were free at once; one whose position a transaction has locked is free when that has ended.
create function shardmq.give_back(group_name text, member uuid) returns int
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with gone as (
            delete from shardmq.member m where m.group_name = $1 and m.member = $2),
        own as (
            select c.partition from shardmq.cursor c
             where c.group_name = $1 and c.member = $2
             order by c.partition
               for no key update skip locked),
        free as (
            update shardmq.cursor c set member = null, owner = null
              from own
             where c.group_name = $1 and c.partition = own.partition and c.member = $2
            returning c.partition)
        select count(*)::int from free
    $$;
