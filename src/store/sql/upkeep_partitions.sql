-- The partitions of this node, and whether they are in use: they have messages of yesterday or today.
select p.partition,
       shardmq.last_id(p.partition) >= shardmq.first_id(p.partition,
           shardmq.day_of(shardmq.clock() - interval '1 day'))
  from shardmq.partition p
 where p.state <> 'deleted'
 order by 1
