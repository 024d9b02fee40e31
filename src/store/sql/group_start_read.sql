-- Whether a group's start is known on this node. Primary key.
-- $1 topic  $2 group
select start_at, start_id from shardmq.group_start where topic = $1 and group_name = $2
