-- Who of a group is where: the session by which a member's process is seen to live, and groups that go
-- with their only consumer. Adds columns that are null or have a constant default: no table is
-- rewritten, a short exclusive lock on each.

alter table shardmq.member
    add column session text;
comment on column shardmq.member.session is
    'The application_name of its process'' listening session here; null where it has none';

alter table shardmq.group_start
    add column broadcast boolean not null default false,
    add column seen_at timestamptz not null default now();
comment on column shardmq.group_start.broadcast is
    'The group of one consumer alone: it goes when that has gone';
comment on column shardmq.group_start.seen_at is 'When this node heard of it';

-- Removes broadcast groups whose consumer has not renewed its lease here for so long: it has died, or
-- it is away for good. Returns how many.
create function shardmq.sweep_broadcasts(p_idle interval) returns bigint
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
        with idle as (
            delete from shardmq.group_start g
             where g.broadcast and g.seen_at < shardmq.clock() - p_idle
               and not exists (select from shardmq.member m
                                where m.group_name = g.group_name
                                  and m.leased_until > shardmq.clock() - p_idle)
            returning g.group_name),
        cursors as (
            delete from shardmq.cursor c using idle where c.group_name = idle.group_name)
        select count(*) from idle
    $$;
