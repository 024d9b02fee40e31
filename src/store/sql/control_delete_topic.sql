-- Removes a topic from the index, and all that hangs on it.
-- $1 its id
delete from shardmq_control.topic where topic_id = $1
