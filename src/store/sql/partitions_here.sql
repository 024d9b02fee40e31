-- All partitions of this node, with those that were deleted, and whether they have had messages.
select p.partition, p.topic, p.topic_id, p.generation, p.state = 'deleted', shardmq.last_id(p.partition) > 0
  from shardmq.partition p
 order by 1
