-- Where a group starts on this node, if it knows. Primary key.
-- $1 topic  $2 group
select start_at, start_id, broadcast from shardmq.group_start where topic = $1 and group_name = $2
