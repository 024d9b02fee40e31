-- Removes a topic from the index, and all that hangs on it.
-- $1 topic
with m as (delete from shardmq_control.member where topic = $1)
delete from shardmq_control.topic where topic = $1
