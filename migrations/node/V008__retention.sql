-- Retention: whole days are dropped, the low watermark first. Adds columns with constant defaults, so
-- that no table is rewritten; takes a short exclusive lock on shardmq.partition and shardmq.day.

alter table shardmq.partition
    add column retention_days int not null default 7 check (retention_days between 1 and 3650),
    add column drop_unread boolean not null default false;
comment on column shardmq.partition.retention_days is 'How many days a day is kept after its end';
comment on column shardmq.partition.drop_unread is
    'Whether a day is dropped that some group has not finished: else it is kept';

alter table shardmq.day
    add column dropped boolean not null default false,
    add column frozen boolean not null default false;
comment on column shardmq.day.dropped is
    'Below the low watermark; the row stays, to say how many messages a late reader missed';
comment on column shardmq.day.frozen is 'Had its one VACUUM (FREEZE)';

create table shardmq.upkeep (
    one_row boolean primary key default true check (one_row),
    holder uuid not null,
    until timestamptz not null
) with (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0,
        vacuum_truncate = off);
comment on table shardmq.upkeep is 'The client that looks after this node, until its lease is over';

-- Only days that are there.
create or replace function shardmq.days(p_partition int, p_from int) returns setof int
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select d.day from shardmq.day d
         where d.partition = p_partition and d.day >= p_from and not d.dropped
        union
        select p.day from shardmq.partition p
         where p.partition = p_partition and p.day >= p_from and p.state <> 'deleted'
        order by 1
    $$;

-- Takes or keeps the upkeep of this node, for so many seconds. False: it is another's. A lease that ends later
-- than any could is of a time when this server's clock was ahead: it counts as over.
create function shardmq.keep_up(p_holder uuid, p_secs float8) returns boolean
    language sql volatile
    set search_path = pg_catalog, pg_temp
    as $$
        with taken as (
            insert into shardmq.upkeep as u (holder, until)
            values (p_holder, shardmq.clock() + make_interval(secs => p_secs))
            on conflict (one_row) do update set holder = excluded.holder, until = excluded.until
             where u.holder = p_holder or u.until < shardmq.clock()
                or u.until > shardmq.clock() + make_interval(secs => 2 * p_secs)
            returning true)
        select exists (select from taken)
    $$;

-- The oldest day before today's that a partition has a table of.
create function shardmq.oldest_table(p_partition int) returns int
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select right(c.relname, 6)::int
          from pg_catalog.pg_class c
         where c.relnamespace = 'shardmq'::regnamespace and c.relkind = 'r'
           and c.relname >= shardmq.table_name(p_partition, 0)::name
           and c.relname < (select shardmq.table_name(p.partition, p.day)::name
                              from shardmq.partition p where p.partition = p_partition)
         order by c.relname limit 1
    $$;

-- Moves the low watermark over the oldest day of a partition if its time is over. The caller commits,
-- and drops the table in a transaction of its own: a reader that finds the table gone then also finds
-- the watermark moved. Answers nothing, kept (a group has not finished it: which), expired, or clock: the
-- day's time is over by this server's clock and not by the caller's, which is more than an hour behind. What
-- can't be undone asks two clocks, since one may have leapt.
-- Waits for the lock for a moment only: it is asked with a connection that appends need.
create function shardmq.expire_day(p_partition int, p_client_clock timestamptz,
                                   out outcome text, out day int, out group_name text)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '300ms'
    as $$
declare
    p shardmq.partition;
    d shardmq.day;
    server_clock timestamptz := shardmq.clock();
    ends timestamptz;
begin
    if p_client_clock is null then
        raise exception 'shardmq: expire_day() needs the caller''s own clock beside the server''s'
            using errcode = 'null_value_not_allowed';
    end if;
    perform shardmq.lock_partition(p_partition);
    select * into p from shardmq.partition x where x.partition = p_partition;
    day := shardmq.oldest_table(p_partition);
    ends := shardmq.day_start(day) + (p.retention_days + 1) * interval '1 day';
    if coalesce(ends > least(server_clock, p_client_clock), true) then
        outcome := case when ends <= server_clock and p_client_clock < server_clock - interval '1 hour'
                        then 'clock' else 'nothing' end;
        return;
    end if;
    select * into d from shardmq.day x where (x.partition, x.day) = (p_partition, expire_day.day);
    if d.last_id >= p.low_watermark and not p.drop_unread then
        group_name := (
            select c.group_name from shardmq.cursor c
             where c.partition = p_partition and c.acked_id < d.last_id
            union all
            select g.group_name from shardmq.group_start g
             where g.topic = p.topic
               and not exists (select from shardmq.cursor c
                                where (c.group_name, c.partition) = (g.group_name, p_partition))
               and shardmq.start_position(p.topic, g.group_name, p_partition) < d.last_id
             limit 1);
        if group_name is not null then
            outcome := 'kept';
            return;
        end if;
    end if;
    update shardmq.day x set dropped = true where (x.partition, x.day) = (p_partition, expire_day.day);
    update shardmq.partition x
       set low_watermark = greatest(x.low_watermark, shardmq.first_id(p_partition, expire_day.day) + 99999999)
     where x.partition = p_partition;
    outcome := 'expired';
end $$;

-- Drops the table of a day that is below the low watermark. Waits at most 200 ms for it, since new
-- readers queue behind a waiting drop: dropped, contended (to be tried again) or nothing.
create function shardmq.drop_day(p_partition int, p_day int) returns text
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    set client_min_messages = warning
    as $$
declare
    name text := 'shardmq.' || shardmq.table_name(p_partition, p_day);
begin
    if to_regclass(name) is null then
        return 'nothing';
    end if;
    if shardmq.first_id(p_partition, p_day) + 99999998 >=
       (select p.low_watermark from shardmq.partition p where p.partition = p_partition) then
        raise exception 'shardmq: day % of partition % is not below the low watermark', p_day, p_partition
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform set_config('lock_timeout', '200ms', true);
    execute format('drop table if exists shardmq.%I', shardmq.table_name(p_partition, p_day));
    return 'dropped';
exception
    when lock_not_available then
        return 'contended';
end $$;

-- How many messages after a position were dropped by retention.
create function shardmq.missed(p_partition int, p_position bigint) returns bigint
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select coalesce(sum(d.last_id - greatest(d.first_id - 1, p_position)), 0)::bigint
          from shardmq.day d
         where d.partition = p_partition and d.dropped and d.last_id > p_position
    $$;

create or replace function shardmq.lag(p_topic text)
    returns table (group_name text, partition int, acked_id bigint, last_id bigint, lag bigint,
                   oldest_at timestamptz, member uuid, leased_until timestamptz)
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select c.group_name, c.partition, c.acked_id, l.last_id,
               greatest(0,
                   coalesce((select sum(d.last_id - greatest(d.first_id - 1, c.acked_id))
                               from shardmq.day d
                              where d.partition = c.partition and d.last_id > c.acked_id
                                and not d.dropped), 0)
                 + case when l.last_id < shardmq.first_id(p.partition, p.day) then 0
                        else l.last_id - greatest(c.acked_id, shardmq.first_id(p.partition, p.day) - 1) end
                 - coalesce((select sum(upper(r) - lower(r)) from unnest(c.acked_ahead) r), 0))::bigint,
               shardmq.next_appended_at(c.partition, c.acked_id),
               m.member, m.leased_until
          from shardmq.partition p
          join shardmq.cursor c using (partition)
          left join shardmq.member m on m.member = c.member,
               lateral (select shardmq.last_id(p.partition) as last_id) l
         where p.topic = p_topic and p.state <> 'deleted'
         order by 1, 2
    $$;
