-- Where a group starts, if it was seen before. Primary key.
-- $1 topic  $2 group
select start_at, start_id, from_clock, broadcast from shardmq_control.consumer_group
 where topic = $1 and group_name = $2
