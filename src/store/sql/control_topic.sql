-- One topic. Primary key.
-- $1 topic
select generation, created_at, topic_id from shardmq_control.topic where topic = $1
