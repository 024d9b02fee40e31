-- Publishing, taking back, and putting back. The functions run with their owner's rights: whoever
-- publishes needs none on the tables. New objects only.

-- Wakes the relay where it sleeps, when the caller's transaction commits. A notification costs every
-- commit of the server, so there is none while the relay is awake: whoever draws an id before it reads
-- that the relay is awake has drawn it before the relay last looked whether some were drawn. There is
-- none either where the server's queue of notifications is nearly full: the caller's commit would fail
-- with it, and the relay looks by itself every two seconds.
create function shardmq.wake_relay() returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    as $$
begin
    if (select f.last_value from shardmq.outbox_flag f) = 1 and pg_notification_queue_usage() < 0.9 then
        perform pg_notify('shardmq_outbox', '');
    end if;
end $$;

-- Publishes a message when the caller's transaction commits, or at a later time. Returns the id of the
-- row, by which cancel() takes it back for as long as no relay has taken it.
create function shardmq.publish(
    topic text, payload bytea, key text default null, headers jsonb default null,
    deliver_at timestamptz default null)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    now timestamptz := shardmq.clock();
    drawn bigint;
begin
    -- As draw_outbox_id() and wake_relay() do: a call costs as much as the insert.
    perform pg_current_xact_id();
    drawn := nextval('shardmq.outbox_id');
    if publish.deliver_at > now then
        insert into shardmq.delayed (id, due_at, topic, key, headers, payload, published_at)
        values (drawn, publish.deliver_at, publish.topic, publish.key, publish.headers, publish.payload, now);
        if publish.deliver_at > now + interval '10 seconds' then
            -- It is found before it is due.
            return drawn;
        end if;
    else
        insert into shardmq.outbox (id, topic, key, headers, payload, published_at)
        values (drawn, publish.topic, publish.key, publish.headers, publish.payload, now);
    end if;
    if (select f.last_value from shardmq.outbox_flag f) = 1 and pg_notification_queue_usage() < 0.9 then
        perform pg_notify('shardmq_outbox', '');
    end if;
    return drawn;
end $$;

-- Messages for later, after a delay or at a time, in one call with a token of its own: a repeat returns
-- the ids of the first, and stores nothing.
create function shardmq.deliver_all(
    p_token uuid, p_topic text, p_deliver_at timestamptz, p_delay_secs float8,
    p_payloads bytea[], p_keys text[], p_headers jsonb[])
    returns bigint[]
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    now timestamptz := shardmq.clock();
    due timestamptz := greatest(now, coalesce(p_deliver_at, now + make_interval(secs => p_delay_secs)));
    drawn bigint[];
begin
    drawn := array(select shardmq.draw_outbox_id() from generate_series(1, cardinality(p_payloads)));
    insert into shardmq.delayed_call (token, ids, called_at) values (p_token, drawn, now)
    on conflict (token) do nothing;
    if not found then
        return (select c.ids from shardmq.delayed_call c where c.token = p_token);
    end if;
    insert into shardmq.delayed (id, due_at, topic, key, headers, payload, published_at)
    select m.id, due, p_topic, m.key, m.headers, m.payload, now
      from unnest(drawn, p_keys, p_headers, p_payloads) m (id, key, headers, payload);
    if due < now + interval '10 seconds' then
        perform shardmq.wake_relay();
    end if;
    return drawn;
end $$;

-- Takes a message back that no relay has taken yet. False: it is on its way, or gone.
create function shardmq.cancel(id bigint) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
begin
    delete from shardmq.delayed d where d.id = cancel.id;
    if found then
        return true;
    end if;
    delete from shardmq.outbox o where o.id = cancel.id;
    return found;
end $$;

-- Puts messages that were set aside back into the outbox: of a topic, or with some text in the error;
-- without either, all. Under ids of their own, as if they were published now. What the outbox does not
-- admit stays. Returns how many.
create function shardmq.outbox_revive(topic text default null, error_like text default null)
    returns bigint
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    revived bigint;
begin
    with gone as (
        delete from shardmq.outbox_dead d
         where (outbox_revive.topic is null or d.topic = outbox_revive.topic)
           and (outbox_revive.error_like is null or d.error like outbox_revive.error_like)
           and d.topic ~ '^[a-z0-9][a-z0-9._-]{0,99}$'
           and (d.key is null or octet_length(d.key) <= 1024)
           and (d.headers is null or shardmq.outbox_headers_fit(d.headers))
           and octet_length(d.payload) <= 67108864
        returning d.id, d.uid, d.topic, d.key, d.headers, d.payload
    )
    insert into shardmq.outbox (uid, topic, key, headers, payload, published_at)
    select g.uid, g.topic, g.key, g.headers, g.payload, shardmq.clock() from gone g order by g.id;
    get diagnostics revived = row_count;
    perform shardmq.wake_relay();
    return revived;
end $$;

-- Takes or keeps the relaying from here, for some seconds, also under a name that the holder had before: ours,
-- another, or other_cluster. A node belongs to its cluster, any other database to the first that relays
-- from it. A time that no lease can have ended at is that of a clock that was wrong.
create function shardmq.keep_relaying(p_holder uuid, p_former uuid[], p_cluster uuid, p_lease_secs float8)
    returns text
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    now timestamptz := shardmq.clock();
    lease interval := make_interval(secs => p_lease_secs);
    belongs_to uuid;
begin
    if to_regclass('shardmq.identity') is not null then
        select i.cluster into belongs_to from shardmq.identity i;
    end if;
    if belongs_to is null then
        select r.cluster into belongs_to from shardmq.outbox_relay r;
    end if;
    if belongs_to <> p_cluster then
        return 'other_cluster';
    end if;
    update shardmq.outbox_relay x set cluster = p_cluster, holder = p_holder, until = now + lease
     where x.holder is null or x.holder = p_holder or x.holder = any (p_former)
        or x.until < now or x.until > now + 2 * lease;
    return case when found then 'ours' else 'another' end;
end $$;

-- Gives the relaying up.
create function shardmq.end_relaying(p_holder uuid) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        update shardmq.outbox_relay set holder = null, until = '-infinity' where holder = p_holder
    $$;

-- Whoever may use the schema may publish; what takes messages back, puts them back or relays is for the
-- owner and whom it is granted to. Ids follow each other: they are no secret.
revoke execute on all functions in schema shardmq from public;
grant execute on function
    shardmq.publish(text, bytea, text, jsonb, timestamptz),
    shardmq.deliver_all(uuid, text, timestamptz, float8, bytea[], text[], jsonb[])
    to public;
