-- The groups of broadcast consumers that have been heard of in the last ten minutes. Goes through the members,
-- which are some thousands at most; once in a round of a node's upkeep.
select distinct m.group_name
  from shardmq_control.member m
  join shardmq_control.consumer_group g using (topic, group_name)
 where g.broadcast and m.left_at is null and m.heartbeat_at > clock_timestamp() - interval '10 minutes'
