-- Partitions come and go on their node first; the control database records it after: here they go, and
-- V015__sent_keys has how they come. New objects only.

-- Ends a partition: drops its tables and cursors. Its number stays taken for a day.
create function shardmq.delete_partition(p_partition int, p_topic_id uuid) returns boolean
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
    as $$
declare
    v_topic text;
    t record;
begin
    perform shardmq.lock_partition(p_partition);
    update shardmq.partition p set state = 'deleted', deleted_at = shardmq.clock()
     where p.partition = p_partition and p.topic_id = p_topic_id and p.state <> 'deleted'
    returning p.topic into v_topic;
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
     where g.topic = v_topic
       and not exists (select from shardmq.partition p where p.topic = v_topic and p.state <> 'deleted');
    return true;
end $$;
