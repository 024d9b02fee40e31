-- Partitions come and go on their node first; the control database records it after. New objects only.

-- Takes partitions for a topic: those it has here already in this generation (a creation that was cut
-- off is taken up again), then free numbers. A number is free a day after its partition was deleted.
create function shardmq.claim_partitions(p_topic text, p_generation int, p_count int, p_version bigint)
    returns setof int
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    v_node int := (select i.node from shardmq.identity i);
    today int := shardmq.day_of(shardmq.clock());
    number int;
    taken int := 0;
begin
    if v_node is null then
        raise exception 'shardmq: this database is not registered as a node'
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform shardmq.lock_partition(0);
    for number in
        select n from (
            select p.partition as n, 0 as rank from shardmq.partition p
             where p.topic = p_topic and p.generation = p_generation and p.state = 'open'
            union all
            select f, 1 from generate_series(10000 + v_node * 100 + 1, 10000 + v_node * 100 + 99) f
             where not exists (select from shardmq.partition p where p.partition = f and
                    (p.state <> 'deleted' or p.deleted_at > shardmq.clock() - interval '1 day'))
            ) c
         order by rank, n limit p_count
    loop
        perform shardmq.lock_partition(number);
        insert into shardmq.partition as p (partition, topic, generation, day, topology_version, created_at)
        values (number, p_topic, p_generation, today, p_version, shardmq.clock())
        on conflict (partition) do update set
            topic = excluded.topic, generation = excluded.generation, state = 'open',
            day = greatest(excluded.day, p.day), topology_version = excluded.topology_version,
            low_watermark = 0, created_at = excluded.created_at, deleted_at = null
         where p.state = 'deleted';
        perform shardmq.make_day(number, (select p.day from shardmq.partition p where p.partition = number));
        taken := taken + 1;
        return next number;
    end loop;
    if taken < p_count then
        raise exception 'shardmq: node % has % free partitions of 99, % are needed', v_node, taken, p_count
            using errcode = 'configuration_limit_exceeded';
    end if;
end $$;

-- Ends a partition: drops its tables and cursors. Its number stays taken for a day.
create function shardmq.delete_partition(p_partition int, p_topic text) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    t record;
begin
    perform shardmq.lock_partition(p_partition);
    update shardmq.partition p set state = 'deleted', deleted_at = shardmq.clock()
     where p.partition = p_partition and p.topic = p_topic and p.state <> 'deleted';
    if not found then
        return false;
    end if;
    for t in select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where n.nspname = 'shardmq' and c.relkind = 'r' and c.relname like 'batch\_' || p_partition || '\_%' loop
        execute format('drop table shardmq.%I', t.relname);
    end loop;
    delete from shardmq.day d where d.partition = p_partition;
    delete from shardmq.refused r where r.partition = p_partition;
    delete from shardmq.cursor c where c.partition = p_partition;
    -- A topic of that name that is made later is another one: its groups begin anew.
    delete from shardmq.group_start g
     where g.topic = p_topic
       and not exists (select from shardmq.partition p where p.topic = p_topic and p.state <> 'deleted');
    return true;
end $$;
