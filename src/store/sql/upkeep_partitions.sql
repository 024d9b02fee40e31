-- The partitions of this node, and whether they are in use: they have messages of yesterday or today. Without
-- a look at their tables all count as in use.
-- $1 whether to look
select p.partition,
       case when $1::bool
            then shardmq.last_id(p.partition) >= shardmq.first_id(p.partition,
                     shardmq.day_of(shardmq.clock() - interval '1 day'))
            else true end
  from shardmq.partition p
 where p.state <> 'deleted'
 order by 1
