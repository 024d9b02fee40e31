-- Groups are moved and deleted by whoever looks after them. New objects only: takes no lock that anybody
-- waits for.

-- The position in a partition that a seek leads to: exactly before an id in that id's own partition, else
-- before the first message of a time; without a time, after everything.
create function shardmq.seek_position(p_partition int, p_at timestamptz, p_id bigint) returns bigint
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
    as $$
        select case
                   when p_id / 100000000000000 = p.partition then greatest(p_id, p.low_watermark) - 1
                   when p_at is null then shardmq.last_id(p.partition)
                   when p_at <= timestamptz 'epoch' then greatest(p.low_watermark - 1, 0)
                   else shardmq.position_at(p.partition, p_at) end
          from shardmq.partition p
         where p.partition = p_partition
    $$;

-- Moves a group's cursors in these of a topic's partitions on this node (null: in all): to the latest
-- message, to a time (the epoch: to the earliest message), or to an id, with a time or null (the latest)
-- for the other partitions. Raises reset_epoch, so that nothing acknowledged before moves them again; who
-- owns them stays. Cursors that others have locked are passed over: a transaction may hold one for as long
-- as it likes. Makes those that are missing, where the group is known here.
create function shardmq.seek(p_topic text, p_group text, p_partitions int[], p_at timestamptz, p_id bigint,
                             p_latest boolean)
    returns table (partition int, before_id bigint, acked_id bigint, moved boolean)
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    locked int[];
begin
    if (p_at is not null or p_id is not null) = coalesce(p_latest, false) then
        raise exception 'shardmq: a seek goes to a time, to an id or to the latest message'
            using errcode = 'invalid_parameter_value';
    end if;
    insert into shardmq.cursor (group_name, partition, acked_id)
    select p_group, p.partition, shardmq.start_position(p_topic, p_group, p.partition)
      from shardmq.partition p
     where p.topic = p_topic and p.state <> 'deleted'
       and (p_partitions is null or p.partition = any (p_partitions))
       and exists (select from shardmq.group_start g where (g.topic, g.group_name) = (p_topic, p_group))
       and not exists (select from shardmq.cursor c where (c.group_name, c.partition) = (p_group, p.partition))
    on conflict do nothing;
    -- A statement of its own: the next one sees all that was acknowledged before the lock was taken, and so
    -- "latest" is never before that.
    locked := array(
        select c.partition
          from shardmq.cursor c join shardmq.partition p on p.partition = c.partition
         where c.group_name = p_group and p.topic = p_topic and p.state <> 'deleted'
           and (p_partitions is null or c.partition = any (p_partitions))
         order by c.partition
           for no key update of c skip locked);
    return query
        with changed as (
            update shardmq.cursor c
               set acked_id = shardmq.seek_position(c.partition, p_at, p_id), acked_ahead = '{}',
                   reset_epoch = c.reset_epoch + 1
             where c.group_name = p_group and c.partition = any (locked)
            returning c.partition, c.acked_id)
        select c.partition, c.acked_id, coalesce(n.acked_id, c.acked_id), n.partition is not null
          from shardmq.cursor c
          join shardmq.partition p on p.partition = c.partition
          left join changed n on n.partition = c.partition
         where c.group_name = p_group and p.topic = p_topic and p.state <> 'deleted'
           and (p_partitions is null or c.partition = any (p_partitions))
         order by c.partition;
end $$;

-- Forgets a group of a topic on this node: deleted, unknown, or live, where a consumer has a lease that
-- owns one of its cursors. A member's row has no topic, so one that owns nothing counts too if its group
-- bears the name.
create function shardmq.delete_group(p_topic text, p_group text) returns text
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
    delete from shardmq.group_start g where (g.topic, g.group_name) = (p_topic, p_group);
    return case when known or found then 'deleted' else 'unknown' end;
end $$;
