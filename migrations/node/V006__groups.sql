-- Groups: who holds which partition until when, and how far it is. New objects only.

create table shardmq.group_start (
    topic text not null,
    group_name text not null check (group_name ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    start_at timestamptz not null,
    start_id bigint,
    primary key (topic, group_name)
);
comment on table shardmq.group_start is
    'Resolved once, when the group was first seen here: where partitions without a cursor start';

create table shardmq.member (
    member uuid primary key,
    group_name text not null,
    leased_until timestamptz not null,
    lease_secs float8 not null default 10,
    turn bigint not null default 0,
    left_at timestamptz
) with (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0,
        vacuum_truncate = off);
comment on table shardmq.member is
    'One row per consumer: the leases of all its partitions here end together';
comment on column shardmq.member.turn is
    'Counted by the consumer: a renewal that arrives after a later one, or after the lease was ended, is void';
comment on column shardmq.member.left_at is
    'When the consumer ended its lease here: the row stays for an hour, so that no renewal which arrives late
     begins it again';

create table shardmq.cursor (
    group_name text not null,
    partition int not null,
    acked_id bigint not null,
    acked_ahead int8multirange not null default '{}',
    member uuid,
    owner uuid,
    epoch bigint not null default (random() * 281474976710656)::bigint,
    reset_epoch bigint not null default 0,
    primary key (group_name, partition)
) with (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0,
        vacuum_truncate = off);
comment on column shardmq.cursor.acked_id is 'The last id up to which all is acknowledged';
comment on column shardmq.cursor.acked_ahead is 'Ids above it that are acknowledged too';
comment on column shardmq.cursor.epoch is
    'Raised by each acquisition. It begins at a random number, so that no fence of a group that was deleted fits one of the same name';
comment on column shardmq.cursor.owner is
    'Drawn anew at each acquisition; with epoch and reset_epoch the fence that every commit names';

-- Whether a member's lease is under way. One that ends later than any lease of that length could was written
-- while this server's clock was ahead: a live member writes it anew within a third of it.
create function shardmq.is_live(m shardmq.member) returns boolean
    language sql volatile
    return m.leased_until > shardmq.clock()
           and m.leased_until <= shardmq.clock() + make_interval(secs => 2 * m.lease_secs);

-- Where a group starts in a partition that it has no cursor in: a partition made after the group at
-- its first message, an older one at the first message from start_at on.
create function shardmq.start_position(p_topic text, p_group text, p_partition int) returns bigint
    language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    s shardmq.group_start;
    p shardmq.partition;
begin
    select * into s from shardmq.group_start x where x.topic = p_topic and x.group_name = p_group;
    select * into p from shardmq.partition x where x.partition = p_partition;
    if s.start_id / 100000000000000 = p_partition then
        return greatest(s.start_id, p.low_watermark) - 1;
    end if;
    if s.start_at is null or p.created_at >= s.start_at then
        return greatest(p.low_watermark - 1, 0);
    end if;
    return shardmq.position_at(p_partition, s.start_at);
end $$;

-- How far a group is in each partition of a topic on this node, by arithmetic: no message is counted.
create function shardmq.lag(p_topic text)
    returns table (group_name text, partition int, acked_id bigint, last_id bigint, lag bigint,
                   oldest_at timestamptz, member uuid, leased_until timestamptz)
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select c.group_name, c.partition, c.acked_id, l.last_id,
               greatest(0,
                   coalesce((select sum(d.count) from shardmq.day d
                              where d.partition = c.partition and d.first_id > c.acked_id), 0)
                 + coalesce((select d.last_id - c.acked_id from shardmq.day d
                              where d.partition = c.partition
                                and c.acked_id between d.first_id and d.last_id), 0)
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
