-- A topic's partitions on this node, with their last ids.
-- $1 topic
select p.partition, p.generation, p.state, p.day, shardmq.last_id(p.partition),
       coalesce((select sum(d.count) from shardmq.day d where d.partition = p.partition), 0)::bigint
  from shardmq.partition p
 where p.topic = $1 and p.state <> 'deleted'
 order by 1
